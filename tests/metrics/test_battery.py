"""The battery as a whole: one table of all scores with their anchors, from any batches, of any number of images."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from glf_fast import metrics
from glf_fast.data.color_mnist import PALETTE
from glf_fast.errors import UserError
from glf_fast.metrics import SCORES, ImageSet, score_table

Make = Callable[..., Tensor]
ALL = tuple(SCORES)


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A critic of a moment; what it can tell apart is tested by itself."""
    monkeypatch.setattr(score_table, "STEPS", 1)


def known(images: Tensor, extractors: list[metrics.Extractor], batch: int = 10**6) -> ImageSet:
    found = metrics.collect_all(images.split(batch), extractors)
    return ImageSet({e.name: s for e, s in zip(extractors, found, strict=True)}, images)


def by_name(numbers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {number["name"]: number for number in numbers}


def test_one_table_of_all_scores(tiny, blobs: Make) -> None:
    extractors = [tiny, metrics.extractor("tiny-mnist")]
    training = blobs(600, 0)
    test, train = (known(images, extractors) for images in (blobs(200, 1), training[:200]))
    samples = [known(images, extractors, batch=77) for images in (blobs(200, 2), training[200:400], blobs(200, 2, 250))]
    fresh, copies, bright = (by_name(metrics.battery(ALL, extractors, s, test, train, training)) for s in samples)

    features = (
        "FD",
        "KID",
        "precision",
        "recall",
        "F8",
        "F1/8",
        "density",
        "coverage",
        "closer than test",
        "distance / test",
    )
    classes = [f"{n}[{e.name}]" for e in extractors for n in ("IS", "modes hit", "KL to uniform", "KL to real")]
    assert set(fresh) == {*(f"{n}[tiny]" for n in features), *classes, "1 − MS-SSIM", "critic"}
    for number in json.loads(json.dumps(list(fresh.values()), allow_nan=False)):
        low, high = number["interval"] or (number["value"], number["value"])
        assert low <= number["value"] <= high and number["real"] is not None and number["note"] == "", number
        assert number["protocol"] and number["better"] and number["meaning"]
        assert (number["interval"] is None) == (number["score"] == "pr" or "modes hit" in number["name"])
    for number in fresh.values():  # what is real is as good as training images are, to the intervals
        if number["interval"] and number["name"] != "critic":
            wide = 2 * (number["interval"][1] - number["interval"][0]) + 1e-6
            assert abs(number["value"] - number["real"]) <= wide, number
    assert copies["closer than test[tiny]"]["value"] > 0.95 and copies["distance / test[tiny]"]["value"] < 0.05
    for name in ("FD[tiny]", "KID[tiny]"):
        assert bright[name]["value"] > fresh[name]["value"], name
    for name in ("precision[tiny]", "F1/8[tiny]", "density[tiny]", "coverage[tiny]"):
        assert bright[name]["value"] < 0.7 * fresh[name]["value"], name
    assert {name for name, number in fresh.items() if number["noise"] is not None} == {"critic"}
    assert fresh["closer than test[tiny]"]["picture"] and len(fresh["F8[tiny]"]["curve"]) == 51

    text = metrics.table(list(fresh.values())).splitlines()
    assert text[0].split() == ["score", "value", "95", "%", "real", "images", "noise", "better", "meaning"]
    assert len(text) == 1 + len(fresh) and text[1].startswith("FD[tiny] ")


def test_batches_do_not_matter_and_order_hardly(tiny, blobs: Make) -> None:
    images, test = blobs(200, 2), known(blobs(200, 1), [tiny])
    scores = [name for name in ALL if name not in ("critic", "nearest")]
    whole = metrics.battery(scores, [tiny], known(images, [tiny]), test)
    assert metrics.battery(scores, [tiny], known(images, [tiny], batch=13), test) == whole
    turned = metrics.battery(scores, [tiny], known(images.flip(0), [tiny]), test)
    for one, other in zip(whole, turned, strict=True):  # k-means and pairs depend on the order, within the interval
        exact = one["score"] in ("fd", "pr", "is", "dc", "modes")
        assert one["value"] == pytest.approx(other["value"], rel=1e-6 if exact else 0.1, abs=1e-6 if exact else 0.2)


def test_identical_sets_are_perfect(tiny, blobs: Make) -> None:
    images = known(blobs(100, 1), [tiny])
    found = by_name(metrics.battery([n for n in ALL if n != "critic"], [tiny], images, images, images, images.images))
    perfect = {"FD": 0, "precision": 1, "recall": 1, "F8": 1, "F1/8": 1, "coverage": 1, "closer than test": 0.5}
    for name, value in {**perfect, "KL to real": 0}.items():
        # Laplace's rule keeps the divergence of equal histograms from being exactly 0.
        assert found[f"{name}[tiny]"]["value"] == pytest.approx(value, abs=0.05 if name == "KL to real" else 1e-6), name


@pytest.mark.parametrize("n", [2, 3, 7, 30])
def test_few_images_have_notes_in_place_of_numbers(tiny, blobs: Make, n: int) -> None:
    few, test = known(blobs(n, 2), [tiny]), known(blobs(40, 1), [tiny])
    found = metrics.battery(ALL, [tiny], few, test, few, blobs(50, 0))
    assert {number["score"] for number in found} == set(ALL)
    assert all((number["value"] is None) == bool(number["note"]) for number in found)
    missing = {number["score"] for number in found if number["note"]}
    assert (
        missing
        == {2: {"kid", "pr", "prd", "dc", "critic"}, 3: {"kid", "pr", "prd", "dc", "critic"}, 7: {"prd"}, 30: set()}[n]
    )
    assert all(f"{number['score']}: {number['note']}" in metrics.table(found) for number in found if number["note"])


def test_anchors_are_of_as_many_images_as_the_value_or_say_of_how_many(tiny, blobs: Make) -> None:
    """100 samples, 300 test images."""
    samples, test, scores = (
        known(blobs(100, 2), [tiny]),
        known(blobs(300, 1), [tiny]),
        ("critic", "msssim", "kid", "is"),
    )
    few, many = (by_name(metrics.battery(scores, [tiny], samples, test, known(blobs(n, 0), [tiny]))) for n in (50, 150))
    assert few["critic"]["protocol"].count("on 50 images of either set, 50 others scored") == 1  # noise has as many
    assert "real images: 1 steps of 64 images on 25 images of either set, 25 others" in few["critic"]["protocol"]
    assert "50 pairs, " in few["1 − MS-SSIM"]["protocol"] and "real images: 25 pairs" in few["1 − MS-SSIM"]["protocol"]
    assert "real images: 10 blocks of 5 features" in few["KID[tiny]"]["protocol"]
    assert "real images: 10 classes, 50 images in one part" in few["IS[tiny]"]["protocol"]
    for name in ("critic", "1 − MS-SSIM"):
        assert "real images" not in many[name]["protocol"]


def test_scores_of_classes_use_as_many_samples_as_real_images_are_kept(
    tiny, blobs: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_table, "KEEP", 30)
    images = known(blobs(50, 1), [tiny])
    score, hit, *_ = metrics.battery(["is", "modes"], [tiny], images, images)
    assert "30 images in one part" in score["protocol"] and "; 30 samples, 30 real images" in hit["protocol"]


@pytest.mark.parametrize("n", [2, 3, 5, 19])
def test_few_training_images_leave_the_value_and_a_note(tiny, blobs: Make, n: int) -> None:
    samples, test = known(blobs(40, 2), [tiny]), known(blobs(40, 1), [tiny])
    scores = ("kid", "pr", "prd", "dc", "critic")
    found = metrics.battery(scores, [tiny], samples, test, known(blobs(n, 0), [tiny]))
    needed = {"kid": 4, "pr": 4, "prd": 20, "dc": 6, "critic": 4}
    for number in found:
        lacking = n < needed[number["score"]]
        assert number["value"] is not None and (number["real"] is None) == lacking
        assert number["note"].startswith("no value of real images, because") == lacking
        assert (number["noise"] is not None) == (number["score"] == "critic")


def test_coloured_digits_have_a_hundred_modes(blobs: Make) -> None:
    """The digit is that of the grey image, and the colour the nearest one of the palette: ColorMNIST's labels."""
    network = metrics.extractor("tiny-mnist")
    grey = blobs(60, 0, 250)
    colours = torch.arange(60) % 10
    tint = torch.tensor(list(PALETTE.values()))[colours, :, None, None]
    colour = (grey * tint / 255).round().to(torch.uint8)
    digits = network.logits(network(grey)).argmax(1)
    assert torch.equal(score_table._modes_of(known(colour, [network]), network), 10 * colours + digits)
    images = known(colour, [network])
    hit, _, divergence = metrics.battery(["modes"], [network], images, images)
    assert hit["protocol"] == "100 modes: 10 classes in 10 colours; 60 samples, 60 real images"
    assert hit["value"] == len(set((10 * colours + digits).tolist())) and divergence["value"] >= 0
    [hit, *_] = metrics.battery(["modes"], [network], known(grey, [network]), known(grey, [network]))
    assert "10 modes: 10 classes;" in hit["protocol"]
    for pair in ((grey, colour), (colour, grey)):
        with pytest.raises(UserError, match="cannot compare colour images with grey ones"):
            metrics.battery(["modes"], [network], *(known(images, [network]) for images in pair))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0.000"), (0.0004, "0.000400"), (-0.0003, "-0.000300"), (0.09996, "0.100"), (0.25, "0.250"),
     (12.345, "12.35"), (123.45, "123.5")],
)  # fmt: skip
def test_numbers_are_shown_with_three_digits(value: float | None, text: str) -> None:
    assert metrics.shown(value) == text


@pytest.mark.parametrize(
    ("scores", "extractors", "message"),
    [
        (["fid"], ["tiny"], "there is no score 'fid'; did you mean 'fd'"),
        (["fd", "modes"], ["vgg16"], "the score 'modes' needs an extractor that classifies: tiny, inception"),
        (["fd", "modes"], ["vgg16", "tiny"], ""),
    ],
)
def test_scores_that_cannot_be(scores: list[str], extractors: list[str], message: str) -> None:
    found = metrics.check_scores(scores, extractors)
    assert metrics.named_scores("fd, is,") == ("fd", "is") and metrics.named_scores("") == ()
    with pytest.raises(UserError, match="--scores ',' names no score; the scores are fd, kid"):
        metrics.named_scores(",")
    assert found.startswith(message) and bool(found) == bool(message)


def test_what_a_score_needs_is_said_in_a_line(tiny, blobs: Make) -> None:
    images = known(blobs(40, 0), [tiny])
    bare = ImageSet(images.stats)
    for score, samples, message in (
        ("nearest", images, "needs all training images; give them, too"),
        ("msssim", bare, "saved statistics hold no images"),
        ("critic", ImageSet(images.stats, blobs(40, 0)[:, :, 1:]), "images of one shape"),
    ):
        with pytest.raises(UserError, match=message):
            metrics.battery([score], [tiny], samples, images)
    vgg = metrics.Extractor("v", torch.nn.Linear(1, 1), lambda x: x, dim=1, weights_sha256="", resize="", chunk=1)
    with pytest.raises(ValueError, match="'v' does not classify"):
        vgg.logits(torch.zeros(1, 1))
