"""A training run as long as the time on a GPU allows, and its speed: `python tools/gpu_train.py OUT [--seconds S]`.

Writes OUT/training.json (preset, images, epochs, images per second, losses, scores) and OUT/samples.png. The preset is that of
the data found in --data (build/gpu/data): fashion-mnist or mnist; without data it is smoke, scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from glf_fast.data.idx import FASHION_MNIST, MNIST
from glf_fast.errors import UserError
from glf_fast.training import runs
from glf_fast.training.pictures import latest_picture

__all__ = ["main", "preset_for"]

ROOT = Path(__file__).parent.parent
AROUND = 25  # seconds of starting, final scores and report, beside the training itself


def preset_for(folder: Path) -> tuple[str, list[str]]:
    """The preset whose data lie in a folder, and the options that it needs."""
    for data in (FASHION_MNIST, MNIST):
        try:
            found = data.find(folder if folder.is_dir() else None, download=False)
        except UserError:
            continue
        return data.name, ["--data-dir", str(found)]
    return "smoke", ["--epochs", "400"]


def summary(folder: Path, preset: str) -> dict[str, Any]:
    """What a run in its folder came to."""
    records = runs.read_metrics(folder)
    steps = [record for record in records if "images_per_second" in record]
    speeds = [record["images_per_second"] for record in steps[1:]]  # the first one holds the compilers' time
    return {
        "preset": preset,
        "images": max((record["images"] for record in records), default=0),
        "epochs": max((record["epoch"] for record in records), default=0.0),
        "images_per_second": statistics.median(speeds) if speeds else None,
        "last": steps[-1] if steps else None,
        "scores": runs.read_scores(folder),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="Time for all, start and final scores included.")
    parser.add_argument("--data", type=Path, default=ROOT / "build" / "gpu" / "data")
    parser.add_argument(
        "--run", type=Path, default=ROOT / "build" / "gpu" / "run", help="Folder of the run, made anew."
    )
    arguments = parser.parse_args()
    preset, options = preset_for(arguments.data)
    shutil.rmtree(arguments.run, ignore_errors=True)
    minutes = max(5.0, arguments.seconds - AROUND) / 60
    # The tiny extractor comes with the package; the presets' own would have to be fetched.
    scores = ["--score.extractors", "tiny", "--score.every", "0"]
    command = [sys.executable, "-m", "glf_fast.train", "--preset", preset, "--max-minutes", f"{minutes:.3f}", *scores]
    done = subprocess.run([*command, *options, "--out", str(arguments.run)])
    if arguments.run.is_dir():
        found = summary(arguments.run, preset)
        (arguments.out / "training.json").write_text(json.dumps(found, indent=1) + "\n")
        if picture := latest_picture(arguments.run, "samples"):
            shutil.copy(picture, arguments.out / f"samples{picture.suffix}")
        print(
            f"{preset}: {found['images']:,} images, {found['epochs']:.1f} epochs, {found['images_per_second']} images/s"
        )
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
