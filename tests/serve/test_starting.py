"""A start that does things beside each other refuses what it refused before, and leaves nothing changed behind it."""

from __future__ import annotations

import gc
import hashlib
import importlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from litchi.cli import find_checkpoint, main
from litchi.config import BadInput
from litchi.model.seal import Check, check_files, digest, read_meta
from litchi.serve.starting import import_all, starting

EARLY = "litchi.cli, litchi.serve.starting, litchi.serve.member, litchi.serve.spawn, litchi.model.seal"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What a server keeps for ever is this process's garbage."""
    yield
    gc.unfreeze()


@pytest.fixture
def torn(tmp_path: Path) -> Path:
    """The shipped checkpoint with one bit changed in its weights."""
    folder = tmp_path / "torn"
    shutil.copytree(find_checkpoint("tiny"), folder)
    weights = folder / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    return folder


def test_what_begins_before_torch_is_there_does_not_import_it() -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {EARLY}; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "False"


def test_one_process_imports_nothing_of_what_others_need() -> None:
    """Neither how ranks share a network nor what families of models there are."""
    program = "import sys, litchi.serve.loading, litchi.serve.run; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    needless = {"litchi.serve.ranks", "litchi.serve.tensor", "litchi.parallel", "litchi.model.families", "minigrid"}
    assert not needless & set(found.stdout.split())


def test_files_are_checked_in_a_thread_of_its_own(torn: Path) -> None:
    Check(find_checkpoint("tiny")).result()
    with pytest.raises(BadInput, match=r"model\.safetensors has changed since it was saved"):
        Check(torn).result()
    with pytest.raises(BadInput, match=r"meta\.json"):
        Check(torn / "model").result()


def test_a_check_that_nobody_wants_ends_early_and_knows_nothing(torn: Path, monkeypatch) -> None:
    monkeypatch.setattr("litchi.model.seal.HASHED", 4096)
    unwanted = threading.Event()
    with pytest.raises(BadInput, match="has changed"):
        check_files(torn, read_meta(torn), unwanted)
    unwanted.set()
    check_files(torn, read_meta(torn), unwanted)
    weights = torn / "model" / "model.safetensors"
    assert digest(weights, unwanted) != digest(weights), "it was read to the end"


def test_a_digest_is_that_of_all_bytes_however_many_pieces_there_are(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    for size in (0, 1, 4095, 4096, 4097, 20_000):
        path.write_bytes(bytes(at * 7 % 256 for at in range(size)))
        monkeypatch.setattr("litchi.model.seal.HASHED", 4096)
        assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_torn_checkpoint_is_refused_by_the_command(torn: Path, capsys) -> None:
    assert main(["serve", str(torn)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "model.safetensors has changed since it was saved" in said


def test_a_start_leaves_the_interpreter_as_it_was_but_for_what_stays(torn: Path) -> None:
    before = gc.isenabled(), sys.getswitchinterval()
    with pytest.raises(ZeroDivisionError), starting(torn) as check:
        assert not gc.isenabled() and sys.getswitchinterval() < before[1]
        raise ZeroDivisionError
    assert (gc.isenabled(), sys.getswitchinterval()) == before
    assert check.unwanted.is_set() and not gc.get_freeze_count()
    with starting(torn):
        pass
    assert (gc.isenabled(), sys.getswitchinterval()) == before and gc.get_freeze_count()


def test_a_module_of_the_door_that_is_missing_is_told_later(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    with pytest.raises(ImportError):
        importlib.import_module("uvicorn")
    import_all()
