"""The clock of the GPU benchmark, on a stand-in for torch.cuda."""

import itertools
import types

import pytest
import torch

from bench import gpu_clock, rehearsal


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
    """In the place of torch.cuda, for `gpu_clock` alone."""
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
    monkeypatch.setattr(
        gpu_clock, "torch", types.SimpleNamespace(cuda=cuda, profiler=profiler, autograd=torch.autograd)
    )
    monkeypatch.setattr(gpu_clock, "_waste", Waste)
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
    graph = gpu_clock.Graph(*[lambda: stand.kernel(2.0)] * copies)
    assert len(graph.results) == copies
    times = graph.times(0.0, cold=cold)
    assert len(times) == 5 and times == pytest.approx([2e-3] * 5)


def test_large_passes_are_not_enqueued_for_minutes(stand, monkeypatch) -> None:
    """The host enqueues far faster than the GPU works: a pass of 100 ms may not be replayed ten times twenty times over."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        gpu_clock.time, "perf_counter", lambda: 0.1 * next(ticks)
    )  # a replay, between two looks, takes 100 ms
    waits = []
    monkeypatch.setattr(gpu_clock.torch.cuda, "synchronize", lambda: waits.append(stand.now))
    graph = gpu_clock.Graph(lambda: stand.kernel(100.0))
    before = stand.now
    assert gpu_clock.Graph.times(graph, 0.0, cold=False) == pytest.approx([0.1] * 5)
    assert (
        stand.now - before < 5 * (2 * 100 + gpu_clock.BUSY * 7) + 200
    )  # milliseconds: one replay a measurement, not ten
    assert len(waits) >= 5


def test_calls_memory_and_launches(stand) -> None:
    def work() -> None:
        stand.peak = max(stand.peak, stand.allocated + 64)

    times, host = gpu_clock.call_times({"work": work}, 0.0)["work"]
    assert len(times) == gpu_clock.LEAST and 0 <= host <= max(times)
    assert gpu_clock.peak_memory(work) == 64
    assert gpu_clock.rotations(40_000_000) == 4
    assert gpu_clock.rotations(1024) == gpu_clock.COPIES  # 146,485 launches would take minutes to capture
    assert gpu_clock.launches(work) == 2


def test_calls_are_timed_in_turn_and_a_failure_is_its_own(stand) -> None:
    order: list[str] = []

    def crash() -> None:
        order.append("crash")
        if order.count("crash") > 30:  # in the second burst or so
            raise RuntimeError("an illegal memory access was encountered")

    works = {"a": lambda: order.append("a"), "crash": crash, "b": lambda: order.append("b")}
    found = gpu_clock.call_times(works, 0.0)
    assert isinstance(found["crash"], RuntimeError) and list(found) == ["crash", "a", "b"]
    assert len(found["a"].seconds) == len(found["b"].seconds) == gpu_clock.LEAST
    turns = [name for name, _ in itertools.groupby(order) if name != "crash"]
    assert turns == ["a", "b"] * (1 + gpu_clock.LEAST)


def test_when_the_gpu_is_lost_the_others_keep_what_they_had(stand, monkeypatch) -> None:
    made: list[str] = []

    def access() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    def lose() -> None:
        made.append("b")
        if len(made) > 8:
            monkeypatch.setattr(gpu_clock.torch.cuda, "synchronize", access)
            access()

    found = gpu_clock.call_times({"a": lambda: None, "b": lose, "c": lambda: None}, 0.0)
    assert len(found["a"].seconds) == 1 and isinstance(found["b"], RuntimeError) and "c" not in found


def test_the_rehearsal_offers_what_the_clock_does() -> None:
    assert [name for name in rehearsal.__all__ if name != "small"] == gpu_clock.__all__


def test_a_matrix_rate_is_of_the_precision_it_names(stand, monkeypatch) -> None:
    """Whatever was measured before in the same process."""
    seen = []
    real = types.SimpleNamespace(
        **vars(gpu_clock.torch), bfloat16=torch.bfloat16, float32=torch.float32, randn=lambda *_, **__: torch.zeros(1),
        empty_like=torch.empty_like, get_float32_matmul_precision=torch.get_float32_matmul_precision,
        set_float32_matmul_precision=torch.set_float32_matmul_precision,
    )  # fmt: skip
    monkeypatch.setattr(gpu_clock, "torch", real)
    monkeypatch.setattr(gpu_clock, "_best", lambda work: seen.append(torch.get_float32_matmul_precision()) or 1.0)
    torch.set_float32_matmul_precision("high")
    gpu_clock.matrix_rate.cache_clear()
    assert gpu_clock.matrix_rate("highest") == 2 * 8192**3
    gpu_clock.matrix_rate.cache_clear()
    assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"


def test_a_gpu_that_does_not_answer_is_not_alive(stand, monkeypatch) -> None:
    assert gpu_clock.alive()

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_clock.torch.cuda, "synchronize", lost)
    assert not gpu_clock.alive()
