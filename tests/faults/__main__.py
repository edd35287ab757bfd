"""python tests/faults [--minutes 30] [--only kills,disk] [--seed 0]: campaigns of faults, and the table of what became of them.

A campaign is a module with `campaign(seed, count, folder)`, which yields an Outcome for each fault. It is done in shares, one
after the other; share k of a campaign has the seed SEED + k, and repeats exactly. Shares run in two processes that are forked
from one with everything imported. Nothing is written into the source tree.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
# Some packages install a module `tests` of their own.
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(HERE.parent)]
sys.path[:1] = [str(HERE.parent.parent), str(HERE.parent / "common")]

from tests.faults import library  # noqa: E402
from tests.faults.verdicts import Outcome, Table  # noqa: E402


@dataclass(frozen=True)
class Campaign:
    """Attributes: how many faults the whole campaign has, and how many a share has."""

    whole: int
    share: int


CAMPAIGNS = {
    "kills": Campaign(1200, 30),
    "signals": Campaign(300, 20),
    "disk": Campaign(400, 20),
    "writers": Campaign(600, 40),
    "readers": Campaign(2000, 200),
    "damage": Campaign(6000, 500),
    "sources": Campaign(1500, 100),
    "command_lines": Campaign(3500, 100),
}
_LIBRARY, _FOLDER = "LD_PRELOAD", "GLF_FAST_FAULTS"


def main() -> None:
    """Parse the command line, preload the injector, and run the campaigns."""
    options = _options()
    if _FOLDER in os.environ:
        status = _run(options, Path(os.environ[_FOLDER]))
        sys.stdout.flush()
        os._exit(status)  # Triton complains at an orderly exit
    if sys.platform != "linux":
        sys.exit("error: faults are injected with LD_PRELOAD, which this system does not have; run them on Linux")
    # Memory, where there is one: what a kill leaves behind does not depend on the disk.
    where = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="glf_fast-faults-", dir=where) as folder:
        settings = {_LIBRARY: str(library.build(Path(folder))), _FOLDER: folder, "OMP_NUM_THREADS": "1"}
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child gets it, too, and ends; then the folder is removed
        done = subprocess.run([sys.executable, str(HERE), *sys.argv[1:]], env={**os.environ, **settings})
    sys.exit(done.returncode)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--minutes", type=float, default=30.0, help="start no new share after so many minutes (30)")
    parser.add_argument("--only", default="", help=f"names of campaigns, separated by commas: {', '.join(CAMPAIGNS)}")
    parser.add_argument("--seed", type=int, default=0, help="seed of each campaign's first share (0)")
    parser.add_argument("--shares", type=int, default=0, help="number of shares of each campaign, by default the whole")
    parser.add_argument("--count", type=int, default=0, help="number of faults in a share, by default the campaign's")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="shares at a time (2)")
    options = parser.parse_args()
    options.names = options.only.split(",") if options.only else list(CAMPAIGNS)
    if unknown := [name for name in options.names if name not in CAMPAIGNS]:
        parser.error(f"no campaign {', '.join(unknown)}; the campaigns are {', '.join(CAMPAIGNS)}")
    return options


def _run(options: argparse.Namespace, folder: Path) -> int:
    """Run all shares, print progress, the table and what went wrong; returns the exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    del os.environ[_LIBRARY]  # loaded already; a command's own processes do not need it
    importlib.import_module("tests.faults.children").warm()
    for name in options.names:
        importlib.import_module(f"tests.faults.{name}")
    started, table, waiting = time.monotonic(), Table(), _shares(options)
    running: dict[Future[list[Outcome]], tuple[str, int, int]] = {}
    with ProcessPoolExecutor(options.processes, get_context("fork")) as pool:
        while waiting or running:
            while waiting and len(running) < options.processes:
                share = waiting.pop(0)
                running[pool.submit(_share, *share, folder)] = share
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, seed, count = running.pop(future)
                outcomes = future.result()
                wrong = len(table.wrong)
                table.add(outcomes)
                minutes = (time.monotonic() - started) / 60
                print(
                    f"{minutes:5.1f} min  {table.total:6,} faults  {len(table.wrong)} wrong  ({name}, seed {seed})",
                    flush=True,
                )
                for outcome in table.wrong[wrong:]:
                    print(
                        f"\nWRONG: {outcome.verdict.value}: {outcome.campaign}: {outcome.fault}\n{outcome.detail.rstrip()}"
                    )
                    again = f"--only {name} --seed {seed} --shares 1 --count {count}"
                    print(f"repeat: python tests/faults {again}\n", flush=True)
            if time.monotonic() - started > 60 * options.minutes:
                waiting.clear()
    minutes = (time.monotonic() - started) / 60
    print(f"\n{table.markdown()}\n\n{table.total:,} faults in {minutes:.1f} minutes, seed {options.seed}")
    return 1 if table.wrong else 0


def _shares(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    """(campaign, seed, faults) of all shares, so that at each time all campaigns have come equally far."""
    shares = []
    for name in options.names:
        campaign = CAMPAIGNS[name]
        number = options.shares or -(-campaign.whole // campaign.share)
        for k in range(number):
            shares.append((k / number, name, options.seed + k, options.count or campaign.share))
    return [share[1:] for share in sorted(shares)]


def _share(name: str, seed: int, count: int, folder: Path) -> list[Outcome]:
    """One share, in a folder of its own, which is removed afterwards."""
    place = folder / f"{name}-{seed}"
    try:
        return list(importlib.import_module(f"tests.faults.{name}").campaign(seed, count, place))
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
