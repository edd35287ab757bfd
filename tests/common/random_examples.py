"""Property tests: few random examples in the quick run, many in the long one."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

__all__ = ["random_examples"]

Check = Callable[..., None]


def random_examples(quick: int, long: int, **drawn: st.SearchStrategy[object]) -> Callable[[Check], Check]:
    """Decorator: a test whose arguments are `drawn`, or `data` to draw from, `quick` times, and `long` times if marked so.

    Every run has the same examples.
    """

    def decorate(check: Check) -> Check:
        drawing = given(**(drawn or {"data": st.data()}))(check)

        @pytest.mark.parametrize("examples", [quick, pytest.param(long, marks=pytest.mark.long)])
        def test(examples: int) -> None:
            settings(max_examples=examples, deadline=None, derandomize=True)(drawing)()

        test.__doc__ = check.__doc__
        return test

    return decorate
