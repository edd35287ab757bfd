"""Makes kernels/launch_table.json without a GPU: the launches that should be fastest, of those that compile well.

    python tools/choose_launches.py --triton DIR      # --only KEY: entries that contain this, such as 'medium bf16'

DIR holds another Triton than the installed one (pip install --no-deps --target DIR triton==…): launches are chosen over both.
Candidates come in the order of their predicted times (flow_costs.py). The first one is taken whose kernels, those of the entry
and of the named flows (kernels/shipped.py), fit into shared memory, spill at most KEEP bytes in any version and overlap loads
and arithmetic in every loop; if there is none among the first TRIED, the one that spills least. sm_80 and sm_100 begin with
what sm_90 took: predictions are for sm_90, and the others' multiprocessors differ less than the predictions err.

tools/tune_flow.py replaces what is chosen here by what is measured.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import launch_file
from flow_candidates import candidates, keys, shared_limit
from triton_resources import Compilers, Resources

from glf_fast.kernels.launch_table import Launch
from glf_fast.kernels.shipped import kernels

KEEP = 64  # bytes spilled that are good enough: versions of ptxas differ by as much
TRIED = 24

Taken = dict[str, dict[str, Resources]]  # what kernels take, by name and Triton version


def take(key: str, how: Launch, arch: str, compilers: Compilers, below: float) -> tuple[int, Taken] | None:
    """The most that a kernel of this launch spills, and what each takes.

    None as soon as one does not compile, does not fit, has a loop that waits for its loads, or spills no less than `below`.
    """
    most = 0
    found: Taken = {}
    for spec in kernels(key, how, int(arch)):
        answers = [future.result() for future in compilers.submit(spec, int(arch))]
        found[spec.name] = {}
        for version, taken in zip(compilers.versions, answers, strict=True):
            if taken is None or taken.shared > shared_limit(key, arch) or taken.spills >= below:
                return None
            if taken.buffers is not None and taken.buffers < 2:
                return None
            most = max(most, taken.spills)
            found[spec.name][version] = taken
    return most, found


def choose(key: str, arch: str, first: Launch | None, compilers: Compilers) -> tuple[Launch, Taken]:
    """The launch of a key, and what its kernels take; `first` is tried before the candidates."""
    ranked = [how for how in candidates(key, arch) if how.num_stages > 2]  # with 2, nothing overlaps
    if first:
        ranked = [first, *ranked[ranked.index(first) + 1 if first in ranked else 0 :]]
    best: tuple[float, Launch, Taken] = (math.inf, ranked[0], {})
    for how in ranked[:TRIED]:
        if taken := take(key, how, arch, compilers, best[0]):
            best = (taken[0], how, taken[1])
        if best[0] <= KEEP:
            break
    assert best[2], f"nothing fits for {key} on sm_{arch}"
    return best[1:]


def main() -> None:
    """Write the table, entry by entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triton", action="append", default=[], help="folder with another Triton that must agree")
    parser.add_argument("--only", default="", metavar="KEY", help="only entries whose key contains this")
    parser.add_argument("--out", type=Path, default=launch_file.TABLE, help="where the table goes")
    arguments = parser.parse_args()
    table = launch_file.read()
    compilers = Compilers([None, *arguments.triton])
    chosen = [key for key in keys() if arguments.only in key]
    for arch in ("90", "80", "100"):
        launches, resources, measured = (
            table[name].setdefault(arch, {}) for name in ("launches", "resources", "microseconds")
        )
        table["made"][arch] = f"compiled only, Triton {' and '.join(compilers.versions)}; not measured"

        def of(key: str, arch: str = arch) -> tuple[Launch, Taken]:
            first = None if arch == "90" else Launch(*table["launches"]["90"][key])
            return choose(key, arch, first, compilers)

        # Several keys at once keep the compilers busy where a candidate's kernels are fewer than these.
        with ThreadPoolExecutor(len(compilers.versions) + 1) as threads:
            for key, (how, taken) in zip(chosen, threads.map(of, chosen), strict=True):
                launches[key] = list(how)
                measured.pop(key, None)
                for name, by_version in taken.items():
                    resources[name] = {version: list(found) for version, found in by_version.items()}
                    print(f"sm_{arch}  {name:48} {list(how)} {resources[name]}", flush=True)
                launch_file.write(arguments.out, table)
    compilers.close()


if __name__ == "__main__":
    main()
