#!/usr/bin/env bash
# One wheel, several torch versions: builds the abi3 wheel with this environment's torch, installs it beside other
# versions of torch in environments of their own, and runs the kernels there against the reference. Then an
# installation without a compiler, which must succeed and say what is missing.
# Usage: tools/test_wheel.sh FOLDER [TORCH_VERSION …]; PYTHON is the interpreter of an environment that can build.
set -euo pipefail
folder=$1
shift
versions=("${@:-2.10.0}")
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
rm -rf "$folder"/source "$folder"/wheel "$folder"/bare "$folder"/own
mkdir -p "$folder/source" "$folder/bare"
git -C "$root" archive HEAD | tar -x -C "$folder/source"

"$python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder/wheel" "$folder/source"
wheel=("$folder"/wheel/glf_fast-*-abi3-*.whl)
echo "built $(basename "${wheel[0]}") with torch $("$python" -c 'import torch; print(torch.__version__)')"

cat > "$folder/check.py" <<'PYTHON'
from pathlib import Path

import torch
import glf_fast
from glf_fast import ops, reference, use_backend

assert glf_fast.backends()["cpp"].startswith("ready"), glf_fast.backends()["cpp"]
package = Path(glf_fast.__file__).parent
assert package.is_relative_to(Path(__file__).parent), package
assert (package / "cuda" / "kernels.cuh").exists(), "what CuPy compiles was not installed"
torch.manual_seed(0)
for linear in ("plu", "dense"):
    flow = glf_fast.CouplingFlow(9, 3, (16,), linear=linear).double()
    x = torch.randn(30, 9, dtype=torch.float64)
    flow(x)
    found = []
    for backend in ("cpp", "reference"):
        with use_backend(backend):
            z, logdet = flow(x)
            back, _ = flow.inverse(x)
            loss = (z**2).sum() - logdet.sum() + (back**3).sum()
            found.append([z, logdet, back, *torch.autograd.grad(loss, list(flow.parameters()))])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
W = torch.randn(100, 20, 20, dtype=torch.float64)
for mine, theirs in zip(ops.slogdet_inverse(W), reference.slogdet_inverse(W), strict=True):
    torch.testing.assert_close(mine, theirs)
print(f"torch {torch.__version__}: kernels agree with the reference ({glf_fast.backends()['cpp']})")
PYTHON

# Where it was built, beside the sources: what is imported must be the wheel's.
"$python" -m pip install -q --no-deps --target "$folder/own" "${wheel[0]}"
(cd "$folder" && PYTHONPATH="$folder/own" "$python" check.py)

for version in "${versions[@]}"; do
    environment=$folder/torch-$version
    if [ ! -x "$environment/bin/python" ]; then
        "$python" -m venv "$environment"
        "$environment/bin/python" -m pip install -q "torch==$version" numpy safetensors
    fi
    "$environment/bin/python" -m pip install -q --no-deps --force-reinstall "${wheel[0]}"
    (cd "$folder" && "$environment/bin/python" check.py)
done

# No compiler: every name that setuptools could call fails. From sources without the build folder of the wheel.
mkdir "$folder/bare/source"
git -C "$root" archive HEAD | tar -x -C "$folder/bare/source"
for name in cc c++ gcc g++ clang clang++ nvcc ninja; do
    printf '#!/bin/sh\nexit 1\n' > "$folder/bare/$name"
    chmod +x "$folder/bare/$name"
done
PATH="$folder/bare:$PATH" CC=cc CXX=c++ "$python" -m pip install -q --no-deps --no-build-isolation \
    --target "$folder/bare/site" "$folder/bare/source"
(cd "$folder" && PYTHONPATH="$folder/bare/site" "$python" -m glf_fast.info | tee bare/info.txt)
grep -q "backend cpp *not built" "$folder/bare/info.txt"
echo "an installation without a compiler succeeds and says what is missing"
