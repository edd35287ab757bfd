"""Triton's interpreter without the work that it repeats, or does for nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

__all__ = ["quicken"]


def quicken() -> None:
    """Make Triton's interpreter about twice as fast, with the same results."""
    _patch_once_a_launch()
    _check_no_sums_twice()
    _make_types_once()


def _patch_once_a_launch() -> None:
    """Have the interpreter patch `triton.language` once a launch, and not again at every call of a device function.

    Its patches hold until the launch ends, so that the second one changes nothing; but it walks through all members of the
    language, and a flow's kernel calls hundreds of functions.
    """
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    languages = (interpreter.tl, interpreter.tl.core)
    done: set[object] = set()  # functions of this launch, and the languages that they see

    def patch_once(function: Callable[..., Any]) -> Any:
        if function in done:
            return None
        seen = {language for language in languages if any(value is language for value in function.__globals__.values())}
        patched = None if seen and seen <= done else patch(function)
        done.update(seen, (function,))
        return patched

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> Any:
        done.clear()
        try:
            return launch(self, *arguments, **options)
        finally:
            done.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh


def _check_no_sums_twice() -> None:
    """Skip the search for overflows: it computes all int32 sums and products again in int64, which is 40 % of a flow's time.

    Its findings are asserted in debug mode alone, in which no test runs.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _make_types_once() -> None:
    """Remember types and shapes, which never change, and of which a launch makes 100,000 that are alike."""
    from triton.runtime import interpreter

    tl, make, numpy_type = interpreter.tl, interpreter.tl.block_type, interpreter._get_np_dtype
    initialize = tl.tensor.__init__
    shapes: dict[tuple[int, ...], Any] = {}
    blocks: dict[tuple[str, tuple[int, ...]], Any] = {}
    arrays: dict[str, Any] = {}

    def of(shape: Any, element: Any) -> Any:
        key = (element.name, tuple(shape))
        if key not in blocks:
            blocks[key] = make(element, shape)
        return blocks[key]

    def array_type(element: Any) -> Any:
        if element.name not in arrays:
            arrays[element.name] = numpy_type(element)
        return arrays[element.name]

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        shape = kind.shape if kind.is_block() else ()
        if shape not in shapes:
            initialize(self, handle, kind)
            shapes[shape] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = shapes[shape]

    tl.tensor.__init__ = tensor
    tl.block_type.with_element_ty = lambda self, element: of(self.shape, element)
    interpreter.InterpreterBuilder.get_block_ty = lambda self, element, shape: of(shape, element)
    interpreter._get_np_dtype = array_type
