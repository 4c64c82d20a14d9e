"""C++ of this project, compiled for this machine when first used, and kept under a hash of all that it depends on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from litchi.config import BadInput

COMPILERS = ("g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-ffp-contract=off", "-w")
"""Without contraction, so that the same source means the same arithmetic wherever it is inlined."""


def compiler() -> str | None:
    """The path of a C++ compiler; $CXX goes first."""
    names = [os.environ.get("CXX", ""), *COMPILERS]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def compile_once(sources: Sequence[Path], flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The library of the first source; the others are what it includes.

    Raises BadInput without a compiler, or with what the compiler said.
    """
    path = compiler()
    if path is None:
        raise BadInput(f"no C++ compiler found: install one of {', '.join(COMPILERS)}, or use torch")
    command = [path, *FLAGS, *flags]
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\0".join([*command, version, machine()]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    library = folder() / f"{sources[0].stem}-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}.part")
        answer = subprocess.run(
            [*command, str(sources[0]), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if answer.returncode:
            made.unlink(missing_ok=True)
            said = next((line for line in answer.stderr.splitlines() if "error" in line), answer.stderr.strip()[:200])
            raise BadInput(f"{path} cannot compile {sources[0].name}: {said}; use another by $CXX, or torch")
        made.replace(library)  # whole or not at all, whoever else compiles it now
    return ctypes.CDLL(str(library))


def folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "litchi"


def machine() -> str:
    """What -march=native looks at."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    return " ".join([platform.machine(), platform.processor(), *sorted(flags)])
