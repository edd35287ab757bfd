"""Where GPUs stand: goals judged in calls and in graphs, floors, predictions beside what was measured."""

import json
from collections.abc import Callable

import pytest

from bench import on_gpu, predictions
from bench.goals import GPU, gpu_goals
from bench.report import with_tables
from bench.results import Results
from bench.tables import NOT_MEASURED, page

NAMED = ("glf-cifar", "glf-mnist", "sbi")


@pytest.fixture
def gpu(made) -> Callable[..., Results]:
    """A file of a GPU; every row with a floor of 10 µs, and kernels where given."""

    def make(times: dict, kernels: dict | None = None) -> Results:
        found = made(times, gpu="H100")
        for row in found.results:
            row.info |= {"yardstick_s": 1e-5, "batch": 1, "share_of_matrix_rate": 0.5}
            if alone := (kernels or {}).get((row.case, row.provider)):
                row.info |= {"graph_cold": {"median": alone}, "graph_warm": {"median": alone}}
        return found

    return make


def rows(found: Results) -> dict[str, list[str]]:
    """Cells of the table, by goal."""
    lines = [line.strip("| ").split(" | ") for line in gpu_goals([found]) if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[1:]}


def test_a_goal_is_judged_in_calls_and_in_graphs(gpu) -> None:
    """Ours is slow as a call and fast as a graph; the others are the same. The worst case decides, by its two runs."""
    train = {
        "glf_fast": 5e-4, "glf_fast, graphed": 1e-4, "eager": 4e-3, "eager, graphed": 1.5e-3, "compile": 2e-3,
        "reduce-overhead": 4e-4,
    }  # fmt: skip
    times = {("flow", case, "train, tf32"): {name: [t, t] for name, t in train.items()} for case in NAMED}
    times["flow", "sbi", "train, tf32"] |= {"glf_fast": [4e-4, 4e-4], "eager": [2e-3, 3e-3]}
    found = rows(gpu(times, {("sbi", "glf_fast"): 8e-5}))
    assert len(found) == len(GPU)
    eager = found["glf-cifar, glf-mnist, sbi, train: eager"]
    assert eager[:2] == ["10 ×", "6.25 (5.00 – 7.50), the least: sbi"] and eager[2] == "**missed**"
    assert eager[3:5] == ["25.00 (20.00 – 30.00), the least: sbi", "reached"]
    assert eager[5] == "10 µs; call 400 µs, kernels 80 µs (sbi)"
    best = found["glf-cifar, glf-mnist, sbi, train: the best of compile, reduce-overhead, graphed eager"]
    assert best[:5] == [
        "3 ×",
        "0.80 (0.80 – 0.80), the least: glf-cifar",
        "**missed**",
        "4.00 (4.00 – 4.00), the least: glf-cifar",
        "reached",
    ]
    assert found["glf-cifar, glf-mnist, sbi, sample: eager"][1:4] == [NOT_MEASURED, "", NOT_MEASURED]


def test_no_verdict_before_all_baselines_were_measured(gpu) -> None:
    times = {
        ("flow", case, "train, tf32"): {"glf_fast": [1e-4], "eager": [4e-3], "eager, graphed": [1.5e-3]}
        for case in NAMED
    }
    times["flow", "sbi", "train, tf32"] |= {"compile": [1e-3], "reduce-overhead": [1e-3]}
    best = rows(gpu(times))["glf-cifar, glf-mnist, sbi, train: the best of compile, reduce-overhead, graphed eager"]
    assert (
        best[1] == "10.00, the least: sbi; without compile, reduce-overhead in glf-cifar, glf-mnist" and best[2] == ""
    )


def test_floors_and_memory(gpu) -> None:
    times = {
        ("linear", "linear-16384-32", "forward"): {"glf_fast": [5e-5]},
        ("flow", "throughput", "train, bf16"): {"glf_fast": [2e-5]},
        **{
            ("memory", f"memory-{steps}", "train"): {"glf_fast": [1.0], "glf_fast reversible": [1.0], "eager": [1.0]}
            for steps in (8, 64)
        },
    }
    found = gpu(times, {("linear-16384-32", "glf_fast"): 3e-5, ("throughput", "glf_fast"): 1.9e-5})
    for row in found.suite("memory"):
        row.info |= {"peak_bytes": 600 if row.provider == "eager" else 100}
        row.info["activation_bytes"] = 60 if row.case == "memory-64" else 50
    table = rows(found)
    floor = table["slogdet and inverse of 16,384 matrices, D 32: the floor"]
    assert floor[:5] == ["25% of the time", "20%", "**missed**", "33%", "reached"]
    assert table["B 65,536, train in bf16: the matrix units"][1:5] == ["50%", "reached", "53%", "reached"]
    assert table["peak memory of train at K = 64, B 4,096: eager"][:4] == ["5 ×", "6.00", "reached", "–"]
    flat = table["activations of train, reversible, K = 64 against 8"]
    assert flat[:3] == ["at most 1.1 ×", "1.20", "**missed**"]


def test_every_goal_is_of_what_the_two_calls_measure() -> None:
    """Its cases, ours and all with whom they are compared."""
    known: dict = {}
    for call in ("first", "second"):
        for _, races in on_gpu.races(call, None).values():
            for race in races:
                known.setdefault(race.key, set()).update(race.names)
    for goal in GPU:
        for side in (goal, goal.graphs):
            for key in side.keys if side else ():
                assert {side.ours, *side.against} <= known[key], (key, side)


def test_processors_have_no_such_table_and_the_overview_has_a_place_for_it(made) -> None:
    assert not list(gpu_goals([made({})]))
    marks = "".join(
        f"<!-- begin: python -m bench.report --docs: {name} -->\n<!-- end -->\n"
        for name in ("goals", "goals of GPUs", "worth a GPU")
    )
    text = with_tables(marks, [made({}, gpu="H200")])
    assert "**H200**; commit abc" in text and f"| {NOT_MEASURED} |" in text


def test_every_prediction_stands_beside_what_was_measured(gpu) -> None:
    measured = {("flow", "glf-mnist", "train, tf32"): {"glf_fast": [5e-4], "eager": [4e-3]}}
    lines = list(predictions.predictions(gpu(measured, {("glf-mnist", "glf_fast"): 2.9e-4})))
    made = json.loads(predictions.FILE.read_text())["rows"]
    assert len([line for line in lines if line.startswith("| ")]) == 1 + sum(
        ("kernels_us" in row) + ("call_us" in row) for row in made
    )
    assert "| glf-mnist, train, tf32 | glf_fast | kernels | 104 µs | 290 µs | 2.79 |" in lines
    assert "| glf-mnist, train, tf32 | glf_fast | call | 400 µs – 650 µs | 500 µs | 1.00 |" in lines
    assert f"| sbi, train, tf32 | glf_fast | kernels | 81 µs | {NOT_MEASURED} |  |" in lines


def test_only_what_is_measured_is_predicted(made) -> None:
    assert not list(predictions.predictions(made({})))
    keys = {r.key for c in ("first", "second") for _, g in on_gpu.races(c, None).values() for r in g}
    for row in json.loads(predictions.FILE.read_text())["rows"]:
        assert (row["suite"], row["case"], row["mode"]) in keys
        assert all(least <= most for name in ("kernels_us", "call_us") for least, most in [row.get(name, (0, 0))])


def test_the_page_names_the_launch_table(made) -> None:
    found = made({}, gpu="H100", launch_table={"90": "measured on NVIDIA H100"})
    assert "Launches of the flow kernels: sm_90: measured on NVIDIA H100." in list(page(found))
