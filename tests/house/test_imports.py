"""No floor looks up, no stage meets another, and a file that stands on no floor is an error."""

from __future__ import annotations

import subprocess
import sys

from tests.house.sources import ROOT


def test_the_import_contract_holds():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr
