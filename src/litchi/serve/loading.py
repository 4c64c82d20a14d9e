"""A checkpoint's folder as what answers: an engine in this process, or workers of their own under a supervisor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from litchi.model.lowrank import Adapters
from litchi.model.seal import Check
from litchi.model.weights import load
from litchi.serve.draft import SAME
from litchi.serve.engine import Engine
from litchi.serve.fleet import Fleet
from litchi.serve.models import read_adapters
from litchi.serve.placing import placing
from litchi.serve.settings import check
from litchi.serve.spawn import Early

if TYPE_CHECKING:
    from litchi.model.adapters import Adapter
    from litchi.model.network import Model
    from litchi.serve.run import ServeConfig
    from litchi.serve.tensor import TensorRunner


def load_engine(
    folder: Path,
    config: ServeConfig,
    place: int = 0,
    files: Check | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Engine:
    """An engine in this process, which is started with the server. Raises BadInput for a folder that is not whole.

    With `serve.tensor` other processes are started that share the network; they end with this one. Engines in other
    places take other GPUs, where there are more. `files` is a check of the folder's files that has been begun already;
    `meanwhile` begins what shall run while C++ packs and looks, which leaves the interpreter to others.
    """
    c, number = config.engine, place * config.tensor
    where = placing(c, number)
    # Before anything is loaded, so that the ranks load beside each other.
    share = shared(folder, config, number) if config.tensor > 1 else None
    loaded = load(folder, place=where, checked=files)
    meanwhile()
    draft = load(Path(c.draft), place=where) if c.guess == "draft" and c.draft not in SAME else None
    weights = sha256(json.dumps(loaded.meta["files"], sort_keys=True).encode()).hexdigest()
    adapters = read_adapters(loaded.model, config.model, config.adapters)
    runner = None if share is None else share(loaded.model, adapters)
    known = Adapters(loaded.model, adapters) if runner is None else runner.adapters
    return Engine(loaded.model, loaded.processor, c, weights, runner, known, draft, take=True).look()


def shared(folder: Path, config: ServeConfig, number: int) -> Callable[[Model, Sequence[Adapter]], TensorRunner]:
    """Starts the other ranks; makes what computes with them."""
    from litchi.serve.ranks import dtype_of, muster  # here, since one process does without
    from litchi.serve.tensor import TensorRunner

    world = muster(folder, config, number)
    return lambda model, adapters: TensorRunner(model, dtype_of(config), world, adapters)


def load_answerer(
    folder: Path,
    config: ServeConfig,
    files: Check | None = None,
    meanwhile: Callable[[], None] = lambda: None,
    early: Early | None = None,
) -> Engine | Fleet:
    """An engine, or with `serve.workers` as many processes that have one each, started and ready. Raises BadInput.

    `files` and `meanwhile` are `load_engine`'s; workers check for themselves. `early` are workers that wait already.
    """
    check(config)
    if not config.workers and config.tensor == 1:
        return load_engine(folder, config, files=files, meanwhile=meanwhile)
    meanwhile()
    if files is not None:
        files.leave()
    return Fleet(folder, replace(config, workers=max(config.workers, 1)), early).start()
