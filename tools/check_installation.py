"""Checks the glf_fast of this environment, from a folder that is not the repository: kernels, a flow, a training run.

    python check_installation.py FOLDER [--backend cpp|none]

It runs a flow forward, inverse and backward in C++ against the reference, then `glf_fast.train --preset smoke` into FOLDER.
`--backend none` is for an installation without a compiler, which has the reference alone.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

import glf_fast
from glf_fast import ops, reference, use_backend

PACKAGE = Path(glf_fast.__file__).parent


def check_files() -> None:
    """The package is complete, and is the installed one, whatever the working directory holds."""
    assert PACKAGE.parent.name in ("site-packages", "site"), f"{PACKAGE} is not an installation"
    for name in ("py.typed", "cuda/kernels.cuh", "kernels/launch_table.json", "presets/smoke.toml", "page.html"):
        assert (PACKAGE / name).is_file(), f"{PACKAGE} lacks {name}"


def check_flows(backend: str) -> None:
    """Both directions and all gradients of flows are those of the reference."""
    torch.manual_seed(0)
    x = torch.randn(30, 9, dtype=torch.float64)
    flows = [
        glf_fast.CouplingFlow(9, 3, (16,), linear="plu"),
        glf_fast.CouplingFlow(9, 3, (16,), linear="dense", coupling="spline"),
        glf_fast.AutoregressiveFlow(9, 2, (16,)),
    ]
    for flow in (flow.double() for flow in flows):
        flow(x)  # initialises ActNorm
        found = []
        for name in (backend, "reference"):
            with use_backend(name):
                z, logdet = flow(x)
                back, _ = flow.inverse(x)
                loss = (z**2).sum() - logdet.sum() + (back**3).sum()
                found.append([z, logdet, back, *torch.autograd.grad(loss, list(flow.parameters()))])
        for computed, expected in zip(*found, strict=True):
            torch.testing.assert_close(computed, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow.inverse(flow(x)[0])[0], x)
    matrices = torch.randn(100, 20, 20, dtype=torch.float64)
    for computed, expected in zip(ops.slogdet_inverse(matrices), reference.slogdet_inverse(matrices), strict=True):
        torch.testing.assert_close(computed, expected)


def check_training(folder: Path) -> None:
    """The smoke preset trains, writes its report, and ends with a model that samples."""
    run = folder / "smoke"
    for command in (
        ["glf_fast.train", "--preset", "smoke", "--out", run, "--device", "cpu"],
        ["glf_fast.sample", run, "--n", "4", "--out", folder / "samples.png"],
    ):
        done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "<html" in (run / "report.html").read_text(encoding="utf-8").lower()
    assert json.loads((run / "scores.json").read_text(encoding="utf-8"))
    assert (folder / "samples.png").stat().st_size > 500


def main() -> None:
    """Run the checks; an assertion fails at the first that does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the run is written; made if need be")
    parser.add_argument("--backend", choices=("cpp", "none"), default="cpp")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    check_files()
    state = glf_fast.backends()["cpp"]
    assert state.startswith("ready" if options.backend == "cpp" else "not built"), state
    check_flows("cpp" if options.backend == "cpp" else "reference")
    check_training(options.folder)
    print(f"Python {platform.python_version()}, torch {torch.__version__}, cpp {state}: flows agree, smoke trains")


if __name__ == "__main__":
    main()
