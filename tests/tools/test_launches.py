"""How launches are ranked, listed and written; what they take is test_compile_gate.py's, how fast they are a GPU's business."""

from dataclasses import replace

import launch_file
import pytest
from flow_candidates import FLOWS as TUNED
from flow_candidates import MOST, candidates, case, shared_limit, tuned_keys
from flow_costs import LATENCY, PORT, PROCESSORS, Cost, clocks, loop, program, shared_bytes
from shipped import FLOWS, OPERANDS, shipped, spline_constants
from tune_flow import FIRST, in_order

from glf_fast.kernels.launch_table import Launch, entries, key_for, keys


def test_a_loop_takes_as_long_as_its_arithmetic_where_that_hides_the_loads() -> None:
    n, moved = 100, 64 * PORT
    for work in (100.0, 1_000.0, 10_000.0):
        serial, *overlapped = (loop(n, moved, Cost(work), stages).clocks / n for stages in (2, 3, 4))
        assert serial == pytest.approx(work + LATENCY + 64, rel=0.02)
        assert overlapped == sorted(overlapped, reverse=True)
        for took, stages in zip(overlapped, (3, 4), strict=True):
            # Both bounds: never faster than the arithmetic or the port, and stages − 1 tiles on their way at once.
            assert took >= max(work, 64)
            assert took == pytest.approx(max(work, (work + LATENCY + 64) / (stages - 1)), rel=0.1)


def test_predictions_keep_what_the_arithmetic_fixes() -> None:
    flow = case("forward medium tf32 few")
    how = Launch(16, 64, 64, False, 8, 3)
    step = program(flow, how)
    # A program reads all weights of a step once: A, W₁, W₂, W₃.
    assert step.bytes == pytest.approx(4 * (64 * 64 + 32 * 256 + 256 * 256 + 256 * 64), rel=0.1)
    assert clocks(flow, how) >= flow.steps * step.bytes / PORT
    # Matrix units at their rate: 2 FLOP a multiply-add, 16 · 8 · 8 of them in 6.5 clocks of one of four units.
    assert step.units == pytest.approx(
        16 * (64 * 64 + 32 * 256 + 256 * 256 + 256 * 64) / (16 * 8 * 8) * 6.5 / 4, rel=0.01
    )
    # Full multiprocessors: twice the rows take twice as long.
    many = [clocks(replace(flow, rows=rows), how) for rows in (16 * PROCESSORS * 8, 16 * PROCESSORS * 16)]
    assert many[1] == pytest.approx(2 * many[0])


def test_candidates_fit_and_hold_what_was_found_by_hand() -> None:
    for arch in ("80", "90", "100"):
        for key in keys():
            found = candidates(key, arch)
            assert 12 <= len(found) <= MOST, (arch, key, len(found))
            assert len(set(found)) == len(found)
            assert sum(how.num_stages > 2 for how in found) >= 10, (arch, key)
            assert all(shared_bytes(case(key), how) <= shared_limit(key, how, arch) for how in found)
            if not key.startswith("forward"):
                assert all(how.staged for how in found)
    few, many = (
        shared_limit(f"forward medium tf32 {rows}", Launch(16, 64, 64, False, 4, 3), "90") for rows in ("few", "many")
    )
    assert few > 2 * many
    # Compiled by hand for sm_90: 127 and 232 registers, no spills (forward and backward of glf-cifar at 256 rows).
    assert Launch(16, 64, 32, False, 8, 3) in candidates("forward medium tf32 few", "90")
    assert Launch(16, 256, 32, True, 8, 4) in candidates("backward medium tf32 few", "90")


def test_the_table_has_all_keys_and_tuning_some() -> None:
    for arch in (80, 90, 100):
        assert {key for key, _ in entries(arch)} == set(keys())
        names = {spec.name for _, spec in shipped(arch)}  # what the compile gate compiles
        assert names >= set(keys()) and len(names) > (200 if arch == 90 else 80)
    assert set(tuned_keys()) < set(keys())
    assert len(set(tuned_keys())) == len(tuned_keys())


def test_the_named_flows_run_what_is_tuned() -> None:
    for dim, hidden, _, rows, bins in FLOWS.values():
        for backward in (False, True):
            for _, precision in OPERANDS.values():
                assert key_for(backward, dim, hidden, precision, rows, spline_constants(bins)) in tuned_keys()
    for size, few, many in (
        ("small", "glf-mnist", None),
        ("medium", "glf-cifar", "throughput"),
        ("large", None, "wide"),
    ):
        for name, at in ((few, 2), (many, 3)):
            if name:
                assert (*TUNED[size][:2], TUNED[size][at]) == (*FLOWS[name][:2], FLOWS[name][3])


def test_the_table_is_written_as_it_is_committed(tmp_path) -> None:
    launch_file.write(tmp_path / "table.json", launch_file.read())
    assert (tmp_path / "table.json").read_text() == launch_file.TABLE.read_text()


def test_every_launch_comes_up_once_and_the_promising_ones_of_all_keys_first() -> None:
    jobs = [(key, how) for key, launches in in_order("90") for how in launches]
    assert sorted(jobs) == sorted((key, how) for key in tuned_keys() for how in candidates(key, "90"))
    first = jobs[: FIRST * len(tuned_keys())]
    assert {(key, candidates(key, "90")[0]) for key in tuned_keys()} <= set(first)
