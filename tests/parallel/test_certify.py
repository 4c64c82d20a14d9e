"""Every layout computes what one process computes: the certificate, in short.

`litchi certify` tries all kinds of batches with every pair of axes; here pairs read images alone.
"""

from __future__ import annotations

import pytest

from litchi.parallel.crew import Crew
from litchi.train.certify import KINDS, Case, axes, certify, pairs


def holds(crew: Crew, case: Case, kinds: tuple[str, ...]) -> None:
    findings = list(certify(crew, [case], kinds))
    assert len(findings) == len(kinds)
    assert not [finding for finding in findings if not finding.passes]


@pytest.mark.parametrize("case", [*axes()], ids=lambda case: case.name)
def test_an_axis_computes_what_one_process_computes(crew: Crew, case: Case):
    holds(crew, case, KINDS)


@pytest.mark.parametrize("case", [*pairs()], ids=lambda case: case.name)
def test_a_pair_of_axes_computes_what_one_process_computes(crew: Crew, case: Case):
    holds(crew, case, ("image",))
