"""The GPU benchmark without a GPU: its parts rehearsed on a processor, and the clock's logic on a stand-in for torch.cuda."""

import functools
import math
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_layers, gpu_part, rehearsal, timing
from bench.cases import COUPLING_MODES
from bench.linear import Linear, LinearCase
from bench.plots import draw
from bench.report import kept_of
from bench.results import read
from bench.tables import page

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore:.*triangular_solve:UserWarning")  # nflows'
def test_rehearsed_parts_add_to_one_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_part, "clock", timing)  # restored afterwards: main sets it
    parts = ("large", "memory", "launches")
    for part in parts:
        monkeypatch.setattr(sys, "argv", ["bench.gpu", part, str(tmp_path), "--rehearse"])
        gpu.main()
    found = read(tmp_path / "gpu.json")
    assert all(": not measured: " in line for line in found.wrong) and found.machine["gpu"] == rehearsal.name()
    assert {(r.suite, r.mode) for r in found.results} >= {
        ("gpu_flow", "train, tf32"),
        ("gpu_flow", "log_prob, tf32"),
        ("memory", "train"),
        ("launches", "sample"),
    }
    with pytest.raises(ValueError, match="mean nothing"):
        kept_of([tmp_path / "gpu.json"])
    text = "\n".join(page(found))
    assert "### throughput, train, tf32" in text and "graph, cold L2" in text and "## Launches" in text


def test_a_row_that_fails_costs_itself_alone(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_part, "clock", timing)
    right = gpu.memory

    def sometimes(steps: int, name: str, *options):
        if name == "glf_fast reversible":
            raise RuntimeError("an illegal memory access was encountered")
        return right(steps, name, *options)

    monkeypatch.setattr(gpu, "memory", sometimes)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "memory", str(tmp_path), "--rehearse"])
    with pytest.raises(SystemExit, match="2 of the rows have no time"):
        gpu.main()
    found = read(tmp_path / "gpu.json")
    assert {r.provider for r in found.results} == {"glf_fast", "eager"}
    assert len(found.wrong) == 2 and "illegal memory access" in found.wrong[0]
    assert "Not timed:" in "\n".join(page(found))


def test_rows_of_another_commit_are_put_aside(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_part, "clock", timing)
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "memory", str(tmp_path), "--rehearse"])
    for commit in ("abc", "def"):
        monkeypatch.setenv("COMMIT", commit)
        gpu.main()
    assert read(tmp_path / "gpu-abc.json").machine["commit"] == "abc"
    assert len(read(tmp_path / "gpu.json").results) == len(read(tmp_path / "gpu-abc.json").results) == 6


@pytest.mark.parametrize("part", ["large", "large-bf16", "float32"])
def test_what_is_wrong_has_no_time(part: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_part, "clock", timing)
    monkeypatch.setattr(gpu.Provider, "why_wrong", lambda self, *_: "off by 1" if self.name == "eager" else "")
    monkeypatch.setattr(sys, "argv", ["bench.gpu", part, str(tmp_path), "--rehearse"])
    with pytest.raises(SystemExit):
        gpu.main()
    found = read(tmp_path / "gpu.json")
    assert {r.provider for r in found.results} == {"glf_fast"} and all("eager: " in line for line in found.wrong)


def test_every_part_has_a_time_and_every_row_a_name(tool) -> None:
    assert set(tool.PARTS) == set(gpu.PARTS) - {"warm"}
    for part, jobs in gpu.PARTS.items():
        keys = [job[:4] for job in jobs()]
        assert keys and len(keys) == len(set(keys)), part
    names = [step.name for step in tool.steps(ROOT / "out", ROOT / "nowhere", False)]
    assert len(names) == len(set(names)) and names.index("build") < names.index("tests") < names.index("bench-flow")


@pytest.mark.parametrize("part", ["linear", "layers", "coupling", "step"])
@pytest.mark.filterwarnings("ignore:.*triangular_solve:UserWarning")  # nflows'
def test_a_part_s_rows_are_measured_alike(part: str, tmp_path, monkeypatch, capsys) -> None:
    """Ratios are of calls for everybody; the kernels alone, from a graph, are beside them."""
    monkeypatch.setattr(gpu_part, "clock", timing)
    monkeypatch.setattr(gpu, "COMPILED", ())  # minutes
    monkeypatch.setattr(sys, "argv", ["bench.gpu", part, str(tmp_path), "--rehearse"])
    monkeypatch.setattr(rehearsal, "call_times", lambda work, seconds: (work(), ([3.0], 1.0))[1])
    monkeypatch.setattr(rehearsal.Graph, "times", lambda self, seconds, *, cold: [2.0])
    gpu.main()
    found = read(tmp_path / "gpu.json")
    rows = {(r.suite, r.mode, r.provider): r for r in found.results}
    assert {r.median for r in found.results} == {3.0}
    assert all(r.info["graph_cold"]["median"] == 2.0 for r in found.results if r.provider == "glf_fast")
    expected = {
        "linear": {("linear", "forward", "glf_fast"), ("linear", "forward", "torch.linalg")},
        "layers": {
            *(("assemble", mode, name) for mode in ("forward", "train") for name in gpu.OURS_AND_EAGER),
            *(("apply", mode, name) for mode in ("forward", "inverse", "train") for name in gpu.OURS_AND_EAGER),
            *(("linear", "train", name) for name in ("glf_fast", "torch.linalg")),
            *(("lu", "forward", name) for name in ("glf_fast", "torch.linalg")),
            ("linear", "forward", "torch.linalg, graphed"),
        },
        "coupling": {("coupling", mode, name) for mode in COUPLING_MODES for name in gpu.OURS_AND_EAGER},
        "step": {("gpu_flow", "step, tf32", name) for name in ("glf_fast", "eager", "graphed eager", "FrEIA")},
    }
    assert expected[part] <= rows.keys()
    figures = {path.stem for path in draw(found, tmp_path)}
    assert figures == {"linear": {"linear"}, "step": {"ratios"}}.get(part, set())
    text = "\n".join(page(found))
    assert ("graph, cold L2" if part == "step" else "glf_fast: kernels alone, cold L2") in text


def test_the_clock_is_looked_at_inside_a_row(tmp_path, monkeypatch, capsys) -> None:
    """What was measured of a row is kept, what was not is not begun."""
    monkeypatch.setattr(gpu_part, "clock", rehearsal)
    make = functools.partial(Linear, "glf_fast", LinearCase(3, 5))

    def late(work, seconds) -> tuple[list[float], float]:
        monkeypatch.setattr(gpu_part, "end", 0.0)
        return [3.0], 1.0

    monkeypatch.setattr(rehearsal, "call_times", late)
    row = gpu_layers.operation("linear", LinearCase(3, 5), "forward", "glf_fast", make)
    assert row.median == 3.0 and row.info["graph_failed"] == "out of time"
    with pytest.raises(gpu.OutOfTime):
        gpu_layers.operation("linear", LinearCase(3, 5), "forward", "glf_fast", make)
    monkeypatch.setattr(gpu_part, "end", math.inf)  # main sets it
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "linear", str(tmp_path), "--seconds", "0", "--rehearse"])
    gpu.main()
    assert "out of time" in capsys.readouterr().out and not (tmp_path / "gpu.json").exists()


def test_memory_and_launches_of_what_is_wrong_are_none(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_part, "clock", timing)
    monkeypatch.setattr(gpu, "wrong_gradients", lambda *_: "result 1 is off by 1.0e-01")
    monkeypatch.setattr(gpu.Provider, "why_wrong", lambda self, *_: "off by 1" if self.name == "eager" else "")
    for part in ("memory", "launches"):
        monkeypatch.setattr(sys, "argv", ["bench.gpu", part, str(tmp_path), "--rehearse"])
        with pytest.raises(SystemExit):
            gpu.main()
    found = read(tmp_path / "gpu.json")
    assert not found.suite("memory") and "eager" not in {r.provider for r in found.suite("launches")}


def test_what_the_tests_said_stands_above_the_numbers(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_part, "clock", timing)
    monkeypatch.setenv("TESTS", "failed with 1")
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "memory", str(tmp_path), "--rehearse"])
    gpu.main()
    assert "The tests before it: failed with 1. **Not green: speed on a red test is none.**" in list(
        page(read(tmp_path / "gpu.json"))
    )


def test_the_tool_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "tools/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "--rehearse" in done.stderr


# -- the clock on a stand-in -----------------------------------------------------------------------------------------------


class Stand:
    """torch.cuda where a pass takes 2 ms, reading the waste 7 ms, and nothing else any time."""

    def __init__(self) -> None:
        self.now, self.recording = 0.0, None
        self.allocated = self.peak = 100

    def kernel(self, milliseconds: float) -> None:
        if self.recording is None:
            self.now += milliseconds
        else:
            self.recording.append(milliseconds)


@pytest.fixture
def stand(monkeypatch) -> Stand:
    """In the place of torch.cuda, for `timing` alone."""
    stand = Stand()

    class Stream:
        def wait_stream(self, other) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = stand.now

        def elapsed_time(self, other) -> float:
            return other.at - self.at

    class CUDAGraph:
        kernels: list[float]

        def replay(self) -> None:
            stand.now += sum(self.kernels)

    class capture:
        def __init__(self, graph: CUDAGraph) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            stand.recording = []

        def __exit__(self, *error) -> None:
            self.graph.kernels, stand.recording = stand.recording, None

    class Waste:
        def sum(self) -> None:
            stand.kernel(7.0)

    real = types.SimpleNamespace(
        **{name: getattr(torch.cuda, name) for name in ("CUDAGraph", "graph", "Event", "Stream")}
    )
    assert all(vars(real).values())  # what the stand-in stands for is there, in this version too
    cuda = types.SimpleNamespace(
        Stream=Stream,
        Event=Event,
        CUDAGraph=CUDAGraph,
        graph=capture,
        stream=lambda stream: stream,
        current_stream=Stream,
        synchronize=lambda: None,
        memory_allocated=lambda: stand.allocated,
        max_memory_allocated=lambda: stand.peak,
        reset_peak_memory_stats=lambda: setattr(stand, "peak", stand.allocated),
        get_device_properties=lambda index: types.SimpleNamespace(L2_cache_size=50_000_000),
        get_device_name=lambda: "stand-in",
    )

    class profile:
        def __init__(self, activities) -> None:
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error) -> None: ...

        def events(self) -> list[types.SimpleNamespace]:
            kinds = torch.autograd.DeviceType
            return [types.SimpleNamespace(device_type=kind) for kind in (kinds.CUDA, kinds.CPU, kinds.CUDA)]

    profiler = types.SimpleNamespace(profile=profile, ProfilerActivity=torch.profiler.ProfilerActivity)
    monkeypatch.setattr(timing, "torch", types.SimpleNamespace(cuda=cuda, profiler=profiler, autograd=torch.autograd))
    monkeypatch.setattr(timing, "_waste", Waste)
    return stand


def test_names_of_torch_cuda_that_the_clock_uses_exist() -> None:
    for name in (
        "current_stream", "get_device_name", "get_device_properties", "max_memory_allocated", "memory_allocated",
        "reset_peak_memory_stats", "stream", "synchronize",
    ):  # fmt: skip
        assert callable(getattr(torch.cuda, name))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(2).sum()
    assert {event.device_type for event in profile.events()} == {torch.autograd.DeviceType.CPU}


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_graph_s_time_is_that_of_one_pass(copies: int, cold: bool, stand) -> None:
    graph = timing.Graph(*[lambda: stand.kernel(2.0)] * copies)
    assert len(graph.results) == copies
    times = graph.times(0.0, cold=cold)
    assert len(times) == 5 and times == pytest.approx([2e-3] * 5)


def test_large_passes_are_not_enqueued_for_minutes(stand, monkeypatch) -> None:
    """The host enqueues far faster than the GPU works: a pass of 100 ms may not be replayed ten times twenty times over."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        timing.time, "perf_counter", lambda: 0.1 * next(ticks)
    )  # a replay, between two looks, takes 100 ms
    waits = []
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: waits.append(stand.now))
    graph = timing.Graph(lambda: stand.kernel(100.0))
    before = stand.now
    assert timing.Graph.times(graph, 0.0, cold=False) == pytest.approx([0.1] * 5)
    assert stand.now - before < 5 * (2 * 100 + timing.BUSY * 7) + 200  # milliseconds: one replay a measurement, not ten
    assert len(waits) >= 5


def test_calls_memory_and_launches(stand) -> None:
    def work() -> None:
        stand.peak = max(stand.peak, stand.allocated + 64)

    times, host = timing.call_times(work, 0.0)
    assert len(times) == 5 and 0 <= host <= max(times)
    assert timing.peak_memory(work) == 64
    assert timing.rotations(40_000_000) == 4
    assert timing.rotations(1024) == timing.COPIES  # 146,485 launches would take minutes to capture
    assert timing.launches(work) == 2
