"""What `tools/gpu_here.py` runs in the GPU machine's environment, in a copy of the working tree.

    python tools/gpu_here_steps.py load       # the extension's libraries hold all operations
    python tools/gpu_here_steps.py run OUT    # over the stub GPU: the steps of both calls of tools/gpu.py, one after the other

The steps are tools/gpu.py's own, less what the stub GPU has no use for: time limits, the profiler or sanitizer that stands
in front of a command, and the measuring of tuning, of which everything is compiled that it would measure. A script's main
function is called, so that wrong results are not judged (stub/sitecustomize.py).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu_steps import ROOT, WORK, Step, importable

SECONDS = "36000"  # enough for everything
LIBRARIES = ("normflows", "nflows", "zuko", "FrEIA")


def load() -> list[str]:
    """What csrc/ implements and this torch does not find in the libraries."""
    import torch

    from glf_fast import backends

    states = backends()
    print("\n".join(f"   {name}: {states[name]}" for name in ("cpp", "cuda")), flush=True)
    missing = [name for name in ("cpp", "cuda") if not states[name].startswith("ready") or "CuPy" in states[name]]
    for path in sorted((ROOT / "csrc").glob("bindings*.cpp")):
        for key, block in re.findall(r"LIBRARY_IMPL\(glf_fast, (\w+), m\) \{(.*?)^\}", path.read_text(), re.M | re.S):
            for name in re.findall(r'm\.impl\("(\w+)"', block):
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"glf_fast::{name}", key):
                    missing.append(f"{name} on {key}")
    return missing


def commands(out: Path) -> Iterator[Step]:
    """Each thing that the two calls run, once."""
    from gpu import PREPARATION, Call

    planned = Call(out, before=WORK / "none", carry=WORK / "none", rehearse=False)
    seen = set()
    for step in (*planned.first(), *planned.second()):
        if step.name in PREPARATION and step.name != "wheels":
            continue
        adapted = replace(step, command=over_stub(step.command))
        if tuple(adapted.command) not in seen:
            seen.add(tuple(adapted.command))
            yield adapted


def over_stub(command: list[str]) -> list[str]:
    """A command as it can be run here."""
    python, *rest = command[command.index(sys.executable) :]
    rest = [part.replace("{seconds}", SECONDS) for part in rest]
    if "-n" in rest:
        rest[rest.index("-n") + 1] = str(os.cpu_count())
    if rest[0].startswith("tools/"):
        name = Path(rest[0]).stem
        run = f"import sys; sys.path.insert(0, 'tools'); import {name}; {name}.main()"
        options = {"tune_flow": ["--precompile"], "gpu_profile": [*rest[1:], "--work"]}
        rest = ["-c", run, *options.get(name, rest[1:])]
    return [python, *rest]


def of_other_libraries(rows: Path) -> bool:
    """Whether all that failed in the benchmark are flows as other libraries have them: their Python asks for values.

    zuko indexes by masks, and normflows inverts matrices; what the stub GPU says of them is nonsense.
    """
    names = "|".join(map(re.escape, (*LIBRARIES, "original")))
    wrong = [line for line in json.loads(rows.read_text(encoding="utf-8"))["wrong"] if ": not measured: " not in line]
    return bool(wrong) and all(re.search(rf", ({names})(, graphed)?: ", line) for line in wrong)


def rows_of(command: list[str]) -> Path:
    """The file that a command of the benchmark writes."""
    return Path(command[command.index("bench.gpu") + 2]) / "gpu.json"


def run(out: Path) -> list[str]:
    """Run them all; returns the names of those that failed."""
    from gpu import shared

    failed = []
    environment = shared(False, WORK / "none")
    with importable(environment):
        for step in commands(out):
            print(f"-- {step.name}", flush=True)
            started = time.monotonic()
            code = subprocess.run(step.command, cwd=ROOT, env=environment | step.environment).returncode
            if code and "bench.gpu" in step.command and of_other_libraries(rows_of(step.command)):
                print(f"   {step.name}: only flows of other libraries failed", flush=True)
                code = 0
            print(
                f"   {step.name}: {f'failed with {code}' if code else 'ok'}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
            if code:
                failed.append(step.name)
    return failed


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:] == ["load"]:
        environment = dict(os.environ)
        with importable(environment):
            sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
            failed = load()
    elif sys.argv[1:2] == ["run"] and len(sys.argv) == 3:
        failed = run(Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
    if failed:
        sys.exit(f"not ok: {', '.join(failed)}")


if __name__ == "__main__":
    main()
