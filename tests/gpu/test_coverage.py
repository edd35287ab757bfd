"""Without a GPU: what the shortened lists of GPU tests still cover."""

import itertools

from coupling_cases import COUPLINGS, LAYOUTS, PRECISIONS

from glf_fast.reference import LOG_SCALES


def test_couplings_cover_every_branch_and_pair() -> None:
    values = (tuple(LOG_SCALES), (False, True), (False, True), LAYOUTS, PRECISIONS)
    assert {case[:3] for case in COUPLINGS} == set(itertools.product(*values[:3]))
    for a, b in itertools.combinations(range(5), 2):
        pairs = {(case[a], case[b]) for case in COUPLINGS}
        if (a, b) == (0, 3):
            assert len(pairs) == len(COUPLINGS)
        else:
            assert pairs == set(itertools.product(values[a], values[b]))
