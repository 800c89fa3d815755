"""Templates, from which training starts, are members of zeros shaped like the nearest member."""

import numpy as np
import pytest

from tests.catalogue import CASES, Case, normal
from tvmstruct.families import FAMILIES
from tvmstruct.ops import describe


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_template_is_shaped_like_the_nearest_member(case: Case) -> None:
    options = {"sweeps": 1} if case.family in ("bh4", "low_rank_lgp") else {}
    nearest = FAMILIES[case.family].nearest(normal(*case.shape), **case.parameters, **options).op
    template = FAMILIES[case.family].template(*case.shape, **case.parameters, **options)
    assert describe(template) == describe(nearest)
    assert [a.shape for a in template.arrays()] == [a.shape for a in nearest.arrays()]
    assert all(a.dtype == np.float32 and not a.any() for a in template.arrays())
