"""The house rules that a machine can check: who imports whom, what an import costs, documentation that runs."""

import ast
import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path

import forked
import pytest

import glf_fast
from glf_fast import models

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "glf_fast"

# The ground: every room may import it, and it imports nothing but itself.
GROUND = {"errors", "output", "files", "seeds", "images", "page", "progress", "settings", "command_line", "distributed"}
# Room → the rooms that it may import.
ALLOWED = {
    "reference": set(),
    "ops": {"reference", "kernels"},
    "flow": {"ops", "reference"},
    "conversion": {"flow", "ops", "reference"},
    "integrations": {"conversion", "fitting", "flow", "ops", "reference"},
    "fitting": {"flow", "ops", "reference"},
    "grammar": set(),
    "data": {"grammar"},
    "metrics": {"data", "grammar"},
    "models": {"flow", "metrics", "fitting", "grammar"},
    "training": {"models", "data", "metrics", "grammar"},
    "exploring": {"models", "data", "metrics", "training"},
    "tabular": {"models", "data", "fitting", "flow", "ops", "reference"},
}
# Commands may import everything but each other; nobody imports them.
COMMANDS = {"train", "sample", "evaluate", "compare", "fit", "explore", "info", "push"}
# What must stay usable without the application.
LIBRARY = {"reference", "ops", "flow", "conversion", "integrations"}


def imported_parts(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} if node.module != "glf_fast" else {f"glf_fast.{a.name}" for a in node.names}
    return {module.split(".")[1] for module in modules if module.startswith("glf_fast.")}


def test_every_room_has_a_rule() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert rooms == set(ALLOWED)
    assert modules == GROUND | COMMANDS


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_what_they_may(room: str) -> None:
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        ground = {"errors"} if room in LIBRARY else GROUND
        assert imported_parts(path) <= ALLOWED[room] | ground | {room}, path


def test_the_ground_knows_nobody_and_commands_know_no_command() -> None:
    for name in GROUND:
        assert imported_parts(PACKAGE / f"{name}.py") <= GROUND, name
    for name in COMMANDS:
        assert not imported_parts(PACKAGE / f"{name}.py") & COMMANDS, name


def test_no_room_but_models_names_a_model() -> None:
    names = "|".join({*models.names(), *(models.kind(name).words.title for name in models.names())})
    files = [path for room in ("training", "data", "metrics", "exploring") for path in (PACKAGE / room).rglob("*.py")]
    files += [*(PACKAGE / "training").glob("*.html"), *(PACKAGE / f"{name}.py" for name in GROUND | COMMANDS)]
    for path in files:
        found = re.search(rf"\b({names})\b(?!_)", path.read_text())
        assert not found, f"{path} names {found[0]}"


@pytest.mark.parametrize("part", ["reference", "ops", "flow"])
def test_the_flow_core_needs_torch_alone(part: str) -> None:
    for path in (PACKAGE / part).rglob("*.py"):
        tree = ast.parse(path.read_text())
        roots = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        extra = {"cupy", "numpy"} if path.name == "cupy.py" else set()  # imported where CuPy is, alone
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
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr


def test_all_of_the_integrations_is_imported_without_other_packages() -> None:
    code = """
import sys
sys.modules |= dict.fromkeys(("aspire", "bayesflow", "keras", "madnis", "nessai", "pocomc", "sbi", "nflows", "zuko"))
from glf_fast.integrations import *
assert fast_splines and madnis.Flow and nflows.Flow and zuko.Flow
import glf_fast
try:
    glf_fast.integrations.pocomc
except ImportError as error:
    assert "pocomc" in str(error), error
else:
    raise AssertionError("pocomc is missing")
"""
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr


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
    done = forked.fresh(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name",
    [
        f"{room}.{m.name}"
        for room in ("flow", "fitting", "tabular")
        for m in pkgutil.iter_modules([str(PACKAGE / room)])
    ],
)
def test_docstring_examples_run(name: str) -> None:
    import torch

    module = importlib.import_module(f"glf_fast.{name}")
    names = {"torch": torch, **{key: getattr(glf_fast, key) for key in glf_fast.__all__}}
    assert doctest.testmod(module, extraglobs=names).failed == 0


def test_files_stay_readable() -> None:
    """One subject a file, a few hundred lines at most."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 500, path
