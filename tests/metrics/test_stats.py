import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from glf_fast.errors import UserError
from glf_fast.metrics import FeatureStats


def features(n: int, dim: int = 5, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator) @ torch.randn(dim, dim, generator=generator)


def seen(x: torch.Tensor, **options: object) -> FeatureStats:
    stats = FeatureStats(x.shape[1], **options)
    stats.update(x)
    return stats


def assert_same(a: FeatureStats, b: FeatureStats) -> None:
    assert a.n == b.n
    torch.testing.assert_close(a.mean, b.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.cov, b.cov, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_stream_gives_mean_and_covariance(offset: float) -> None:
    """With this offset, sums of squares in float64 keep 4 digits of the covariance; centred moments keep all."""
    x = features(103).double() + offset
    stats = FeatureStats(5)
    for batch in x.split(10):
        stats.update(batch)
    assert stats.n == 103
    assert stats.mean.dtype == stats.cov.dtype == torch.float64
    exact = x.numpy().astype(np.longdouble)
    centred = exact - exact.mean(0)
    np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(stats.cov, (centred.T @ centred / 102).astype(float), rtol=1e-9 if offset else 1e-12)


def test_merge_equals_one_stream_and_without_undoes_it() -> None:
    x = features(100)
    merged, part = seen(x[:30], keep=100), seen(x[30:], keep=100)
    merged.merge(part)
    merged.merge(FeatureStats(5))
    assert_same(merged, seen(x))
    assert torch.equal(merged.kept, x)
    assert_same(merged.without(part), seen(x[:30]))


def test_the_first_features_are_kept_in_order() -> None:
    x = features(50)
    stats = FeatureStats(5, keep=20)
    for batch in x.split(7):
        stats.update(batch)
    assert torch.equal(stats.kept, x[:20]) and not stats.complete
    assert seen(x, keep=50).complete
    # No features are kept after a gap, because they would not be "the first".
    short = seen(x[:10], keep=100)
    short.merge(seen(x[10:30], keep=5))
    short.update(x[30:])
    assert torch.equal(short.kept, x[:15]) and short.n == 50 and not short.complete


def test_kept_features_are_copies() -> None:
    x = features(10)
    stats = seen(x, keep=10)
    kept = stats.kept.clone()
    x.zero_()
    assert torch.equal(stats.kept, kept)


def test_root_factors_the_covariance_and_is_renewed() -> None:
    stats = seen(features(100))
    torch.testing.assert_close(stats.root().T @ stats.root(), stats.cov)
    stats.update(features(50, seed=1) * 3)
    torch.testing.assert_close(stats.root().T @ stats.root(), stats.cov)
    few = seen(features(4), keep=4)
    assert few.factor().shape == (4, 5)
    torch.testing.assert_close(few.factor().T @ few.factor(), few.cov)


def test_save_and_load_keep_every_bit(tmp_path) -> None:
    stats = seen(features(100), keep=30, extractor={"name": "x", "dim": 5}, source={"name": "set", "split": "test"})
    stats.root()
    stats.save(tmp_path / "a" / "stats.safetensors")
    loaded = FeatureStats.load(tmp_path / "a" / "stats.safetensors")
    assert (loaded.n, loaded.keep, loaded.extractor, loaded.source) == (100, 30, stats.extractor, stats.source)
    for mine, theirs in ((loaded.mean, stats.mean), (loaded.cov, stats.cov), (loaded.kept, stats.kept)):
        assert torch.equal(mine, theirs)
    assert loaded._root is not None and torch.equal(loaded.root(), stats.root())
    loaded.update(features(3))
    assert loaded.n == 103 and len(loaded.kept) == 30


def test_damaged_and_foreign_files_are_named(tmp_path) -> None:
    path = tmp_path / "stats.safetensors"
    with pytest.raises(FileNotFoundError, match=r"stats\.safetensors.*glf_fast\.metrics ref"):
        FeatureStats.load(path)
    seen(features(10)).save(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"stats\.safetensors is damaged"):
        FeatureStats.load(path)
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(UserError, match=r"stats\.safetensors is damaged or holds no feature statistics"):
        FeatureStats.load(path)
    seen(features(180)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'\\"n\\": 180', b'\\"n\\": 181'))
    assert path.read_bytes() != whole
    with pytest.raises(UserError, match="its checksum differs"):
        FeatureStats.load(path)


@pytest.mark.parametrize("header", ["3", "null", '"x"', "[]", "{}"])
def test_a_header_of_another_kind_is_damage(header: str, tmp_path) -> None:
    path = tmp_path / "stats.safetensors"
    save_file({"mean": torch.zeros(3)}, path, {"glf_fast.FeatureStats 2": header})
    with pytest.raises(UserError, match=r"stats\.safetensors is damaged or holds no feature statistics"):
        FeatureStats.load(path)


def test_no_damaged_byte_is_taken(tmp_path) -> None:
    path = tmp_path / "stats.safetensors"
    seen(features(10), extractor={"name": "x"}, source={"n": 10}).save(path)
    whole, mean = path.read_bytes(), FeatureStats.load(path).mean
    for position in range(0, len(whole), 3):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        try:
            loaded = FeatureStats.load(path)
        except UserError:
            continue
        assert torch.equal(loaded.mean, mean) and loaded.n == 10, position  # white space of the header


@pytest.mark.parametrize(
    ("cov", "message"),
    [(-torch.eye(3), "negative eigenvalue -1"), (torch.eye(3) + torch.eye(3).roll(1, 0).triu(), "not symmetric")],
)
def test_what_is_no_covariance_is_refused(cov: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureStats.from_moments(torch.zeros(3), cov, 5)
    assert FeatureStats.from_moments(torch.zeros(3), torch.ones(3, 3), 5).n == 5  # singular, with rounding below zero


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_refused(tmp_path, value: float) -> None:
    good, bad = torch.eye(3), torch.full((3,), value)
    for mean, cov in ((bad, good), (good[0], good * value)):
        with pytest.raises(UserError, match="mean or the covariance contains NaN or infinity"):
            FeatureStats.from_moments(mean, cov, 5)
    stats = seen(features(10))
    stats._mean[0] = value
    stats.save(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors: the mean or the covariance contains NaN"):
        FeatureStats.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(5), r"shape \(batch, 5\), got \(5,\)"),
        (torch.zeros(3, 4), r"shape \(batch, 5\), got \(3, 4\)"),
        (torch.zeros(3, 5, 1), r"got \(3, 5, 1\)"),
        (torch.zeros(3, 5, dtype=torch.long), "floating point, got torch.int64"),
        (
            torch.tensor([[0.0] * 5, [float("nan")] * 5]),
            "NaN or infinity .first in row 1 of this batch, after 10 finite features",
        ),
        (torch.full((1, 5), float("inf")), "NaN or infinity"),
    ],
)
def test_bad_features_are_refused_and_leave_no_trace(bad: torch.Tensor, message: str) -> None:
    stats = seen(features(10))
    before = stats.cov
    with pytest.raises(ValueError, match=message):
        stats.update(bad)
    assert stats.n == 10 and torch.equal(stats.cov, before)


def test_fewer_than_two_have_no_covariance() -> None:
    stats = FeatureStats(5)
    stats.update(torch.zeros(0, 5))
    for n in (0, 1):
        with pytest.raises(UserError, match=f"at least two feature vectors, got {n}"):
            _ = stats.cov
        stats.update(torch.zeros(1, 5))
    assert stats.cov.abs().sum() == 0


def test_different_extractors_and_lengths_do_not_mix() -> None:
    a = seen(features(10), extractor={"name": "vgg16", "resize": "none"})
    with pytest.raises(UserError, match=r"different extractors.*resize 'none' and 'to 28'"):
        a.merge(seen(features(10), extractor={"name": "vgg16", "resize": "to 28"}))
    with pytest.raises(UserError, match=r"different lengths.*5 and 4"):
        a.merge(seen(features(10, dim=4)))
    a.merge(seen(features(10)))  # an unknown extractor may be merged
    assert a.n == 20


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        FeatureStats(0)
    with pytest.raises(ValueError, match=r"got \(3,\), \(3, 2\) and n=5"):
        FeatureStats.from_moments(torch.zeros(3), torch.zeros(3, 2), 5)


def test_all_reduce_over_two_processes(tmp_path) -> None:
    """Rank 1 has more features than rank 0 in one round and none in another; both end with the same statistics."""
    script = """
import sys, torch, torch.distributed as dist
from glf_fast.metrics import FeatureStats
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
for name, cut in (("uneven", 30), ("empty", 100)):
    stats = FeatureStats(5, keep=40, extractor={"name": "x"})
    stats.update((x[:cut], x[cut:])[rank])
    stats.all_reduce()
    stats.save(f"{folder}/{name}-{rank}.safetensors")
dist.destroy_process_group()
"""
    command = [sys.executable, "-c", script]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    for name, kept in (("uneven", torch.cat([x[:30], x[30:40]])), ("empty", x[:40])):
        first, second = (FeatureStats.load(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1))
        assert_same(first, seen(x))
        assert torch.equal(first.cov, second.cov) and torch.equal(first.mean, second.mean)
        assert torch.equal(first.kept, kept) and torch.equal(second.kept, kept)


def test_all_reduce_without_processes_does_nothing() -> None:
    stats = seen(features(10))
    stats.all_reduce()
    assert stats.n == 10
