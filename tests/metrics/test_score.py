import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from glf_fast import metrics
from glf_fast.errors import UserError
from glf_fast.metrics.reference import all_features

Make = Callable[..., torch.Tensor]


def statistics_files(cache: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (cache / "stats").glob("*")}


@pytest.fixture
def reference(dataset, tiny, private_cache) -> metrics.Reference:
    return metrics.reference(dataset("train", 1000, 0), dataset("test", 400, 1), tiny, n=400)


def test_a_score_tells_good_from_bad_and_says_what_it_is(reference, dataset, tiny, blobs: Make) -> None:
    good = metrics.score(blobs(400, 5), reference, tiny, seed=5, sampling={"temperature": 0.8})
    bad = metrics.score(blobs(400, 5, level=200), reference, tiny, seed=5)
    low, high = good["interval"]
    assert low <= good["value"] <= high
    assert good["value"] < 2 and bad["value"] > 10  # the floors for 400 images lie between 0.2 and 1.2
    assert abs(good["kid"]["mean"]) < good["kid"]["std"] and bad["kid"]["mean"] > 2 * bad["kid"]["std"]
    assert good["precision"] > 0.7 and good["recall"] > 0.7 and bad["precision"] < 0.5 * good["precision"]
    assert good["metric"] == "FD[tiny]" and good["notes"] == []
    assert good["floors"].keys() == {"train/train", "train/test"} and min(good["floors"].values()) > 0

    protocol = json.loads(json.dumps(good, allow_nan=False))["protocol"]
    assert protocol["extractor"] == tiny.identity
    assert protocol["n"] == 400 and protocol["seed"] == 5 and protocol["sampling"] == {"temperature": 0.8}
    assert protocol["image_shape"] == [1, 28, 28] and protocol["quantisation"] == "uint8"
    assert protocol["floors"] == {"train/train": [400, 400], "train/test": [400, 400]}
    fingerprint = dataset("test", 400, 1).fingerprint
    named = {key: protocol["reference"][key] for key in ("name", "split", "n", "fingerprint")}
    assert named == {"name": "blobs", "split": "test", "n": 400, "fingerprint": fingerprint}

    line = metrics.summary(good)
    assert line.startswith("FD[tiny] ") and "\n" not in line
    assert all(part in line for part in ("95 %", "KID", "precision", "recall", "train/test"))


def test_the_number_is_the_same_for_any_batch_size(reference, tiny, blobs: Make) -> None:
    images = blobs(1100, 7)
    results = [
        metrics.score(samples, reference, tiny)
        for samples in (images, images.split(17), iter(images.split(256)), [images[:1], images[1:]])
    ]
    assert all(result == results[0] for result in results)


def test_few_samples_are_scored_with_a_note(reference, tiny, blobs: Make) -> None:
    few = metrics.score(blobs(30, 5), reference, tiny)
    assert few["interval"] is None and few["value"] > 0
    assert 0 <= few["precision"] <= 1 and "30 features of either set" in few["protocol"]["precision and recall"]
    assert any("30 samples for 128 features" in note and "exact path" in note for note in few["notes"])
    assert any("are for 400 images, but this score is for 30 images" in note for note in few["notes"])
    assert "95 %" not in metrics.summary(few)
    for images in (blobs(1, 5), []):
        with pytest.raises(UserError, match="at least two feature vectors"):
            metrics.score(images, reference, tiny)


def test_what_cannot_be_scored(reference, tiny, blobs: Make, vgg16_weights: Path) -> None:
    with pytest.raises(UserError, match=r"uint8 images, got torch.float32"):
        metrics.score(blobs(10, 0).float() / 255, reference, tiny)
    other = metrics.extractor("vgg16-relu2_2", weights=vgg16_weights)
    with pytest.raises(UserError, match=r"different extractors.*'vgg16-relu2_2' and 'tiny'"):
        metrics.score(blobs(10, 0), reference, other)


def test_reference_statistics_are_computed_once(dataset, tiny, private_cache: Path, capsys) -> None:
    train, test = dataset("train", 300, 0), dataset("test", 100, 1)
    first = metrics.reference(train, test, tiny, n=200)
    assert capsys.readouterr().err.count("computing the features") == 3
    files = statistics_files(private_cache)
    assert len(files) == 3
    second = metrics.reference(train, test, tiny, n=200)
    assert capsys.readouterr().err == ""
    assert statistics_files(private_cache) == files
    assert second.floors == first.floors and second.protocol == first.protocol
    assert first.protocol["floors"] == {"train/train": [150, 150], "train/test": [150, 100]}


def test_the_protocol_tells_what_was_left_out(dataset, tiny, private_cache: Path) -> None:
    left_out = [f"as they are; {number} unusable files left out" for number in (3, 2)]
    train, test = (
        replace(dataset(split, 20, seed), policy=policy)
        for seed, (split, policy) in enumerate(zip(("train", "test"), left_out, strict=True))
    )
    protocol = metrics.score(dataset("test", 10, 2).images, metrics.reference(train, test, tiny, n=10), tiny)[
        "protocol"
    ]
    assert [protocol["training_policy"], protocol["reference"]["policy"]] == left_out


def test_the_cache_key_is_the_content(dataset, tiny, vgg16_weights: Path, private_cache: Path) -> None:
    some = dataset("test", 50, 0)
    metrics.dataset_stats(some, tiny)
    for count, (other, extractor, n) in enumerate(
        [
            (dataset("test", 50, 1), tiny, None),
            (some, tiny, 20),
            (some, metrics.extractor("vgg16-relu2_2", weights=vgg16_weights), None),
        ],
        start=2,
    ):
        metrics.dataset_stats(other, extractor, n=n)
        assert len(statistics_files(private_cache)) == count


def test_all_features_are_computed_once(dataset, tiny, private_cache: Path, capsys) -> None:
    images = dataset("train", 60, 0).images
    first = all_features(images, tiny)
    assert torch.equal(first, tiny(images)) and "60 images of the training set" in capsys.readouterr().err
    files = statistics_files(private_cache)
    assert torch.equal(all_features(images.clone(), tiny), first)
    assert statistics_files(private_cache) == files and capsys.readouterr().err == ""
    other = images.flip(0)  # the order belongs to the content
    assert torch.equal(all_features(other, tiny), first.flip(0))


def test_parts_are_disjoint_and_random(dataset, tiny, private_cache: Path) -> None:
    some = dataset("train", 100, 0)
    whole = metrics.dataset_stats(some, tiny)
    first, second = (metrics.dataset_stats(some, tiny, n=50, part=part) for part in (0, 1))
    first.merge(second)
    torch.testing.assert_close(first.mean, whole.mean)
    torch.testing.assert_close(first.cov, whole.cov)
    assert torch.equal(first.kept, whole.kept)  # the same order for the whole set and a part
    assert not torch.equal(whole.kept, tiny(some.images))  # and not the order of the files


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: b"",
        lambda data: b"\x00" * len(data),
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),  # one bit of one feature
    ],
)
def test_a_damaged_cache_file_is_computed_again(dataset, tiny, private_cache: Path, capsys, damage) -> None:
    some = dataset("test", 50, 0)
    before = metrics.dataset_stats(some, tiny)
    (path,) = (private_cache / "stats").glob("*")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    capsys.readouterr()
    after = metrics.dataset_stats(some, tiny)
    (notice, _) = capsys.readouterr().err.splitlines()
    assert path.name in notice and "computing" in notice
    assert torch.equal(after.cov, before.cov) and path.read_bytes() == good


def test_a_cache_file_under_the_name_of_another_is_computed_again(dataset, tiny, private_cache: Path, capsys) -> None:
    some = dataset("test", 50, 0)
    others = [(dataset("train", 50, 0), 0), (dataset("test", 50, 1), 0), (some, 1)]
    before = metrics.dataset_stats(some, tiny, n=25)
    (path,) = (private_cache / "stats").glob("*")
    for other, part in others:
        metrics.dataset_stats(other, tiny, n=25, part=part)
        (wrong,) = set((private_cache / "stats").glob("*")) - {path}
        wrong.replace(path)
        capsys.readouterr()
        assert torch.equal(metrics.dataset_stats(some, tiny, n=25).cov, before.cov)
        assert f"{path} holds other statistics than its name says" in capsys.readouterr().err


def test_an_unwritable_cache_costs_time_only(dataset, tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GLF_FAST_CACHE", str(tmp_path / "file"))
    assert metrics.dataset_stats(dataset("test", 50, 0), tiny).n == 50
    assert "could not be cached" in capsys.readouterr().err


def test_a_reference_needs_images(dataset, tiny, private_cache: Path) -> None:
    with pytest.raises(UserError, match="got n=100, 1 of blobs:test and 300 of blobs:train"):
        metrics.reference(dataset("train", 300, 0), dataset("test", 1, 0), tiny, n=100)
