"""README and docs: every Python block runs, the API pages name all that is public, and llms.txt is current."""

import importlib.util
import itertools
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import pytest
from torch.distributions import Distribution

import glf_fast
from bench.libraries import flowjax
from glf_fast import conversion, fitting, flow, grammar, integrations, metrics, ops
from glf_fast.integrations import madnis, nessai, nflows, pocomc, sbi, zuko
from glf_fast.models.glf import GLFSettings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Blocks in ```py are not run here, because pythae is not in the test environment, and anomalib has its own (tests/communities).
SHOWN = {"docs/coming-from/pythae.md", "docs/drop-in.md"}
SLOW = {"docs/coming-from/flowjax.md"}  # XLA compiles for a quarter of a minute
MISSING = pytest.mark.skipif(bool(flowjax.why_not()), reason=flowjax.why_not())  # it comes with `make bench`
# aspire needs Python 3.11, and with it the class for it.
ASPIRE = sys.version_info >= (3, 11)
BLOCK = re.compile(r"^```(python|py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def sections() -> Iterator[object]:
    """The blocks of each section of a page, with the line on which each begins: a block may use names of the blocks before it.

    Sections begin at ## headings; on pages that tell one story, of which "Before" is the first part, all is one section.
    """
    for path in PAGES:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        whole = path.parent.name in ("coming-from", "quickstart")
        starts = [0, *(() if whole else (m.start() for m in re.finditer(r"^## ", text, re.MULTILINE))), len(text)]
        for start, end in itertools.pairwise(starts):
            found = [m for m in BLOCK.finditer(text, start, end) if m[1] == "python"]
            blocks = [(text.count("\n", 0, m.start(2)), m[2]) for m in found]
            if blocks:
                marks = [pytest.mark.long, MISSING] if name in SLOW else []
                if not ASPIRE and any("import Aspire" in block for _, block in blocks):
                    marks.append(pytest.mark.skip(reason="aspire needs Python 3.11"))
                yield pytest.param(name, blocks, id=f"{name}:{blocks[0][0]}", marks=marks)


def fitted_table() -> dict[str, object]:
    """Files and names with which the Python of docs/tables.md begins: the folder densities/table of a command, and rows."""
    rows = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32)
    np.save("table.npy", rows)
    small = ["--flow.steps", "2", "--flow.hidden", "16", "--epochs", "2"]
    imported = sys.modules.pop("glf_fast.fit", None)  # runpy warns of a module that is there
    with mock.patch.object(sys, "argv", ["fit", "table.npy", *small]), pytest.raises(SystemExit) as stop:
        runpy.run_module("glf_fast.fit", run_name="__main__", alter_sys=True)
    if imported:
        sys.modules["glf_fast.fit"] = imported
    assert not stop.value.code
    return {"rows": rows}


def generative_model() -> dict[str, object]:
    """File with which README.md begins: the model of a run."""
    settings = GLFSettings(latent_dim=4, width=4, hidden=8)
    glf_fast.GLF((1, 8, 8), settings).save_pretrained("RUN/checkpoints/best")
    return {}


BEGINS = {"docs/tables.md": fitted_table, "README.md": generative_model}


@pytest.mark.filterwarnings("ignore:Maximum number of epochs")
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # called by normflows
@pytest.mark.parametrize(("page", "blocks"), list(sections()))
def test_examples_run(
    page: str, blocks: list[tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Importing pyro turns the checks of arguments on for a whole process, importing zuko off.
    monkeypatch.setattr(Distribution, "_validate_args", Distribution._validate_args)
    names = {"__name__": "documentation", **(BEGINS[page]() if page in BEGINS else {})}
    for line, block in blocks:
        exec(compile("\n" * line + block, page, "exec"), names)


def test_only_code_of_missing_libraries_is_not_run() -> None:
    shown = {p.relative_to(ROOT).as_posix() for p in PAGES if any(m[1] == "py" for m in BLOCK.finditer(p.read_text()))}
    assert shown == SHOWN
    assert importlib.util.find_spec("pythae") is None, "pythae is there: run its code"


@pytest.fixture
def llms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/llms.py."""
    if not ASPIRE:
        pytest.skip("the pages name a class for aspire, which needs Python 3.11")
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("llms")


def test_llms_txt_is_current(llms: ModuleType) -> None:
    assert llms.OUT.read_text(encoding="utf-8") == llms.text(), "run python tools/llms.py"


@pytest.mark.parametrize(
    "module",
    [
        glf_fast,
        ops,
        conversion,
        fitting,
        flow,
        integrations,
        madnis,
        nessai,
        nflows,
        pocomc,
        sbi,
        zuko,
        metrics,
        grammar,
    ],
)
def test_the_api_pages_name_what_is_public(module: ModuleType, llms: ModuleType) -> None:
    described = [llms.found(name) for name in llms.names()]
    for name in module.__all__:
        thing = getattr(module, name)
        if isinstance(thing, ModuleType) or not callable(thing):
            continue  # the modules' own contents, and constants, which a page may mention
        assert any(thing is other for other in described), f"{module.__name__}.{name} is on no page in docs/api"
