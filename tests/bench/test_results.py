"""Result files, their tables, and where the goals stand."""

from pathlib import Path

import pytest

from bench import on_processor
from bench.goals import PROCESSOR, processor_goals
from bench.plots import draw
from bench.report import DOCS, DROP_IN, FOLDER, OVERVIEW, kept_of, with_tables
from bench.results import merge, read, stats, write
from bench.tables import NOT_MEASURED, page, ratio, worth_a_gpu

ROOT = Path(__file__).parents[2]
DIMS = (4, 8, 12, 16, 24, 32, 48, 64)
KEPT = sorted(FOLDER.glob("*/times.json"))


def test_runs_are_merged_and_suites_joined(made, tmp_path) -> None:
    flow, linear = ("flow", "a", "train"), ("linear", "b", "inverse")
    first, second = made({flow: {"glf_fast": [1.0], "eager": [2.0]}}), made({flow: {"glf_fast": [1.1], "eager": [2.1]}})
    whole = merge([first, second, made({linear: {"glf_fast": [3.0]}})])
    assert whole.groups()[flow]["glf_fast"].medians == [1.0, 1.1]
    assert whole.groups()[flow]["eager"].median == 2.0
    assert whole.groups()[linear]["glf_fast"].medians == [3.0]
    write(whole, tmp_path / "whole.json")
    assert read(tmp_path / "whole.json") == whole
    with pytest.raises(ValueError, match="commit"):
        merge([first, made({}, commit="def")])


def test_a_provider_that_failed_in_one_run_is_compared_in_the_others(made) -> None:
    key = "flow", "a", "train"
    runs = [
        made({key: {"glf_fast": [1.0], "eager": [3.0]}}),
        made({key: {"glf_fast": [2.0], "eager": [6.0], "FrEIA": [4.0]}}),
        made({key: {"glf_fast": [2.0], "FrEIA": [4.0]}}),
    ]
    rows = merge(runs).groups()[key]
    assert {name: row.medians for name, row in rows.items()} == {
        "glf_fast": [1.0, 2.0, 2.0],
        "eager": [3.0, 6.0, None],
        "FrEIA": [None, 4.0, 4.0],
    }
    assert (ratio(rows, "FrEIA"), ratio(rows, "eager")) == ("2.00", "3.00")


def test_parts_of_one_run_are_one_run(made) -> None:
    """`bench.gpu` measures torch.compile in a part of its own."""
    key = "flow", "a", "train, tf32"
    whole = merge([made({key: {"glf_fast": [1.0], "eager": [2.0]}}), made({key: {"compile": [1.5]}})])
    assert [row.medians for row in whole.groups()[key].values()] == [[1.0], [2.0], [1.5]]
    twice = merge([made({key: {"glf_fast": [1.0]}}), made({key: {"glf_fast": [1.1]}}), made({key: {"compile": [1.5]}})])
    assert [row.medians for row in twice.groups()[key].values()] == [[1.0, 1.1], [1.5, None]]
    assert ratio(twice.groups()[key], "compile") == "1.50"


def test_runs_of_other_machines_are_not_merged_and_quick_ones_not_kept(made, tmp_path) -> None:
    for other in ({"cpu": {"brand_raw": "Y"}}, {"threads": 1}, {"gpu": "H200"}, {"torch": "2.12.0"}):
        with pytest.raises(ValueError, match="can be merged"):
            merge([made({}), made({}, **other)])
    write(made({}, quick=True), tmp_path / "quick.json")
    with pytest.raises(ValueError, match="mean nothing"):
        kept_of([tmp_path / "quick.json"])


def test_a_page_survives_what_was_not_measured(made, tmp_path) -> None:
    """A processor that does not say its name, a way of a depth without memory, a provider without a colour."""
    found = made(
        {
            ("memory", "memory-8", "train"): {"glf_fast": [1.0], "glf_fast reversible": [1.0]},
            ("memory", "memory-64", "train"): {"eager": [1.0], "glf_fast reversible": [1.0]},
            ("flow", "a", "train"): {"glf_fast": [1.0], "newest": [2.0]},
        },
        cpu={},
    )
    for r in found.results:
        r.info |= {"peak_bytes": 3 << 20, "steps": int(r.case[7:] or 0) if r.suite == "memory" else 8, "batch": 1}
        r.info |= {"threads": 2, "matrix_gflops": 1.0, "yardstick_s": 1.0, "gflops": 1.0}
    found.results[1].info |= {"parameter_bytes": 1 << 20, "activation_bytes": 1 << 19}
    text = "\n".join(page(found))
    assert "| 64 |  |  | 3.0 MiB, 1.00 s | 3.0 MiB, 1.00 s |" in text
    assert "The fastest other, newest, takes 2.00 times as long as glf_fast." in text
    assert [path.stem for path in draw(found, tmp_path)] == ["ratios", "memory"]


def test_where_the_goals_stand(made) -> None:
    """Of the best baseline in each run, by the median of the runs; several cases by the worst."""
    linear = {("linear", f"linear-1024-{d}", "forward"): {"glf_fast": [1.0], "torch.linalg": [4.0]} for d in DIMS}
    found = made(
        {
            ("flow", "glf-cifar", "train"): {
                "glf_fast": [1.0, 1.0, 1.0],
                "compile": [1.6, 1.8, 1.5],
                "zuko": [2.0, 1.7, 2.0],
                "FrEIA": [1.9, 1.9, 1.9],
            },
            ("memory", "memory-64", "train"): {"glf_fast": [1.0], "eager": [9.0]},
            **linear,
            ("linear", "linear-1024-16", "forward"): {"glf_fast": [1.0], "torch.linalg": [2.5]},
            ("convert", "glf-mnist of zuko", "train"): {"glf_fast": [1.0], "original": [5.0]},
        }
    )
    for r in found.suite("memory"):
        r.info["peak_bytes"] = 100 if r.provider == "glf_fast" else 400
    rows = {line.split(" | ")[0][2:]: line for line in processor_goals([found]) if line.startswith("| ")}
    assert len(rows) == len(PROCESSOR) + 1
    library = rows["glf-cifar, train: the best library"]
    assert library.endswith("| 1.7 × | 1.90 (1.70 – 1.90); without nflows, normflows | reached |")
    assert rows["glf-cifar, train: torch.compile"].endswith("| 1.60 (1.50 – 1.80) | **missed** |")
    memory = rows["peak memory of train at K = 64, B 4,096: eager"]
    assert memory.endswith("| 4 × | 4.00 | reached |")
    inverse = rows["slogdet and inverse of 1,024 matrices, D 4 … 64: torch.linalg"]
    assert inverse.endswith("| 2.50, the least: linear-1024-16 | **missed** |")
    converted = rows["converted flows of glf-mnist's size, train: the original"]
    assert "5.00, the least: glf-mnist of zuko; not measured: " in converted and converted.endswith("|  |")
    assert rows["sbi, train: torch.compile"].endswith(f"| 2.5 × | {NOT_MEASURED} |  |")
    lines = list(processor_goals([found]))
    assert any(
        line.startswith("Suites that were not measured there yet: coupling, spline, depth, grid") for line in lines
    )
    assert not list(processor_goals([made({}, gpu="H200")]))


def test_every_goal_is_of_a_case_that_is_measured() -> None:
    known = {race.key: race.names for race in on_processor.races()}
    for goal in PROCESSOR:
        for key in goal.keys:
            assert {goal.ours, *goal.against} <= {*known[key]}, key


def test_a_suite_without_a_table_of_its_own_gets_the_plain_one(made) -> None:
    text = "\n".join(
        page(made({("newest", "K 8, D 4", "inverse"): {"glf_fast": [1e-5, 2e-5], "cusolver": [3e-5, 5e-5]}}))
    )
    assert "## newest" in text
    assert "| K 8, D 4, inverse | 10 µs | 30 µs (3.00 (2.50 – 3.00) ×) |" in text


def test_processors_beside_gpus(made) -> None:
    def grid(**machine: str):
        found = made({("grid", "grid-4-32-1", "train"): {"glf_fast": [1e-4], "eager": [1e-3]}}, **machine)
        for result in found.results:
            result.info |= {"dim": 4, "hidden": [32, 32], "batch": 1}
        return found

    cpu, gpu = grid(), grid(gpu="H200")
    header, _, row = worth_a_gpu([cpu])
    assert header == "| D | H | batch | CPU (X, 2 cores): glf_fast | CPU (X, 2 cores): eager | GPU: glf_fast |"
    assert row == f"| 4 | 32 | 1 | 100 µs | 1.00 ms | {NOT_MEASURED} |"
    assert next(worth_a_gpu([cpu, gpu])).endswith("| GPU (H200): glf_fast | GPU (H200): eager |")


def test_stats_of_one_and_of_many() -> None:
    assert stats([2.0]) == {"min": 2.0, "q1": 2.0, "median": 2.0, "q3": 2.0, "max": 2.0, "rounds": 1}
    assert stats([3.0, 1.0, 2.0])["median"] == 2.0


@pytest.mark.parametrize("path", KEPT, ids=[path.parent.name for path in KEPT])
def test_pages_say_what_the_committed_results_say(path: Path) -> None:
    """`python -m bench.report --docs` was run after the results changed."""
    assert (DOCS / f"{path.parent.name}.md").read_text().startswith("\n".join(page(read(path))) + "\n")


@pytest.mark.parametrize(("page", "marks"), [(OVERVIEW, 3), (DROP_IN, 1)])
def test_pages_with_tables_say_what_the_committed_results_say(page: Path, marks: int) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- begin: python -m bench.report --docs: ") == marks
    assert with_tables(text, [read(path) for path in KEPT]) == text
