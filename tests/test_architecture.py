"""The house rules that a machine can check: who imports whom, what an import costs, documentation that runs."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import glf_fast

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "glf_fast"

# Part → the parts of glf_fast that it may import (itself, and errors and files, always).
ALLOWED = {
    "reference": set(),
    "ops": {"reference", "kernels"},
    "flow": {"ops", "reference"},
    "data": {"images"},
    "metrics": {"data", "images"},
    "models": {"flow", "metrics"},
    "integrations": {"flow"},
}


def imported_parts(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} if node.module != "glf_fast" else {f"glf_fast.{a.name}" for a in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("glf_fast.")}


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_follow_the_house(part: str) -> None:
    files = list((PACKAGE / part).rglob("*.py"))
    assert files
    for path in files:
        commands = {"command_line"} if path.name == "__main__.py" else set()
        assert imported_parts(path) <= ALLOWED[part] | commands | {part, "errors", "files"}, path


@pytest.mark.parametrize("part", ["reference", "ops", "flow"])
def test_the_flow_core_needs_torch_alone(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        tree = ast.parse(path.read_text())
        roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        extra = {"cupy", "numpy"} if path.name == "cupy_linear.py" else set()  # imported where CuPy is, alone
        assert roots - set(sys.stdlib_module_names) <= {"torch", "glf_fast"} | extra, path


def test_kernels_need_triton_and_torch_alone() -> None:
    files = list((ROOT / "kernels").rglob("*.py"))
    assert files
    for path in files:
        assert imported_parts(path) <= {"kernels"}, path
        tree = ast.parse(path.read_text())
        roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert roots - set(sys.stdlib_module_names) <= {"triton", "torch", "glf_fast"}, path


def test_importing_glf_fast_loads_nothing_of_the_trainer() -> None:
    code = """
import sys
before = __import__("torch") and set(sys.modules)
import glf_fast
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert not loaded - {"glf_fast"} - set(sys.stdlib_module_names), loaded
import torch
assert not torch.cuda.is_initialized()
assert glf_fast.GLF.__name__ == "GLF"
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_public_names_are_listed_before_they_are_loaded() -> None:
    code = """
import sys
import glf_fast
assert set(glf_fast.__all__) <= set(dir(glf_fast))
assert {"ConversionError", "accelerate", "convert", "integrations"} <= set(dir(glf_fast))
assert not [name for name in sys.modules if name.startswith(("glf_fast.conversion", "glf_fast.integrations"))]
assert glf_fast.integrations.zuko.Flow and "zuko" not in sys.modules
try:
    glf_fast.convert(__import__("torch").nn.Linear(2, 2))
except glf_fast.ConversionError:
    pass
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules([str(PACKAGE / "flow")])])
def test_docstring_examples_run(name: str) -> None:
    import torch

    module = importlib.import_module(f"glf_fast.flow.{name}")
    names = {"torch": torch, **{key: getattr(glf_fast, key) for key in glf_fast.__all__}}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_readme_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_files_stay_readable() -> None:
    """One subject a file, a few hundred lines at most."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path
