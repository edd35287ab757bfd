"""The package of kernels for the Hugging Face Hub: its layout, and that it works under another name, without glf_fast."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import export_kernels
import pytest
import torch

from glf_fast import reference

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture
def package(tmp_path: Path) -> Path:
    export_kernels.export(tmp_path / "export", "somebody/flows")
    return tmp_path / "export"


def test_the_layout_is_kernel_builders(package: Path) -> None:
    build = tomllib.loads((package / "build.toml").read_text(encoding="utf-8"))
    general = build["general"]
    assert build["torch-noarch"] == {} and isinstance(general["version"], int)
    assert general["hub"] == {"repo-id": "somebody/flows"}
    folder = package / "torch-ext" / general["name"].replace("-", "_")
    assert (folder / "__init__.py").is_file() and (folder / "kernels" / "launch_table.json").is_file()
    assert 'get_kernel("somebody/flows", version=1)' in (package / "CARD.md").read_text(encoding="utf-8")
    assert list((package / "tests").glob("test_*.py")) and (package / "LICENSE").is_file()
    assert not [path for path in package.rglob("*") if path.name == "__pycache__"]


def test_nothing_but_torch_and_triton_is_imported(package: Path) -> None:
    files = list((package / "torch-ext").rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
            roots = {name.partition(".")[0] for name in names}
            assert roots - set(sys.stdlib_module_names) <= {"torch", "triton"}, path


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the package's own tests run compiled")
def test_it_runs_under_another_name(package: Path) -> None:
    place = package / "torch-ext" / export_kernels.PACKAGE / "__init__.py"
    spec = importlib.util.spec_from_file_location("renamed_5f3a", place, submodule_search_locations=[str(place.parent)])
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = flows = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(flows)
        torch.manual_seed(0)
        v, u, t = (x.requires_grad_() for x in torch.randn(3, 4, 6))
        found, exact = (
            flows.affine_coupling(v, u, t, log_scale="glow"),
            reference.affine_coupling(v, u, t, log_scale="glow"),
        )
        for kernel, correct in zip(found, exact, strict=True):
            torch.testing.assert_close(kernel, correct)
        gradients = [torch.autograd.grad(w.square().sum() + logdet.sum(), (v, u, t)) for w, logdet in (found, exact)]
        for kernel, correct in zip(*gradients, strict=True):
            torch.testing.assert_close(kernel, correct)
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == spec.name]:
            del sys.modules[name]


def test_what_would_not_be_self_contained_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the package has no glf_fast\.ops"):
        export_kernels.relative("from glf_fast.ops.linear import dense\n", "kernels")
    with pytest.raises(ValueError, match="not made relative"):
        export_kernels.relative("import glf_fast.kernels.math\n", "kernels")
    made = export_kernels.relative(
        "from glf_fast.kernels.math import tanh\nfrom glf_fast.reference import mlp\n", "kernels"
    )
    assert made == "from .math import tanh\nfrom ..reference import mlp\n"
    with pytest.raises(ValueError, match="OWNER/NAME"):
        export_kernels.export(tmp_path / "new", "nobody")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        export_kernels.export(tmp_path, "somebody/flows")


@pytest.mark.long
def test_its_own_tests_pass(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(package / "torch-ext"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=package,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
