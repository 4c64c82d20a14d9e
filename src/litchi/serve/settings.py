"""Settings of the server that cannot work are refused before any weights are read, in one line that names the mend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from litchi.config import BadInput
from litchi.serve.fetch import listed
from litchi.serve.guard import name_of
from litchi.serve.models import folders

if TYPE_CHECKING:
    from litchi.schema.processor import Processor
    from litchi.serve.run import ServeConfig

ABILITIES = ("see", "draw", "dream", "watch")
MAX_PORT = 65_535
MAX_PIXELS = 178_956_970
"""Pillow opens nothing larger."""

LEAST: dict[str, int] = {
    "side": 0,
    "workers": 0,
    "tensor": 1,
    "max_queue": 0,
    "max_worlds": 0,
    "max_world_steps": 1,
    "context_frames": 1,
    "max_body_bytes": 1,
    "max_image_bytes": 1,
    "max_pixels": 1,
    "max_images": 0,
    "max_frames": 1,
    "max_text": 1,
    "max_tokens": 1,
    "engine.max_running": 1,
    "engine.step_tokens": 1,
    "engine.page": 1,
    "engine.guess_tokens": 0,
    "engine.guess_rows": 0,
}
"""With less, every request would be refused, answered otherwise than it says, or wait for ever."""


def check(config: ServeConfig) -> None:
    """Raises BadInput for the first setting that would be found out only when somebody asks."""
    for name, least in LEAST.items():
        holder = config.engine if name.startswith("engine.") else config
        if (value := getattr(holder, name.removeprefix("engine."))) < least:
            raise BadInput(f"serve.{name}={value} cannot work: give {least} or more")
    waits = {name: getattr(config, name) for name in ("patience", "worker_patience", "start_patience")}
    for name, value in waits.items():
        if not 0 < value < math.inf:
            raise BadInput(f"serve.{name}={value} cannot work: give seconds, more than 0")
    if not 0 <= config.drain < math.inf:
        raise BadInput(f"serve.drain={config.drain} cannot work: give seconds, 0 or more")
    if not 0 <= config.port <= MAX_PORT:
        raise BadInput(f"serve.port={config.port} is no port: give 0 (a free one) to {MAX_PORT}")
    if config.max_pixels > MAX_PIXELS:
        raise BadInput(f"serve.max_pixels={config.max_pixels} is more than is ever decoded: give at most {MAX_PIXELS}")
    if config.engine.cache_tokens < config.engine.page:
        need = f"serve.engine.page={config.engine.page}"
        raise BadInput(f"serve.engine.cache_tokens={config.engine.cache_tokens} holds no page: give {need} or more")
    check_names(config)


def check_side(config: ServeConfig, processor: Processor | None) -> None:
    """Raises BadInput for a side that the pictures of a model that draws cannot have."""
    if processor is None or not processor.draws:
        return
    patches = {codec.patch for codec in (processor.codec, processor.film) if codec is not None}
    if config.side < 1 or any(config.side % patch for patch in patches):
        least = math.lcm(*patches)
        raise BadInput(f"serve.side={config.side} is no side of this model's pictures: give a multiple of {least}")


def check_names(config: ServeConfig) -> None:
    """What is a name, a key or a list of them."""
    if config.checkpoints and not config.api_key:
        raise BadInput("serve.checkpoints are swapped in behind a key only: set serve.api_key, or leave them out")
    if config.api_key != config.api_key.strip() or not config.api_key.isprintable():
        raise BadInput("serve.api_key has blanks around it or signs that no header carries: take them out")
    if not config.model:
        raise BadInput("serve.model is empty: give the name that requests call the model by")
    if not config.envs:
        raise BadInput("serve.envs is empty: name at least the room that a visitor finds")
    for ability in config.abilities:
        if ability not in ABILITIES:
            raise BadInput(f"serve.abilities holds {ability!r}: give some of {', '.join(ABILITIES)}")
    for host in config.allowed_hosts:
        if "*" in host or host not in (name_of(host), name_of(f"[{host}]")):
            mend = "give a bare name in small letters without scheme or port, or no names for any"
            raise BadInput(f"serve.allowed_hosts holds {host!r}, which no Host header says: {mend}")
    for setting in ("fetch_hosts", "fetch_inner_hosts"):
        for entry in getattr(config, setting):
            listed(entry, f"serve.{setting}")
    folders(config.model, config.adapters)
