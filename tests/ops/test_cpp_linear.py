"""The processor kernels of invertible linear layers against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from glf_fast import backends, ops, use_backend

pytestmark = pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason=backends()["cpp"])


def layers(batch: tuple[int, ...], dim: int, actnorm: bool, g: torch.Generator) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Permutation, sign, and [lower, upper, log_diag(, log_scale, bias)] in float64."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*batch, *shape, generator=g, dtype=torch.float64)

    permutation = torch.rand(*batch, dim, generator=g).argsort(-1)
    matrices = [0.5 * normal(dim, dim) / dim**0.5 for _ in range(2)]
    return permutation, normal(dim).sign(), [*matrices, *(0.3 * normal(dim) for _ in range(3 if actnorm else 1))]


def run(permutation: Tensor, sign: Tensor, tensors: list[Tensor], need_inverse: bool) -> list[Tensor]:
    lower, upper, log_diag, *actnorm = tensors
    out = ops.plu_assemble(permutation, lower, upper, log_diag, sign, *actnorm, need_inverse=need_inverse)
    return [t for t in out if t is not None]


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() if b.numel() else 0.0


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_everything_matches_the_float64_reference(data) -> None:
    batch = data.draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    dim = data.draw(st.integers(1, 70))
    actnorm, need_inverse = data.draw(st.booleans()), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    permutation, sign, tensors = layers(batch, dim, actnorm, g)
    # What is not read, whatever it holds, must not matter.
    tensors[0] = tensors[0].tril(-1) + torch.full_like(tensors[0], 7.0).triu(0)
    tensors[1] = tensors[1].triu(1) - torch.full_like(tensors[1], 9.0).tril(0)
    if data.draw(st.booleans()):  # not contiguous
        tensors = [t.mT.contiguous().mT if t.ndim > len(batch) + 1 else t for t in tensors]

    def everything(backend: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with use_backend(backend):
            out = run(permutation, sign.to(dtype), leaves, need_inverse)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(dtype) for t in out]
        loss = sum((w * t).sum() for w, t in zip(weights, out, strict=True))
        return out, list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))

    exact, got = everything("reference", torch.float64), everything("cpp", dtype)
    plain = everything("reference", dtype)
    for theirs, ours, same in zip(exact[0] + exact[1], got[0] + got[1], plain[0] + plain[1], strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        # Sums may cancel: the measure is what plain PyTorch loses in the same precision.
        assert error(ours, theirs) <= max(4 * error(same, theirs), 1e-13 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("actnorm", [False, True])
def test_derivatives_of_both_orders(actnorm: bool) -> None:
    permutation, sign, tensors = layers((2,), 5, actnorm, torch.Generator().manual_seed(0))
    leaves = tuple(t.requires_grad_() for t in tensors)

    def differentiable(*t: Tensor) -> list[Tensor]:
        return [out for out in run(permutation, sign, list(t), True) if out.requires_grad]

    assert gradcheck(differentiable, leaves)
    assert gradgradcheck(differentiable, leaves)


@pytest.mark.parametrize("wanted", range(4))
def test_each_output_alone_has_its_gradient(wanted: int) -> None:
    permutation, sign, tensors = layers((2,), 6, True, torch.Generator().manual_seed(0))
    leaves = [t.requires_grad_() for t in tensors]

    def gradients(backend: str) -> tuple[Tensor, ...]:
        with use_backend(backend):
            out = run(permutation, sign, leaves, True)[wanted].sum()
        return torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True)

    for ours, theirs in zip(gradients("cpp"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck() -> None:
    permutation, sign, tensors = layers((2,), 5, True, torch.Generator().manual_seed(0))
    lower, upper, log_diag, log_scale, bias = (t.float() for t in tensors)
    factors = (permutation, lower, upper, log_diag, sign.float(), log_scale, bias)
    # Gradients are registered outside the op, in an autograd.Function.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.glf_fast.plu_assemble.default, (*factors, True), test_utils=checks)
    A, A_inv, c, logabsdet = torch.ops.glf_fast.plu_assemble.default(*factors, True)
    backward = (*factors, A, A_inv, A, A_inv, c, logabsdet)
    torch.library.opcheck(torch.ops.glf_fast.plu_assemble_backward.default, backward, test_utils=checks)


def test_nan_reaches_its_own_layer_alone() -> None:
    permutation, sign, tensors = layers((3,), 20, True, torch.Generator().manual_seed(0))
    tensors[0][1, 5, 2] = float("nan")
    A, A_inv, c, _ = run(permutation, sign, tensors, True)
    for t in (A, A_inv, c):
        assert t[1].isnan().any() and t[0].isfinite().all() and t[2].isfinite().all()


def test_results_repeat_exactly_with_any_number_of_threads() -> None:
    permutation, sign, tensors = layers((32,), 64, True, torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        found.append(run(permutation, sign.float(), [t.float() for t in tensors], True))
    torch.set_num_threads(before)
    for a, b, c in zip(*found, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)


def test_a_permutation_that_is_none_is_refused() -> None:
    permutation, sign, tensors = layers((2,), 4, False, torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match="permutation must hold each index once a layer; got"):
        run(permutation.clone().index_fill_(1, torch.tensor([1]), int(permutation[0, 0])), sign, tensors, False)
    permutation[1, 2] = 4
    with pytest.raises(RuntimeError, match="permutation must hold indices from 0 to 3; got 4"):
        run(permutation, sign, tensors, False)


def test_a_permutation_of_another_type_is_refused() -> None:
    permutation, sign, tensors = layers((2,), 4, False, torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"permutation must be int64; got torch.int32 \(convert it with .long\(\)\)"):
        run(permutation.int(), sign, tensors, False)


def test_tensors_of_several_devices_are_refused() -> None:
    permutation, sign, (lower, upper, log_diag, *_) = layers((2,), 4, False, torch.Generator().manual_seed(0))
    arguments = [permutation, lower, upper, log_diag, sign]
    for i, name in enumerate(("permutation", "lower", "upper", "log_diag", "sign")):
        elsewhere = [t.to("meta") if i == j else t for j, t in enumerate(arguments)]
        with pytest.raises(
            ValueError, match=f"{'permutation' if name == 'lower' else name} is on .* but the rest is on"
        ):
            ops.plu_assemble(*elsewhere)


def test_a_gradient_of_the_signs_is_the_references() -> None:
    permutation, sign, tensors = layers((2,), 4, True, torch.Generator().manual_seed(0))
    sign.requires_grad_()

    def gradient(backend: str) -> Tensor:
        with use_backend(backend):
            return torch.autograd.grad(sum(t.sum() for t in run(permutation, sign, tensors, True)), sign)[0]

    torch.testing.assert_close(gradient("cpp"), gradient("reference"))
    with torch.no_grad():
        assert not run(permutation, sign, tensors, True)[0].requires_grad
