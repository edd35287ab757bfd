import importlib.util
import pickle
import sys
from pathlib import Path

import pytest
import torch

from glf_fast import metrics
from glf_fast.data.weights import INCEPTION_SHA256
from glf_fast.errors import UserError
from glf_fast.metrics.extractors import label
from glf_fast.metrics.inception import FIDInception, load_inception

# Blocks, and the branches in each of them.
BLOCKS = {
    "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 Conv2d_3b_1x1 Conv2d_4a_3x3": "-",
    "Mixed_5b Mixed_5c Mixed_5d": (
        "branch1x1 branch5x5_1 branch5x5_2 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3 branch_pool"
    ),
    "Mixed_6a": "branch3x3 branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3",
    "Mixed_6b Mixed_6c Mixed_6d Mixed_6e": (
        "branch1x1 branch7x7_1 branch7x7_2 branch7x7_3 branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 "
        "branch7x7dbl_5 branch_pool"
    ),
    "Mixed_7a": "branch3x3_1 branch3x3_2 branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4",
    "Mixed_7b Mixed_7c": (
        "branch1x1 branch3x3_1 branch3x3_2a branch3x3_2b branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a branch3x3dbl_3b "
        "branch_pool"
    ),
}


def test_names_are_those_of_the_public_file() -> None:
    parameters = ["conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"]
    expected = {"fc.weight", "fc.bias"} | {
        f"{block}.{branch}.{parameter}".replace(".-.", ".")
        for blocks, branches in BLOCKS.items()
        for block in blocks.split()
        for branch in branches.split()
        for parameter in parameters
    }
    state = FIDInception().state_dict()
    assert {key for key in state if not key.endswith("num_batches_tracked")} == expected
    assert state["fc.weight"].shape == (1008, 2048)
    # Inception-v3 without its auxiliary head and classifier.
    assert sum(p.numel() for name, p in FIDInception().named_parameters() if not name.startswith("fc.")) == 21_785_568


def test_only_the_genuine_weights_make_a_fid(random_inception: Path) -> None:
    extractor = metrics.extractor("inception", weights=random_inception)
    assert extractor.label == "FD[inception]"
    assert label({**extractor.identity, "weights_sha256": INCEPTION_SHA256}) == "FID"
    assert INCEPTION_SHA256.startswith("6726825d")  # the published file has these eight digits in its name
    assert label(None) == "FD"


def test_other_files_are_refused_and_no_code_runs(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError):
        load_inception(path)
    path.write_bytes(b"neither zip nor pickle")
    with pytest.raises(UserError, match=r"weights\.pth is not a readable state dict"):
        load_inception(path)
    state = FIDInception().state_dict()
    state["Conv2d_9z_1x1.conv.weight"] = state.pop("Mixed_7c.branch_pool.conv.weight")
    torch.save(state, path)
    with pytest.raises(
        UserError, match=r"1 keys are missing, 1 are unknown \(for instance 'Mixed_7c\.branch_pool\.conv\.weight'"
    ):
        load_inception(path)

    class Harmful:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "harm",))

    path.write_bytes(pickle.dumps({"fc.weight": Harmful()}))
    with pytest.raises(UserError, match="not a readable state dict"):
        load_inception(path)
    torch.save({"fc.weight": Harmful()}, path)
    with pytest.raises(UserError, match="not a readable state dict"):
        load_inception(path)
    assert not (tmp_path / "harm").exists()


def test_features_equal_torch_fidelitys(random_inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network, resize and normalisation against an independent implementation, with the same random weights.

    `pip install --no-deps torch-fidelity` is enough: its `__init__` wants torchvision, its Inception does not, so the package
    is entered without running its `__init__`.
    """
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None:
        pytest.skip("torch-fidelity is not installed (pip install --no-deps torch-fidelity)")
    monkeypatch.setitem(sys.modules, "torch_fidelity", importlib.util.module_from_spec(spec))
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity.")]:
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # restored after the test

    # torch-fidelity requires the counters that the published file lacks.
    path = random_inception.with_name("with_counters.pth")
    torch.save(load_inception(random_inception).state_dict(), path)
    theirs = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
    )
    ours = metrics.extractor("inception", weights=random_inception)
    ours.chunk = 2  # the last of three images is padded
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 3, 32, 32), (1, 3, 310, 350)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        expected = theirs(images)[0]
        assert expected.std() > 1  # the random network does not collapse to a constant
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)
