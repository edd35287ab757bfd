"""The GPU benchmark without a GPU: its groups rehearsed on a processor, and what becomes of rows that fail."""

import contextlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import forked
import pytest
import torch

from bench import accelerated, flows, gpu, memory, on_gpu, rehearsal
from bench.cases import COUPLING_MODES, FlowCase
from bench.gpu_record import Record
from bench.memory import MemoryCase
from bench.on_gpu import FIRST, GROUPS, OURS_AND_EAGER, SECOND, WITH_GRAPHS
from bench.plots import draw
from bench.projects import PROJECTS, Project
from bench.race import GRAPHED, Calls, Clock, Job, Provider, Race, graphed
from bench.report import kept_of
from bench.results import Results, merge, read
from bench.tables import page

ROOT = Path(__file__).parents[2]


@pytest.fixture
def rehearse(tmp_path, monkeypatch) -> Callable[..., Results]:
    """Run groups or a call of bench.gpu in this process, and read what it wrote; `exits`: with what it must end."""

    def run(*whats: str, options: tuple[str, ...] = (), exits: str = "") -> Results:
        for what in whats:
            monkeypatch.setattr(sys, "argv", ["bench.gpu", what, str(tmp_path), "--rehearse", *options])
            with pytest.raises(SystemExit, match=exits) if exits else contextlib.nullcontext():
                gpu.main()
        return read(tmp_path / "gpu.json")

    return run


@pytest.mark.filterwarnings("ignore:.*triangular_solve:UserWarning")  # nflows'
def test_groups_add_to_one_file_and_become_tables(tmp_path, rehearse) -> None:
    found = rehearse("large", "launches")
    assert all(": not measured: " in line for line in found.wrong) and found.machine["gpu"] == rehearsal.name()
    assert {(r.suite, r.mode) for r in found.results} >= {
        ("flow", "train, tf32"),
        ("flow", "log_prob, bf16"),
        ("memory", "train"),
        ("launches", "sample"),
    }
    with pytest.raises(ValueError, match="mean nothing"):
        kept_of([tmp_path / "gpu.json"])
    text = "\n".join(page(found))
    assert "### throughput, train, tf32" in text and "graph, cold L2" in text and "## Launches" in text
    assert not (tmp_path / "gpu.begun").exists()


def test_a_row_that_fails_costs_itself_alone(monkeypatch, rehearse) -> None:
    right = memory.measure

    def sometimes(backend: str, reversible: bool, case: MemoryCase, clock: Clock) -> Job:
        if reversible:
            raise RuntimeError("out of memory")
        job = right(backend, reversible, case, clock)
        return while_timed(job, lambda: 1 / 0) if backend == "reference" else job

    monkeypatch.setattr(memory, "measure", sometimes)
    found = rehearse("memory-more", exits="2 of the rows have no time")
    assert {r.provider for r in found.results} == {"glf_fast"}
    assert len(found.wrong) == 2 and "out of memory" in found.wrong[0] and "ZeroDivisionError" in found.wrong[1]
    assert "Not timed:" in "\n".join(page(found))


def while_timed(job: Job, fail: Callable[[], object]) -> Job:
    """A job that is right when it is checked, and fails from its second call on."""
    calls = iter([job.call])
    job.call = lambda: next(calls, fail)()
    return job


def test_rows_of_another_commit_are_put_aside(tmp_path, monkeypatch, rehearse) -> None:
    for commit in ("abc", "def"):
        monkeypatch.setenv("COMMIT", commit)
        rehearse("memory-more")
    assert read(tmp_path / "gpu-abc.json").machine["commit"] == "abc"
    assert len(read(tmp_path / "gpu.json").results) == len(read(tmp_path / "gpu-abc.json").results) == 3


@pytest.mark.parametrize("group", ["wide", "float32"])
def test_what_is_wrong_has_no_time(group: str, monkeypatch, rehearse) -> None:
    right = flows.Flow.results

    def wrong(self: flows.Flow, mode: str, out: torch.Tensor) -> list[torch.Tensor]:
        return [t * 2 if self.backend == "reference" else t for t in right(self, mode, out)]

    monkeypatch.setattr(flows.Flow, "results", wrong)
    found = rehearse(group, exits="have no time")
    assert {r.provider for r in found.results} == {"glf_fast"} and all("eager: " in line for line in found.wrong)


@pytest.mark.parametrize("group", ["memory-more", "launches", "linear", "coupling"])
def test_nothing_of_what_is_wrong_is_timed(group: str, monkeypatch, rehearse) -> None:
    monkeypatch.setattr(Job, "why_wrong", lambda self: "off by 1")
    found = rehearse(group, exits="have no time")
    assert not found.results and all("off by" in line or "not measured" in line for line in found.wrong)


def test_every_race_has_a_name_of_its_own_and_a_place_in_a_call() -> None:
    for group, make in GROUPS.items():
        assert len(rows := named(make())) == len(set(rows)) > 0, group
    assert {*FIRST, *SECOND} == GROUPS.keys() - {"warm"} | {"cut"}
    assert sum(share for share, _ in on_gpu.races("second", None).values()) == pytest.approx(1)
    rows = named(race for _, races in on_gpu.races("first", None).values() for race in races)
    assert len(rows) == len(set(rows))


def named(races: Iterable[Race]) -> list[tuple[str, str, str, str]]:
    """Rows of races."""
    return [(*race.key, name) for race in races for name in race.names]


@pytest.mark.parametrize("group", ["linear", "layers", "coupling", "step"])
def test_rows_are_measured_alike(group: str, tmp_path, monkeypatch, rehearse) -> None:
    """Ratios are of calls for everybody; the kernels alone, from a graph, are beside them."""
    timings = Calls([3.0], 1.0)
    monkeypatch.setattr(rehearsal, "call_times", lambda works, seconds: dict.fromkeys(works, timings))
    monkeypatch.setattr(rehearsal, "kernel_times", lambda works: {"cold": [2.0]})
    found = rehearse(group)
    rows = {(r.suite, r.mode, r.provider): r for r in found.results}
    assert {r.median for r in found.results} == {3.0} and {r.info["host_s"] for r in found.results} == {1.0}
    assert all(r.info["graph_cold"]["median"] == 2.0 for r in found.results if r.provider == "glf_fast")
    assert not any("graph_cold" in r.info for r in found.results if r.provider.endswith(GRAPHED))
    graphs = [f"{name}{how}" for name in ("glf_fast", "torch.linalg") for how in ("", GRAPHED)]
    expected = {
        "linear": {("linear", "forward", name) for name in graphs},
        "layers": {
            *(("assemble", mode, name) for mode in ("forward", "train") for name in OURS_AND_EAGER),
            *(("apply", mode, name) for mode in COUPLING_MODES for name in (*OURS_AND_EAGER, "conv2d")),
            *(("linear", "train", name) for name in ("glf_fast", "torch.linalg")),
        },
        "coupling": {("coupling", mode, name) for mode in COUPLING_MODES for name in OURS_AND_EAGER},
        "step": {("flow", "step, tf32", name) for name in (flows.GRAPHED_STEP, *WITH_GRAPHS)},
    }
    assert expected[group] == rows.keys()
    figures = {path.stem for path in draw(found, tmp_path)}
    assert figures == {"linear": {"linear"}, "step": {"ratios"}}.get(group, set())


def test_flows_of_projects_are_measured_before_and_after(tmp_path, monkeypatch, rehearse) -> None:
    found = rehearse("projects")
    assert not found.wrong
    names = {case for _, case, _ in found.groups()}
    assert len(names) == 3 and names < {*accelerated.PROJECTS} <= PROJECTS.keys()
    for (suite, case, _), rows in found.groups().items():
        assert suite == "projects" and {*rows} == {"original", "glf_fast"}
        assert {*rows["glf_fast"].info["into"]} > {"left"} and rows["glf_fast"].info["batch"] == 8, case
    assert {mode for _, _, mode in found.groups()} == {*accelerated.MODES}
    assert "Flows of public projects" in "\n".join(page(found))


def test_a_project_with_another_density_has_no_time(monkeypatch, rehearse) -> None:
    right = Project.log_prob

    def wrong(self: Project, flow: torch.nn.Module, x: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        return right(self, flow, x, context) * (2 if x.dtype == torch.float32 else 1)

    monkeypatch.setattr(Project, "log_prob", wrong)
    found = rehearse("projects", exits="have no time")
    assert {r.mode for r in found.results} == {"sample"} and all("is off by" in line for line in found.wrong)


def test_a_machine_without_a_library_measures_no_projects(monkeypatch, rehearse) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = rehearse("projects")
    assert not found.results and all("normflows is not installed" in line for line in found.wrong)


# -- graphs of whole calls -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["log_prob", "sample", "train", "step"])
@pytest.mark.parametrize("name", OURS_AND_EAGER)
def test_a_replayed_call_uses_what_it_is_given_and_is_checked(name: str, mode: str) -> None:
    case = FlowCase("tiny", 5, (16, 16), 2, 10, context_dim=3)
    made = graphed(flows.PROVIDERS[name]).job(case, mode, rehearsal)
    made.run()
    assert made.why_wrong() == ""
    other = flows.PROVIDERS[name].job(case, mode, rehearsal)
    inputs = [tuple(2 * t + 1 for t in job.inputs) for job in (made, other)]
    kept = [t.clone() for t in inputs[0]]
    results = []
    for job, given in zip((made, other), inputs, strict=True):
        torch.manual_seed(3)
        results.append(job.call(*given))
    torch.testing.assert_close(*results)
    assert all(map(torch.equal, inputs[0], kept))  # the caller's tensors are not written to
    made.inputs[-1].add_(1)  # the context
    assert "off by" in made.why_wrong()


# -- time, and processes that end ------------------------------------------------------------------------------------------


def test_a_group_that_takes_long_leaves_the_others_their_time(monkeypatch) -> None:
    """Races behind their group's end come last; what a group leaves is the next one's."""
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])

    def races(group: str) -> list[Race]:
        return [Race(group, MemoryCase(i), "", (), 0.0) for i in range(3)]

    order = []
    for race in gpu.in_order({"a": (0.2, races("a")), "b": (0.5, races("b")), "c": (0.3, races("c"))}, 0.0, 100.0):
        order.append(f"{race.suite}{race.case.steps}")
        now[0] += {"a": 15, "b": 5, "c": 5}[race.suite]
    assert order == ["a0", "a1", "b0", "b1", "b2", "c0", "c1", "c2", "a2"]


def test_nothing_is_begun_when_time_is_over(tmp_path, monkeypatch, capsys, rehearse) -> None:
    """Not within a race either: who has entered is timed, the others stay to be measured."""
    looks = iter([False, False, True, True, True])  # before the race, before its first provider, …
    with monkeypatch.context() as patch:
        patch.setattr(gpu.Run, "out_of_time", lambda self: next(looks))
        found = rehearse("memory-more")
    assert [r.provider for r in found.results] == ["glf_fast"] and not found.wrong
    race = next(iter(rehearsal.small(GROUPS["memory-more"]())))
    assert Record(tmp_path / "gpu.json", found.machine).untried(race) == ["glf_fast reversible", "eager"]
    (tmp_path / "gpu.json").unlink()
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "memory-more", str(tmp_path), "--seconds", "0", "--rehearse"])
    gpu.main()
    assert "out of time" in capsys.readouterr().out and not (tmp_path / "gpu.json").exists()


DYING = """
import os, signal, sys
from bench import gpu, memory
right = memory.measure
def dying(backend, reversible, case, clock):
    if reversible:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(backend, reversible, case, clock)
memory.measure = dying
sys.argv = ["bench.gpu", "memory-more", {folder!r}, "--rehearse"]
gpu.main()
"""


def test_a_process_that_died_is_taken_over_behind_what_it_died_of(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    for code in (-signal.SIGKILL, 0):
        done = forked.ended(forked.program, DYING.format(folder=str(tmp_path)))
        assert done.returncode == code, done.stderr
    found = read(tmp_path / "gpu.json")
    # The first was ready to be timed with it, and is in doubt, too.
    assert {r.provider for r in found.results} == {"eager"}
    assert [line.rpartition(": ")[0].rpartition(", ")[2] for line in found.wrong] == ["glf_fast", "glf_fast reversible"]
    assert all("the process ended while this was measured" in line for line in found.wrong)


def test_a_lost_gpu_ends_the_process_and_costs_whoever_lost_it_alone(monkeypatch, rehearse) -> None:
    """Before it is timed, while it is, and in a graph of its kernels: the others count, or the next process has them."""
    right, lost = memory.measure, [""]

    def access(*_: object) -> None:
        lost[0] = "yes"
        raise RuntimeError("an illegal memory access was encountered")

    def poisoned(backend: str, reversible: bool, case: MemoryCase, clock: Clock) -> Job:
        job = right(backend, reversible, case, clock)
        if reversible and culprit == "glf_fast reversible":
            access()
        return while_timed(job, access) if backend == "reference" and culprit == "eager" else job

    monkeypatch.setattr(memory, "measure", poisoned)
    monkeypatch.setattr(rehearsal, "alive", lambda: not lost[0])
    culprit = "glf_fast reversible"  # makes it before anything is timed
    assert not rehearse("memory-more", exits=str(gpu.LOST)).results
    lost[0], culprit = "", "eager"
    assert {r.provider for r in rehearse("memory-more", exits=str(gpu.LOST)).results} == {"glf_fast"}
    lost[0], culprit = "", ""
    monkeypatch.setattr(rehearsal, "kernel_times", access)
    found = rehearse("wide", exits=str(gpu.LOST))
    assert [r.info["graph_failed"] for r in found.suite("flow")] == ["an illegal memory access was encountered"] * 2
    assert len(found.suite("memory")) == 1 and len(found.wrong) == 2
    assert all("illegal memory access" in line for line in found.wrong)


def test_the_second_call_begins_with_what_the_first_has_no_time_of(tmp_path, monkeypatch, rehearse) -> None:
    before = rehearse("large", "linear")
    before.results = [r for r in before.results if (r.suite, r.provider) != ("memory", "eager")]
    cut = on_gpu.races("second", before, rehearsal.small)["cut"][1]
    rows = {(race.suite, name) for race in cut for name in race.names}
    assert ("memory", "eager") in rows and ("coupling", "glf_fast") in rows
    assert ("memory", "glf_fast") not in rows and not any(suite == "linear" for suite, _ in rows)
    assert on_gpu.races("second", None)["cut"][1] == []
    again = merge([read(tmp_path / "gpu.json"), read(tmp_path / "gpu.json")])  # two calls: a spread
    assert all(len(r.medians) == 2 for r in again.results)


def test_compilers_beside_the_tests_share_the_work(monkeypatch, rehearse) -> None:
    made = []

    def plain(name: str, case: FlowCase, mode: str, clock: Clock) -> Job:
        made.append((name, case.name, mode))
        return flows.PROVIDERS["eager"].job(case, mode, clock)

    for name in ("glf_fast", *flows.COMPILED):
        monkeypatch.setitem(flows.PROVIDERS, name, Provider(name, partial(plain, name)))
    for share in ("0/2", "1/2"):
        rehearse("warm", options=("--share", share))
    names, cases = ("glf_fast", "compile", "reduce-overhead"), [case.name for case in on_gpu.NAMED]
    planned = [(name, case, mode) for mode in on_gpu.FLOW_MODES for name in names for case in cases]
    assert made == planned[::2] + planned[1::2]


def test_what_the_tests_said_stands_above_the_numbers(monkeypatch, rehearse) -> None:
    monkeypatch.setenv("TESTS", "failed with 1")
    lines = list(page(rehearse("memory-more")))
    assert "The tests before it: failed with 1. **Tests failed: these times are not valid.**" in lines


def test_the_tool_without_a_gpu_says_so(monkeypatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "tools")
    done = forked.ended(forked.script, ROOT / "tools" / "gpu.py")
    assert done.returncode == 1 and "--rehearse" in done.stderr
