"""Flows inside of samplers, the packages' own against glf_fast's: `python -m bench.samplers --out FOLDER`.

nessai, pocoMC and aspire train a flow with their own defaults on rows of a curved density, until they themselves stop, and
draw from it as they do in a run. Their own flow and the plug-ins of `glf_fast.integrations` take turns, with the same rows and
seeds.
Quality is the loss on rows that no flow was trained on, in nats.

The folder gets samplers.json and samplers.md, a row as soon as it is measured.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import about
from bench.posteriors import _processor
from glf_fast.files import write_json

__all__ = ["SAMPLERS", "Trained", "page", "study"]

HELD_OUT = 20_000
TIMES = 10  # that samples are drawn
Row = dict[str, Any]


@dataclass
class Trained:
    """A flow as a sampler has it: the three things that are measured."""

    train: Callable[[np.ndarray], int]  # returns the number of epochs
    draw: Callable[[int], Any]
    log_prob: Callable[[np.ndarray], Any]


@dataclass
class Sampler:
    """A package, with as many rows and samples as it has in a run with its defaults."""

    rows: int
    drawn: int
    flows: dict[
        str, Callable[[int, int, str], Trained]
    ]  # of dimensions, seed, and an empty folder; the package's own first


def _nessai(kind: str, **config: Any) -> Callable[[int, int, str], Trained]:
    def build(dim: int, seed: int, folder: str) -> Trained:
        from nessai.flowmodel import FlowModel

        from glf_fast.integrations.nessai import FusedFlowModel, coupling_flow

        own = kind == "own"
        model = (FlowModel if own else FusedFlowModel)(
            flow_config={"n_inputs": dim, **({} if own else {"flow": coupling_flow}), **config},
            output=folder,
            rng=np.random.default_rng(seed),
        )
        model.initialise()
        return Trained(
            lambda x: len(model.train(x, plot=False)["loss"]), lambda n: model.sample_and_log_prob(n), model.log_prob
        )

    return build


def _pocomc(kind: str) -> Callable[[int, int, str], Trained]:
    def build(dim: int, seed: int, folder: str) -> Trained:
        from pocomc.flow import Flow

        from glf_fast.integrations.pocomc import FusedFlow, coupling_flow

        if kind == "own":
            flow = Flow(dim, "nsf6")
        elif kind == "glf_fast":
            flow = FusedFlow(dim, "nsf6")
        else:
            flow = FusedFlow(dim, coupling_flow(dim, steps=6, hidden=(32, 32), coupling="spline"))
        settings = {"validation_split": 0.5, "epochs": 5000, "batch_size": 256, "patience": dim, "annealing": False}

        def train(x: np.ndarray) -> int:
            return len(flow.fit(torch.from_numpy(x).float(), torch.ones(len(x)), **settings)["loss"])

        def draw(n: int) -> None:
            with torch.no_grad():
                flow.inverse(torch.randn(n, dim))

        def log_prob(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return flow.log_prob(torch.from_numpy(x).float()).numpy()

        return Trained(train, draw, log_prob)

    return build


def _aspire(backend: str, **options: Any) -> Callable[[int, int, str], Trained]:
    def build(dim: int, seed: int, folder: str) -> Trained:
        from aspire.flows import get_flow_wrapper

        flow = get_flow_wrapper(backend)[0](dim, seed=seed, **options)
        return Trained(
            lambda x: len(flow.fit(torch.from_numpy(x).float()).training_loss),
            lambda n: flow.sample_and_log_prob(n),
            lambda x: flow.log_prob(torch.from_numpy(x).float()).detach().numpy(),
        )

    return build


SAMPLERS = {
    "nessai": Sampler(2_000, 10_000, {"own": _nessai("own"), "glf_fast": _nessai("glf_fast")}),
    "pocoMC": Sampler(
        512,
        256,
        {"own": _pocomc("own"), "glf_fast": _pocomc("glf_fast"), "glf_fast, spline couplings": _pocomc("couplings")},
    ),
    "aspire": Sampler(
        2_000,
        10_000,
        {
            "own": _aspire("zuko"),
            "glf_fast": _aspire("glf_fast"),
            "glf_fast, couplings": _aspire("glf_fast", flow_class="CouplingFlow", steps=4, hidden=(64, 64)),
        },
    ),
}


def rows_of(dim: int, n: int, seed: int) -> np.ndarray:
    """Rows (n, dim) of a normal density that is curved in its first two dimensions."""
    x = np.random.default_rng(seed).standard_normal((n, dim))
    x[:, 1] = 0.5 * x[:, 1] + 0.4 * x[:, 0] ** 2 - 0.4
    return x


def measure(sampler: str, flow: str, dim: int, seed: int) -> Row:
    """One row: seconds of building, of training and of drawing, epochs, and the loss on rows held out."""
    case = SAMPLERS[sampler]
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        trained = case.flows[flow](dim, seed, folder)
        building = time.perf_counter() - start
        start = time.perf_counter()
        epochs = trained.train(rows_of(dim, case.rows, seed))
        seconds = time.perf_counter() - start
        trained.draw(case.drawn)
        drawing = []
        for _ in range(TIMES):
            start = time.perf_counter()
            trained.draw(case.drawn)
            drawing.append(time.perf_counter() - start)
        loss = -float(np.mean(trained.log_prob(rows_of(dim, HELD_OUT, 10_000 + seed))))
    return {
        "building_seconds": building, "seconds": seconds, "epochs": epochs,
        "sampling_seconds": statistics.median(drawing), "loss": loss,
    }  # fmt: skip


def study(folder: Path, samplers: Sequence[str], dims: Sequence[int], seeds: int) -> dict[str, Any]:
    """Measure all rows; the flows of a sampler, size and seed one after the other, in another order for every other seed."""
    machine = about() | {"cpu": _processor()}
    found: dict[str, Any] = {"machine": machine, "date": datetime.now(timezone.utc).isoformat(), "rows": []}
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), _without_logs(), Path(os.devnull).open("w", encoding="utf-8") as silence:
        warnings.simplefilter("ignore")
        for sampler in samplers:
            for flow in SAMPLERS[sampler].flows:  # what is imported and compiled once
                with redirect_stderr(silence):
                    _warm_up(sampler, flow, dims[0])
            for seed in range(seeds):
                for dim in dims:
                    flows = list(SAMPLERS[sampler].flows)
                    for flow in flows if seed % 2 == 0 else reversed(flows):
                        key = {"sampler": sampler, "flow": flow, "dim": dim, "seed": seed}
                        with redirect_stderr(silence):
                            found["rows"].append(key | measure(sampler, flow, dim, seed))
                        write_json(folder / "samplers.json", found)
                        (folder / "samplers.md").write_text("\n".join(page(found)) + "\n", encoding="utf-8")
                        row = found["rows"][-1]
                        print(
                            ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                            flush=True,
                        )
    return found


@contextmanager
def _without_logs() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _warm_up(sampler: str, flow: str, dim: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trained = SAMPLERS[sampler].flows[flow](dim, 0, folder)
        trained.train(rows_of(dim, 40, 0))
        trained.draw(2)


def page(found: Mapping[str, Any]) -> Iterator[str]:
    """The table: a row a sampler, size and flow, with medians of the seeds, and how many times as long the own flow takes."""
    machine, rows = found["machine"], found["rows"]
    seeds = len({row["seed"] for row in rows})
    yield (
        f"Medians of {seeds} seeds; {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, commit "
        f"{machine['commit']}, {found['date'][:10]}."
    )
    yield ""
    yield "| sampler | dimensions | flow | training | × | an epoch | sampling | × | loss, held out |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for sampler, dim in dict.fromkeys((row["sampler"], row["dim"]) for row in rows):
        own: dict[str, float] = {}
        for flow in SAMPLERS[sampler].flows:
            of = [row for row in rows if (row["sampler"], row["dim"], row["flow"]) == (sampler, dim, flow)]
            if not of:
                continue
            median = {
                name: statistics.median(row[name] for row in of) for name in ("seconds", "sampling_seconds", "loss")
            }
            epoch = statistics.median(row["seconds"] / row["epochs"] for row in of)
            own = own or median
            gains = [f"{own[name] / median[name]:.1f}" for name in ("seconds", "sampling_seconds")]
            yield (
                f"| {sampler} | {dim} | {flow} | {median['seconds']:.2f} s | {gains[0]} | {1e3 * epoch:.1f} ms | "
                f"{1e3 * median['sampling_seconds']:.2f} ms | {gains[1]} | {median['loss']:.3f} |"
            )


def main() -> None:
    """Run the study, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="packages to measure")
    parser.add_argument("--dims", type=int, nargs="+", default=[4, 8], help="numbers of dimensions, 2 or more each")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each flow")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; the packages' own default is 1")
    arguments = parser.parse_args()
    if min(arguments.dims) < 2 or arguments.seeds < 1 or arguments.threads < 1:
        parser.error("--dims must be 2 or more, --seeds and --threads 1 or more")
    torch.set_num_threads(arguments.threads)
    found = study(arguments.out, arguments.samplers, arguments.dims, arguments.seeds)
    print("\n".join(page(found)))


if __name__ == "__main__":
    main()
