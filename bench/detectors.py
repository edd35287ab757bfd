"""anomalib's detectors before and after `glf_fast.accelerate`: `python -m bench.detectors --out FILE.json`.

One image, or one step of training, in turn with both; medians. "one call" is CFLOW with one call per feature map in place of
slices of 64 rows. Backbones have random weights, with which they take as long. Their time is part of all rows, and given by
itself. Needs anomalib (`make communities`).
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import glf_fast
from bench import detector_models
from bench.machine import about
from bench.results import Result, Results, stats, write

__all__ = ["measure", "table"]

ONE_CALL = 1 << 20
MODELS: dict[str, tuple[int, Callable[[], Any]]] = {
    "CFLOW, resnet18": (256, lambda: detector_models.cflow(layers=("layer2", "layer3", "layer4"))),
    "CFLOW, wide_resnet50_2": (
        256,
        lambda: detector_models.cflow("wide_resnet50_2", ("layer2", "layer3", "layer4")),
    ),
    "FastFlow, resnet18": (256, lambda: detector_models.fastflow(256)),
    "U-Flow, resnet18": (256, lambda: detector_models.uflow(256)),
}


def measure(rounds: int, names: list[str] | None = None) -> Iterator[Result]:
    """The rows of each model: providers "anomalib" and "glf_fast", modes "predict", "one call", "backbone", "train"."""
    for name in names or MODELS:
        size, make = MODELS[name]
        torch.manual_seed(0)
        original = make()
        fast = copy.deepcopy(original)
        start = time.perf_counter()
        report = glf_fast.accelerate(fast)
        took = time.perf_counter() - start
        if not report.replaced:
            raise RuntimeError(f"{name}: nothing was replaced: {report}")
        models = {"anomalib": original, "glf_fast": fast}
        images = torch.randn(1, 3, size, size)
        runs = {"predict": {key: _predict(m, images) for key, m in models.items()}}
        if hasattr(original, "decoders"):
            runs["one call"] = {key: _predict(m, images, ONE_CALL) for key, m in models.items()}
            runs["train"] = {key: _train_decoders(m) for key, m in models.items()}
            backbone = original.encoder
        else:
            runs["train"] = {key: _train(m, images.expand(4, -1, -1, -1)) for key, m in models.items()}
            backbone = original.feature_extractor
        runs["backbone"] = {"anomalib": _without_gradients(backbone, images)}
        for mode, both in runs.items():
            for provider, times in _in_turn(both, rounds).items():
                yield Result("detectors", name, mode, provider, stats(times), {"accelerate_s": took})


def _predict(model: Any, images: torch.Tensor, rows: int | None = None) -> Callable[[], Any]:
    def run() -> Any:
        model.eval()
        if rows:
            slices, model.fiber_batch_size = model.fiber_batch_size, rows
        try:
            return _without_gradients(model, images)()
        finally:
            if rows:
                model.fiber_batch_size = slices

    return run


def _without_gradients(model: Any, images: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return model(images)

    return run


def _train_decoders(model: Any) -> Callable[[], Any]:
    """A step of CFLOW's training: 64 rows of each feature map, anomalib's loss and optimizer."""
    from anomalib.models.image.cflow.utils import get_logp

    optimizer = torch.optim.Adam((p for d in model.decoders for p in d.parameters() if p.requires_grad), 1e-4)
    given = [(torch.randn(64, dim), torch.randn(64, model.condition_vector), dim) for dim in model.pool_dims]

    def run() -> None:
        model.decoders.train()
        for decoder, (rows, places, dim) in zip(model.decoders, given, strict=True):
            optimizer.zero_grad()
            z, logdet = decoder(rows, [places])
            (-F.logsigmoid(get_logp(dim, z, logdet) / dim)).mean().backward()
            optimizer.step()

    return run


def _train(model: Any, images: torch.Tensor) -> Callable[[], Any]:
    """A step of FastFlow's or U-Flow's training."""
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 1e-3)

    def run() -> None:
        model.train()
        optimizer.zero_grad()
        z, logdets = model(images)
        logdets = torch.stack(list(logdets)) if isinstance(logdets, list) else logdets
        energy = sum((0.5 * part.square().sum() for part in z), start=torch.zeros(()))
        ((energy - logdets.sum()) / len(images)).backward()
        optimizer.step()

    return run


def _in_turn(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds):
        for name in runs if i % 2 == 0 else reversed(runs):
            start = time.perf_counter()
            runs[name]()
            times[name].append(time.perf_counter() - start)
    return times


def table(results: Results) -> Iterator[str]:
    """The medians in milliseconds, and how many times as long anomalib takes."""
    yield "| model | | anomalib, ms | glf_fast, ms | × |"
    yield "|---|---|---|---|---|"
    for (_, case, mode), rows in results.groups().items():
        before = rows["anomalib"].median
        if "glf_fast" not in rows:
            yield f"| {case} | {mode} | {1e3 * before:.1f} |  |  |"
            continue
        after = rows["glf_fast"].median
        yield f"| {case} | {mode} | {1e3 * before:.1f} | {1e3 * after:.1f} | {before / after:.2f} |"


def main() -> None:
    """Measure, write the file, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file of the results")
    parser.add_argument("--rounds", type=int, default=9, help="times that each is run")
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)}")
    arguments = parser.parse_args()
    if detector_models.MISSING:
        raise SystemExit(detector_models.MISSING)
    machine = about()
    found = Results(machine, datetime.now(timezone.utc).isoformat(), [])
    for result in measure(arguments.rounds, arguments.models):
        found.results.append(result)
        print(f"{result.case}, {result.mode}, {result.provider}: {1e3 * result.median:.1f} ms", flush=True)
        write(found, arguments.out)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
