"""The notebooks of examples/ run from top to bottom, and are committed as they were run: with outputs, without errors."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SWITCH = re.compile(r"QUICK = False(?=  # )")


def test_there_are_three_and_they_are_small() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["accelerated_sbi", "flow_on_a_table", "glf_on_your_pictures"]
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 1 << 20


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_whole_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert SWITCH.match(cells[0].source), "the first cell says how much is computed"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(output.output_type != "error" and output.get("name") != "stderr" for output in outputs)
    texts = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users)/", texts), "outputs name no folder of one machine"
    assert all(len(line) <= 128 for cell in cells for line in cell.source.splitlines())


@pytest.mark.long  # a minute and a half together; .ci/run asks for them by name
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source = SWITCH.sub("QUICK = True", first.source)
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, kernel_name="python3", startup_timeout=240, timeout=240, resources=resources)
    client.execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert len(printed) > 300
