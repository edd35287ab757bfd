from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from glf_fast import metrics
from glf_fast.data import load
from glf_fast.errors import UserError
from glf_fast.images import to_float

SHIPPED = ("tiny", "tiny-mnist")
FAST = [name for name in metrics.names() if name not in ("inception", "tiny-cifar10")]


@pytest.fixture(scope="module")
def extractors(vgg16_weights: Path) -> dict[str, metrics.Extractor]:
    return {name: metrics.extractor(name, weights=None if name in SHIPPED else vgg16_weights) for name in FAST}


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("shape", [(3, 1, 28, 28), (2, 3, 32, 32), (2, 1, 8, 8), (1, 3, 64, 48), (0, 1, 28, 28)])
def test_uint8_images_become_float32_features(extractors, name: str, shape: tuple[int, ...]) -> None:
    extractor = extractors[name]
    features = extractor(pixels(*shape))
    assert features.shape == (shape[0], extractor.dim)
    assert features.dtype == torch.float32 and not features.requires_grad
    assert torch.isfinite(features).all()


@pytest.mark.parametrize("name", FAST)
def test_features_do_not_depend_on_batch_mates(extractors, name: str) -> None:
    extractor = extractors[name]
    images = pixels(extractor.chunk + 2, 1, 28, 28)  # the network runs twice, and again for each batch
    whole = extractor(images)
    assert torch.equal(torch.cat([extractor(batch) for batch in images.split(37)]), whole)
    assert torch.equal(extractor(images[-2:-1]), whole[-2:-1])


@pytest.mark.parametrize("name", FAST)
def test_grey_is_repeated(extractors, name: str) -> None:
    extractor, grey = extractors[name], pixels(2, 1, 28, 28)
    assert extractor.grey == "repeat"
    assert torch.equal(extractor(grey), extractor(grey.expand(-1, 3, -1, -1)))
    red = torch.cat([grey, torch.zeros_like(grey), torch.zeros_like(grey)], 1)
    assert not torch.allclose(extractor(red), extractor(red.flip(1)), rtol=1e-2), "blind to colour"


def test_features_ignore_the_precision_settings_of_training(extractors) -> None:
    extractor, images = extractors["vgg16-relu2_2"], pixels(4, 3, 32, 32)
    expected = extractor(images)
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(extractor(images), expected)
        assert conv.fp32_precision == "bf16"
    finally:
        conv.fp32_precision = before


def test_an_extractor_stays_in_eval_mode(tiny: metrics.Extractor) -> None:
    images = pixels(3, 1, 28, 28)
    expected = tiny(images)
    torch.nn.ModuleList([tiny]).train()
    assert not any(module.training for module in tiny.modules())
    assert torch.equal(tiny(images), expected)


def test_small_images_get_a_black_border_and_large_ones_shrink(extractors) -> None:
    extractor = extractors["vgg16-relu2_2"]
    small = pixels(2, 3, 28, 20)
    bordered = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    bordered[:, :, 2:30, 6:26] = small
    torch.testing.assert_close(extractor(small), extractor(bordered), rtol=1e-5, atol=1e-5)
    seen = []
    hook = extractor.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[2:]))
    extractor.chunk, chunk = 1, extractor.chunk
    for height, width in ((224, 100), (300, 150), (20, 448)):
        extractor(pixels(1, 1, height, width))
    extractor.chunk = chunk
    hook.remove()
    assert seen == [(224, 100), (224, 112), (32, 224)]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 28, 28), "uint8 images, got torch.float32; glf_fast.images.to_uint8"),
        (torch.zeros(1, 28, 28, dtype=torch.uint8), r"got \(1, 28, 28\)"),
        (torch.zeros(2, 4, 28, 28, dtype=torch.uint8), r"got \(2, 4, 28, 28\)"),
        (torch.zeros(2, 1, 0, 28, dtype=torch.uint8), r"got \(2, 1, 0, 28\)"),
        ([1, 2], "got list"),
    ],
)
def test_anything_but_uint8_images_is_refused(tiny: metrics.Extractor, images: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(images)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UserError, match=r"no extractor 'vgg'; did you mean 'vgg16'.*the extractors are tiny, vgg16"):
        metrics.extractor("vgg")
    with pytest.raises(UserError, match="has its own weights"):
        metrics.extractor("tiny", weights=Path("x.safetensors"))


def test_identity_tells_extractors_apart(extractors) -> None:
    identities = [str(extractor.identity) for extractor in extractors.values()]
    assert len(set(identities)) == len(identities)
    assert extractors["vgg16"].label == "FD[vgg16]"
    assert all(len(extractor.weights_sha256) == 64 for extractor in extractors.values())


def test_collect_gives_the_same_bits_for_any_batch_size(tiny, blobs: Callable[..., torch.Tensor]) -> None:
    images = blobs(1500, 0)
    whole = metrics.collect(images, tiny)
    for size in (17, 256, 1500):
        stats = metrics.collect(iter(images.split(size)), tiny)
        assert stats.n == 1500
        assert torch.equal(stats.mean, whole.mean) and torch.equal(stats.cov, whole.cov)
        assert torch.equal(stats.kept, whole.kept)
    with pytest.raises(UserError, match=r"must have one shape; got \(1, 28, 28\) and then \(3, 28, 28\)"):
        metrics.collect([images[:3], images[:3].expand(-1, 3, -1, -1)], tiny)


def test_the_shipped_network_knows_its_clothes(tiny: metrics.Extractor, fashion_mnist_dir: Path) -> None:
    test = load("fashion-mnist", "test", data_dir=fashion_mnist_dir)
    x = to_float(test.images[:2000]).expand(-1, 3, -1, -1)
    with torch.no_grad():
        hits = tiny.network.classify(x).argmax(1) == test.labels[:2000]
    assert hits.float().mean() > 0.88
    features = tiny(test.images[:2000])
    assert features.mean(0).abs().max() < 0.2 and 0.7 < features.std(0).median() < 1.3  # standardised


@pytest.mark.parametrize(
    ("name", "n", "bounds"),
    [
        ("tiny", 640, (4, 10, 90)),
        ("vgg16", 128, (35, 75, 130)),
        pytest.param("vgg16", 640, (12, 50, 110), marks=pytest.mark.long),
    ],
)
def test_distances_of_fashion_mnist(
    extractors, fashion_mnist_dir: Path, name: str, n: int, bounds: tuple[float, float, float]
) -> None:
    """Real images are close to real ones; noise of σ = 16 levels, and samples of a 20-dimensional PCA, are not."""
    train, test = (load("fashion-mnist", split, data_dir=fashion_mnist_dir).images for split in ("train", "test"))
    generator = torch.Generator().manual_seed(0)
    flat = train[:20_000].flatten(1).float()
    w, v = torch.linalg.eigh(torch.cov(flat.T))
    codes = torch.randn(n, 20, generator=generator) * w[-20:].sqrt()
    sets = {
        "real": test[:n],
        "noisy": test[:n].float() + 16 * torch.randn(n, 1, 28, 28, generator=generator),
        "pca": (codes @ v[:, -20:].T + flat.mean(0)).view(n, 1, 28, 28),
    }
    extractor = extractors[name]
    reference = metrics.collect(train[:n], extractor)
    real, noisy, pca = (
        metrics.frechet_distance(metrics.collect(images.round().clamp(0, 255).byte(), extractor), reference)
        for images in (sets[key].float() for key in ("real", "noisy", "pca"))
    )
    assert real < bounds[0] and bounds[1] < noisy < pca and pca > bounds[2], (real, noisy, pca)
