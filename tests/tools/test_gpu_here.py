"""The rehearsal of a GPU machine, as far as it goes without one's packages."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_here
import gpu_here_steps
import pytest
import stub_gpu

ROOT = Path(__file__).parents[2]

# A module that judges results, as tests and benchmarks do; it returns what it has evaluated.
JUDGING = """
from types import SimpleNamespace as Module
def refuse(*_):
    raise RuntimeError("judged")
torch = Module(testing=Module(assert_close=refuse), lu_unpack=lambda factors, pivots: note(pivots))
seen = []
def note(x):
    seen.append(x)
    return x
def test_of_values():
    assert note(1) == 2, "never"
    torch.testing.assert_close(note(2), 3)
    if note(3):
        raise AssertionError(note("wrong"))
    torch.lu_unpack(None, 7)
    note("end")
def test_one_launch_in_each_direction():
    assert note(4) == 5
def other_errors():
    raise ValueError("counts")
"""


def test_kernels_are_known_by_name() -> None:
    names = gpu_here.kernel_names()
    assert {"flow_kernel", "flow_backward_kernel", "coupling_kernel", "coupling_backward_kernel"} <= names
    assert not any(name.startswith("triton_") for name in names)  # torch.compile's


def judged(tmp_path: Path, call: str) -> str:
    """What a process that has the stub's sitecustomize.py says about a module of tests/gpu."""
    (tmp_path / "tools" / "stub").mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "stub" / "sitecustomize.py", tmp_path / "tools" / "stub")
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "gpu" / "judging.py").write_text(JUDGING)
    code = f"import sys; sys.path.insert(0, 'tests/gpu'); import judging; {call}; print(judging.seen)"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": "tools/stub", "PYTHONPYCACHEPREFIX": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("judging.test_of_values()", "[1, 2, 3, 'wrong', 1, 'end']"),
        ("judging.test_one_launch_in_each_direction()", "AssertionError"),
        ("judging.other_errors()", "ValueError: counts"),
    ],
)
def test_over_the_stub_everything_runs_and_values_alone_are_not_judged(tmp_path: Path, call: str, said: str) -> None:
    assert judged(tmp_path, call) == said


def test_permutations_that_nobody_computed_are_no_errors(tmp_path: Path) -> None:
    assert "raise ValueError(" in (ROOT / "glf_fast" / "flow" / "indices.py").read_text()
    for name in ("indices", "others"):
        path = tmp_path / "glf_fast" / "flow" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("def check(x):\n    raise ValueError(x)\n")
    call = "sys.path.insert(0, 'glf_fast/flow'); import {0}; judging.seen = {0}.check('signs')"
    assert judged(tmp_path, call.format("indices")) == "None"
    shutil.rmtree(tmp_path / "tools"), shutil.rmtree(tmp_path / "tests")
    assert judged(tmp_path, call.format("others")) == "ValueError: signs"


def test_steps_that_nobody_made_count_as_made() -> None:
    source = ROOT / "glf_fast" / "fitting" / "graphed.py"
    assert source.read_text().count("int(step.made)") == 1


def test_what_is_judged_all_the_same_exists() -> None:
    tree = ast.parse((ROOT / "tools" / "stub" / "sitecustomize.py").read_text())
    (names,) = (ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "JUDGED")  # fmt: skip
    text = "\n".join(path.read_text() for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    assert names and all(f"def {name}(" in text for name in names)


def test_the_stub_takes_the_place_of_what_computes_on_a_gpu_alone() -> None:
    taken = ["cudaMalloc", "__cudaRegisterFatBinary", "cuLaunchKernelEx", "cublasSgemm_v2", "cublasLtMatmul",
             "cudnnCreate", "cusolverDnCreate", "cusparseCreate", "ncclAllReduce", "cuptiSubscribe"]  # fmt: skip
    real = ["nvrtcCompileProgram", "nvJitLinkCreate", "cuFileRead", "curl_easy_init", "c10_cuda_check"]
    assert all(map(stub_gpu.PREFIXES.match, taken)) and not any(map(stub_gpu.PREFIXES.match, real))


@pytest.mark.parametrize(
    ("wrong", "forgiven"),
    [
        (["flow sbi, train, tf32, zuko: RuntimeError: shapes", "projects a, b, step, original: ValueError: x"], True),
        (
            [
                "flow sbi, train, tf32, FrEIA, graphed: RuntimeError: x",
                "flow sbi, train, tf32, nflows: not measured: x",
            ],
            True,
        ),
        (["flow sbi, train, tf32, zuko: RuntimeError: x", "projects a, step, glf_fast: CompilationError: x"], False),
        (["flow sbi, train, tf32, eager: RuntimeError: zuko: x"], False),
        ([], False),
    ],
)
def test_of_the_benchmark_other_libraries_may_fail_over_the_stub(
    tmp_path: Path, wrong: list[str], forgiven: bool
) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"wrong": wrong}))
    rows = gpu_here_steps.rows_of(
        ["nice", sys.executable, "-m", "bench.gpu", "second", str(tmp_path), "--seconds", "9"]
    )
    assert gpu_here_steps.of_other_libraries(rows) is forgiven
