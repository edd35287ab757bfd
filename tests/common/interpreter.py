"""Triton's interpreter without the work that it repeats."""

from collections.abc import Callable
from typing import Any

__all__ = ["patch_once_a_launch"]


def patch_once_a_launch() -> None:
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
