"""Conversion of a trained RealNVP of normflows to a fused flow, which has the same density and is faster.

    python examples/convert_normflows.py [--quick] [--out FOLDER]

Needs `pip install normflows`. `glf_fast.convert` also takes flows of nflows, zuko and FrEIA.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import normflows as nf
import torch
from sklearn.datasets import make_swiss_roll
from torch import Tensor
from tqdm import trange

from glf_fast import convert


def real_nvp(dim: int, layers: int, hidden: int) -> nf.NormalizingFlow:
    """The RealNVP of normflows' README."""
    flows = []
    for _ in range(layers):
        net = nf.nets.MLP([dim - dim // 2, hidden, hidden, 2 * (dim // 2)], init_zeros=True)
        flows += [nf.flows.AffineCouplingBlock(net), nf.flows.Permute(dim, mode="shuffle"), nf.flows.ActNorm(dim)]
    return nf.NormalizingFlow(nf.distributions.DiagGaussian(dim), flows)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of a call, in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def swiss_rolls(n: int) -> Tensor:
    """Points (n, 6) on two independent rolls."""
    return torch.cat([torch.tensor(make_swiss_roll(n, noise=0.3)[0], dtype=torch.float32) / 10 for _ in range(2)], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/examples"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = real_nvp(6, layers=8, hidden=64)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    progress = trange(10 if arguments.quick else 500, desc="training with normflows")
    for _ in progress:
        loss = model.forward_kld(swiss_rolls(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(nll=f"{loss.item():.3f}", refresh=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), arguments.out / "normflows.pt")

    flow = convert(model)
    layers = [type(layer).__name__ for layer in getattr(flow, "layers", [flow])]
    print(f"{len(model.flows)} layers of normflows became {' + '.join(layers)}")
    x = swiss_rolls(1000)
    with torch.no_grad():
        exact = real_nvp(6, layers=8, hidden=64).double()
        exact.load_state_dict(torch.load(arguments.out / "normflows.pt"))
        truth = exact.log_prob(x.double())
        errors = [(f(x) - truth).abs().max().item() for f in (model.log_prob, flow.log_prob)]
    print(f"log_prob in float32 differs from float64 by {errors[0]:.1e} (normflows), {errors[1]:.1e} (converted)")

    x, repeats, gains = x[:256], 5 if arguments.quick else 200, {}
    for name, theirs, ours in (
        ("log_prob", lambda: model.log_prob(x), lambda: flow.log_prob(x)),
        ("sample", lambda: model.sample(256), lambda: flow.sample(256)),
        ("training", lambda: model.forward_kld(x).backward(), lambda: (-flow.log_prob(x).mean()).backward()),
    ):
        with torch.set_grad_enabled(name == "training"):
            before, after = milliseconds(theirs, repeats), milliseconds(ours, repeats)
        gains[name] = before / after
        print(f"{name:9} {before:6.2f} ms with normflows, {after:6.2f} ms converted")
    print("gained: " + ", ".join(f"{name} {gain:.1f} ×" for name, gain in gains.items()))


if __name__ == "__main__":
    main()
