"""Masked autoregressive flows: the C++ kernels against the float64 reference, over the whole table of options."""

from unittest import mock

import pytest
import torch
from autoregressive_flows import NAMES, flow_of, tensors
from flow_values import error, run_op
from hypothesis import strategies as st
from random_examples import random_examples
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from glf_fast import Spline, backends, ops, reference, use_backend
from glf_fast.ops.autoregressive_flow import cpp
from glf_fast.reference import ACTIVATIONS, LOG_SCALES, MASKED_NETWORKS, TRANSFORMS
from glf_fast.reference.made import masks

needs_kernels = pytest.mark.skipif(not backends()["cpp"].startswith("ready"), reason=backends()["cpp"])


def comparable(flow, values) -> Tensor:
    """Rows whose values stay small, where an inverse does not explode, and whose gradients do not jump within 1e-5: second
    derivatives of splines jump at knots, whose side float32 may not tell."""
    x, *rest = values
    away = 1e-5 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    below, above = (run_op(flow, [(x + by).detach().requires_grad_(), *rest]) for by in (-away, away))
    jumps = (below[2] - above[2]).abs().amax(-1) > 0.02 * (1 + below[2].abs().amax(-1))
    return (below[0].abs().amax(-1) < 1e4) & ~jumps


@needs_kernels
@random_examples(40, 400)
def test_everything_matches_the_float64_reference(data) -> None:
    draw = data.draw
    K, D = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 10, 17]))
    C = draw(st.sampled_from([0, 0, 1, 3, 16]))
    options = {
        "transform": draw(st.sampled_from(list(TRANSFORMS))),
        "network": draw(st.sampled_from(MASKED_NETWORKS)),
        "context_layer": draw(st.booleans()) if C else False,
    }
    if options["network"] != "mlp":
        hidden = (draw(st.integers(1, 40)),) * draw(st.integers(1, 3))
    else:
        hidden = tuple(draw(st.lists(st.integers(1, 40), min_size=0, max_size=8)))
    batch = draw(st.sampled_from([0, 1, 7, 8, 17, 33, 150]))
    exact, seen = tensors(batch, K, D, C, hidden, ties=draw(st.booleans()), **options)
    options["activation"] = draw(st.sampled_from(list(ACTIVATIONS)))
    if ACTIVATIONS[options["activation"]] is not None:
        options["activation_constant"] = draw(st.sampled_from([None, 0.2, 1.7]))
    options["log_scale"] = draw(st.sampled_from([name for name in LOG_SCALES if name != "exp"]))
    inverse, dtype = draw(st.booleans()), draw(st.sampled_from([torch.float32, torch.float64]))
    if inverse:
        exact[1] = torch.linalg.inv(exact[1].detach()).requires_grad_()
    keep = comparable(flow_of(getattr(reference, NAMES[inverse]), seen, **options), exact)
    exact[0], exact[3] = (None if t is None else t.detach()[keep].requires_grad_() for t in (exact[0], exact[3]))
    given_ = [None if t is None else t.detach().to(dtype).requires_grad_() for t in exact]
    want = run_op(flow_of(getattr(reference, NAMES[inverse]), seen, **options), exact)
    plain = run_op(flow_of(getattr(reference, NAMES[inverse]), seen, **options), given_)
    if draw(st.booleans()):  # strided
        given_ = [
            None if t is None else t.detach().mT.contiguous().mT.requires_grad_() if t.ndim > 1 else t for t in given_
        ]
    threads = torch.get_num_threads()
    torch.set_num_threads(draw(st.sampled_from([1, 2])))
    # Small flows save all they compute; with a limit of 0 only the steps' inputs, as large ones do.
    with use_backend("cpp"), mock.patch.object(cpp, "RECORDS_LIMIT", draw(st.sampled_from([0, cpp.RECORDS_LIMIT]))):
        got = run_op(flow_of(getattr(ops, NAMES[inverse]), seen, **options), given_)
    torch.set_num_threads(threads)
    for mine, theirs, truth in zip(got, plain, want, strict=True):
        assert mine.dtype == dtype and mine.shape == truth.shape
        # As good as plain PyTorch in this precision, up to what another order of summation may change.
        assert error(mine, truth) <= max(4 * error(theirs, truth), 2e-5 if dtype == torch.float32 else 1e-10)


# Every kind of transform and network, and the ways of a context.
KINDS = {
    "affine": {},
    "spline": {"transform": "spline"},
    "residual": {"network": "residual"},
    "skip": {"network": "skip"},
    "context-layer": {"context_layer": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inverse", NAMES)
def test_gradcheck(kind: str, inverse: bool) -> None:
    values, seen = tensors(3, 2, 4, 2, (6,), **KINDS[kind])
    flow = flow_of(getattr(ops, NAMES[inverse]), seen, **KINDS[kind], activation="silu")
    assert gradcheck(flow, values, fast_mode=True)
    assert gradgradcheck(flow, values, fast_mode=True)


def test_one_pass_is_the_loop_over_features() -> None:
    """At D = 63, more features than hidden units have degrees; the kernels' inverse finds what 63 passes of nflows' loop do."""
    values, seen = tensors(5, 1, 63, 2, (50, 50))
    z, A, c, context, *layers = [t.detach() for t in values]
    half = len(layers) // 2
    x, logdet = ops.autoregressive_flow_inverse(z, torch.linalg.inv(A), c, layers[:half], layers[half:], seen, context)
    y = torch.zeros_like(z)
    for _ in range(63):
        raw = reference.made(y, [w[0] for w in layers[:half]], [b[0] for b in layers[half:]], seen[0], context)
        u, t = raw.view(5, 63, 2).unbind(2)
        ell = reference.log_scale(u)
        y = (z - t) * torch.exp(-ell)
    torch.testing.assert_close(x, (y - c[0]) @ torch.linalg.inv(A[0]), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(logdet, -ell.sum(1), rtol=1e-9, atol=1e-9)


def test_weights_beyond_the_fan_in_are_never_read() -> None:
    values, seen = tensors(20, 2, 5, 2, (12, 9), ties=True)
    x, A, c, context, *layers = [t.detach() for t in values]
    weights, biases = layers[:3], layers[3:]
    spoilt = []
    for i, weight in enumerate(weights):
        used = [masks([w[k] for w in weights], [b[k] for b in biases], seen[k], 5)[i] for k in range(2)]
        spoilt.append(weight.masked_fill(~torch.stack(used), torch.nan).requires_grad_())
    for inverse in NAMES:
        op = getattr(ops, NAMES[inverse])
        got, logdet = op(x, A, c, spoilt, biases, seen, context)
        want, _ = op(x, A, c, weights, biases, seen, context)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        for weight, grad in zip(spoilt, torch.autograd.grad((got.sum() + logdet.sum()), spoilt), strict=True):
            assert grad.isfinite().all() and (grad[weight.isnan()] == 0).all()


@needs_kernels
def test_opcheck() -> None:
    values, seen = tensors(32, 2, 5, 2, (7,))  # whole panels: what is saved of lanes without a row is not defined
    x, A, c, context, *layers = [t.detach().float() for t in values]
    weights, biases = layers[:2], layers[2:]
    library, code = torch.ops.glf_fast, (0, 0, 0, 0.0, 0, 2.0, [], False)
    for save, units in ((0, 0), (1, 5)):
        given_ = (x, A, c, weights, biases, seen, context, *code, False, False, save, units)
        torch.library.opcheck(library.cpu_autoregressive_flow.default, given_)
    out, logdet, saved = library.cpu_autoregressive_flow(*given_)
    for grad_out, of_context in ((out, True), (None, False)):
        torch.library.opcheck(
            library.cpu_autoregressive_flow_backward.default,
            (grad_out, logdet, out, saved, A, c, weights, biases, seen, context, *code, False, 1, True, of_context),
        )


ERRORS = {
    "x must have shape": lambda a: a.update(x=torch.randn(3, 4)),
    r"weights\[1\] must have shape": lambda a: a.update(weights=[a["weights"][0], a["weights"][1][:, :, 1:]]),
    r"biases\[0\] must have shape": lambda a: a.update(biases=[a["biases"][0][:1], a["biases"][1]]),
    "two lists of one or more": lambda a: a.update(weights=[], biases=[]),
    "fan_in must have shape": lambda a: a.update(fan_in=a["fan_in"][:, 1:]),
    "fan_in must be int64": lambda a: a.update(fan_in=a["fan_in"].int()),
    "let no feature depend on itself": lambda a: a.update(fan_in=a["fan_in"].flip(1)),
    "context_layer=True is for .* got None": lambda a: a.update(context=None, context_layer=True),
    "context_layer=True is for .* got shape": lambda a: a.update(context=a["context"][:, :0], context_layer=True),
    'spline is for transform="spline"': lambda a: a.update(spline=Spline()),
    "transform must be one of": lambda a: a.update(transform="cubic"),
    "context must be a torch.Tensor": lambda a: a.update(context=[1.0]),
    "x must be a torch.Tensor": lambda a: a.update(x=[1.0]),
}


@pytest.mark.parametrize("message", ERRORS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_errors_say_what_is_wrong(message: str, backend: str) -> None:
    values, seen = tensors(3, 2, 5, 2, (7,))
    x, A, c, context, *layers = [t.detach() for t in values]
    arguments = {
        "x": x, "A": A, "c": c, "weights": layers[:2], "biases": layers[2:], "fan_in": seen, "context": context,
    }  # fmt: skip
    ERRORS[message](arguments)
    for gradients in (True, False):  # without gradients C++ refuses, and the check says why
        with (
            pytest.raises((ValueError, TypeError, RuntimeError), match=message),
            use_backend(backend),
            torch.set_grad_enabled(gradients),
        ):
            ops.autoregressive_flow(**arguments)
