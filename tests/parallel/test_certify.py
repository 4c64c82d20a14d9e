"""Every layout computes what one process computes: the certificate, in short."""

from __future__ import annotations

import pytest

from litchi.parallel.crew import Crew
from litchi.train.certify import Case, cases, certify


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_a_layout_computes_what_one_process_computes(crew: Crew, case: Case):
    findings = list(certify(crew, [case]))
    assert len(findings) == 3
    assert not [finding for finding in findings if not finding.passes]
