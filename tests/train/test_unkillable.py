"""Killed at random moments, of one rank or of all, in saves as well, a run ends as if nobody had touched it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.house.sources import ROOT


def test_killed_at_random_moments_four_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    """Of `python bench/kills.py` three kills; fifty are in its results."""
    command = [sys.executable, "-m", "bench.kills", "--kills", "3", "--seed", "0", "--show", "--folder", str(tmp_path)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    tally = json.loads(answer.stdout.splitlines()[-1])
    assert tally["same"] and tally["kills"] == 3 and tally["in_saves"] >= 1, answer.stderr
    assert tally["torn"] == 0 and tally["checked"] >= 1, answer.stderr
    assert 1 <= tally["of_all"] <= 2 and tally["restarts"] == 3 - tally["of_all"], answer.stderr
