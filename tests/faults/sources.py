"""Odd sources of images: folders, zips and arrays made from a grammar, with contents that are known by construction.

Where a source loads, the numbers of images, their shapes and their pixels must be the right ones; where it does not, one line
says why. A source whose right treatment is open (a header with odd spaces, say) is judged by the absence of tracebacks alone.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from glf_fast import train
from glf_fast.data import __main__ as data
from glf_fast.metrics import __main__ as metrics
from tests.faults.arrays import arrays
from tests.faults.children import Ended
from tests.faults.collections_of_files import SPLITS, Source, folder, zipped
from tests.faults.judging import judge, outcomes, run
from tests.faults.verdicts import Outcome, Verdict

KINDS: tuple[Callable[[Path, random.Random], Source], ...] = (folder, folder, zipped, arrays)
LINE = re.compile(r"^(train|test) +\(([\d, ]+)\) uint8, fingerprint ([0-9a-f]{16})$", re.M)
COUNTS = re.compile(r": ([\d,]+) training and ([\d,]+) test items")


def campaign(seed: int, count: int, folder: Path) -> Iterator[Outcome]:
    """Make `count` sources one after another, and give each to a command."""
    place = folder / "sources"

    def one(number: int) -> tuple[str, Verdict, str]:
        chance = random.Random(f"{seed} {number}")
        _remove(place)
        (place / "cache").mkdir(parents=True)
        np.save(place / "other.npy", np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8))
        make = chance.choice(KINDS)
        source = make(place, chance)
        name, verdict, detail = _use(source, place, chance)
        return f"{make.__name__}, {name}", verdict, f"{source.path!r}: {detail}" if detail else ""

    yield from outcomes("source", count, seed, one)
    _remove(place)


def _use(source: Source, place: Path, chance: random.Random) -> tuple[str, Verdict, str]:
    """Give the source to a command, and judge what the command says of it."""
    skip = source.arrays is None and chance.random() < 0.3
    more = ("--skip-unusable",) if skip else ()
    expected = None if source.refused else source.expected(skip)
    path = source.path if not source.path.startswith("-") else f"./{source.path}"
    start = partial(run, place=place, before=source.before)
    kind = chance.choice(("info", "info", "info", "calc", "calc", "dry-run"))
    if kind == "info":
        ended = start(data, "info", path, *more)
        found = {
            split: (tuple(map(int, shape.split(", "))), digest) for split, shape, digest in LINE.findall(ended.out)
        }
        right = (
            expected is not None
            and found.keys() == expected.keys()
            and all(
                found[split][0] == shape and digest in ("", found[split][1])
                for split, (shape, digest) in expected.items()
            )
        )
    elif kind == "calc":
        ended = start(metrics, "calc", path, "other.npy", "--extractor", "tiny", "--json", *more)
        n = sum(shape[0] for shape, _ in expected.values()) if expected else 0
        alike = expected is not None and len({shape[1:] for shape, _ in expected.values()}) == 1
        expected = expected if alike else None
        right = ended.status != 0 or (alike and json.loads(ended.out)["protocol"]["n"] == n)
    else:
        options = ("--preset", "smoke", "--batch-size", "2", "--device", "cpu", "--dry-run")
        ended = start(train, *options, "--data.source", path, *(("--data.skip-unusable",) if skip else ()))
        counts = [int(number.replace(",", "")) for number in (COUNTS.findall(ended.err) or [("0", "0")])[0]]
        right = expected is not None and counts == [expected[split][0][0] for split in SPLITS]
        expected = expected if ended.status == 0 else None  # small and colourful sources are refused for good reasons
    if source.refused is None:
        return kind, *judge(ended)
    if expected is None and ended.status == 0:
        return kind, Verdict.UNEQUAL, f"accepted, though it must be refused: {ended.out[-500:]!r}"
    if expected is not None and ended.status == 2:
        return kind, Verdict.UNEQUAL, f"refused, though it is good: {_last(ended)!r}"
    return kind, *_with_expected(judge(ended, equal=right), expected)


def _with_expected(judged: tuple[Verdict, str], expected: object) -> tuple[Verdict, str]:
    verdict, detail = judged
    return verdict, f"{detail} expected {expected}" if detail else ""


def _last(ended: Ended) -> str:
    return ended.error_lines[-1] if ended.error_lines else ""


def _remove(place: Path) -> None:
    """Remove a folder, whatever the permissions in it."""
    for root, folders, _ in os.walk(place):
        for name in folders:
            path = os.path.join(root, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(place, ignore_errors=True)
