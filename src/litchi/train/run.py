"""The training stage, whole: samples in, checkpoints out, and nothing lost when it is killed in between."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.network import Model, ModelConfig, initialise
from litchi.model.tensorfile import open_tensors
from litchi.model.weights import Checkpoint, from_hugging_face, load, load_tensors, save
from litchi.record import Progress, Recorder
from litchi.schema.processor import Processor
from litchi.train.batches import BatchConfig, Batches, Samples, check_coverage, coverage
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.pictures import Pictures
from litchi.train.schedule import Schedule, Trapezoid, factor
from litchi.train.step import train_step


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run of the loop. `dtype` is what matrices are multiplied in: "float32" or "bfloat16"; weights are fp32."""

    num_steps: int
    seed: int = 0
    batches: BatchConfig = BatchConfig()
    num_accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Trapezoid()
    ema: float = 0.998
    """Decay of the averaged weights, which are what a checkpoint offers."""
    scale: dict[str, float] = field(default_factory=dict)
    """Factor of each modality's mean loss, 1 where not named."""
    dtype: str = "float32"
    compile: bool = False
    """Fuse the elementwise work of layers with torch.compile, which on a CPU needs a C++ compiler."""
    device: str = "auto"
    start: Path | None = None
    """A checkpoint whose weights the network begins with; what it lacks begins at its first values."""
    frozen: tuple[str, ...] = ()
    """Beginnings of the names of parameters that stay as they are: "layers." is the trunk without its table."""
    threads: int = 0
    """CPU threads, 0 for all."""
    log_every: int = 20
    save_every: int = 200
    keep: int = 2


LEARNED_FROM = ("data", "mixture", "fit", "model", "train")
"""The parts of a Run that decide what is learned; only the same ones may continue a checkpoint."""

HABITS = ("log_every", "save_every", "keep")
"""Settings of training that change nothing in the weights."""


@dataclass(slots=True)
class State:
    """All that a continuation needs."""

    step: int
    model: Model
    average: dict[str, Tensor]
    """Of what is learned, by name."""
    optimizers: list[torch.optim.Optimizer]
    generator: torch.Generator
    batches: Batches
    seconds: float = 0.0
    """Time spent training and saving, over all continuations."""


def run(
    config: TrainConfig, model_config: ModelConfig, processor: Processor, samples: Samples, folder: Path, run_json: str
) -> Path:
    """Train to the last step, from the newest checkpoint in `folder` if there is one; returns the last checkpoint."""
    device = prepare(config)
    state = fresh(config, model_config, processor, samples, device)
    if newest := newest_checkpoint(folder):
        restore(state, newest, run_json)
    recorder = Recorder(folder)
    recorder.rewind(state.step + 1)
    pictures = Pictures(folder, processor, samples)

    with Interrupt() as stop, Progress(config.num_steps, "train", done=state.step) as progress:
        mark = time.monotonic()
        while state.step < config.num_steps:
            group = [next(state.batches).to(device) for _ in range(config.num_accumulate)]
            if state.step == 0:
                check_coverage(group[0])
                print(coverage(group[0], processor))
            adjust(state.optimizers, factor(config.schedule, state.step, config.num_steps))
            metrics = train_step(
                state.model,
                state.optimizers,
                group,
                scale=config.scale,
                clip=config.optimizer.clip,
                dtype=getattr(torch, config.dtype),
                generator=state.generator,
            )
            average(state, config.ema)
            state.step += 1
            state.seconds, mark = state.seconds + time.monotonic() - mark, time.monotonic()

            last = state.step == config.num_steps
            if state.step % config.log_every == 0 or last:
                recorder.write(state.step, {**metrics.row(), "seconds": state.seconds})
            progress.advance(1, note=" ".join(f"{m} {v:.3f}" for m, v in metrics.losses.items()))
            if state.step % config.save_every == 0 or last or stop.asked:
                path = checkpoint(state, config, processor, folder, run_json)
                pictures.draw(path, state.step)
            if stop.asked and not last:
                raise KeyboardInterrupt
    return newest_checkpoint(folder) or folder


# ---- a run's beginning --------------------------------------------------------------------------------------------


def prepare(config: TrainConfig) -> torch.device:
    """Threads and memory of this process, and the device."""
    if config.threads:
        torch.set_num_threads(config.threads)
    tame_memory()
    if config.device != "auto":
        return torch.device(config.device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tame_memory() -> None:
    """Two habits of a CPU step's libraries that cost time or memory; call before the first matrix product.

    glibc gives big tensors back to the kernel, and page faults cost a tenth of a step. oneDNN keeps a thousand compiled
    products by shape, and shapes change with every batch: megabytes a step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # another C library has its own habits
    for option, value in ((-3, 1 << 26), (-1, 1 << 29), (-8, 1)):  # mmap threshold, trim threshold, arenas
        libc.mallopt(option, value)


def fresh(config, model_config: ModelConfig, processor: Processor, samples: Samples, device: torch.device) -> State:
    if 0 < model_config.max_length < config.batches.row:
        most = model_config.max_length
        raise BadInput(
            f"train.batches.row={config.batches.row}, but this network reads {most} tokens: lower it to {most}"
        )
    model = Model(model_config)
    initialise(model, config.seed)
    if config.start is not None:
        begin_with(model, config.start)
    freeze(model, config.frozen)
    model.to(device)
    if config.compile:
        fuse(model)
    return State(
        step=0,
        model=model,
        average={name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        optimizers=build_optimizers(model, config.optimizer),
        generator=torch.Generator().manual_seed(config.seed),
        batches=Batches(samples, processor, config.batches, config.seed),
    )


def begin_with(model: Model, checkpoint: Path) -> None:
    """Take over the weights of a checkpoint. Raises BadInput if the network has no place of that shape for one."""
    named = dict(model.named_parameters())
    with open_tensors(checkpoint / "model") as tensors, torch.no_grad():
        for theirs, entry in tensors.entries.items():
            parameter = named.get(name := from_hugging_face(theirs))
            if parameter is None or tuple(parameter.shape) != tuple(entry.shape):
                found = "none" if parameter is None else list(parameter.shape)
                raise BadInput(
                    f"{checkpoint}: {name} is {list(entry.shape)}, the network has {found}: start from another"
                )
            parameter.copy_(tensors.read(theirs, torch.float32))


def freeze(model: Model, beginnings: tuple[str, ...]) -> None:
    """Raises BadInput for a beginning that no name has, and if nothing is left to learn."""
    names = [name for name, _ in model.named_parameters()]
    if idle := [beginning for beginning in beginnings if not any(name.startswith(beginning) for name in names)]:
        raise BadInput(f"train.frozen: no parameter begins with {idle[0]!r}: they begin like {names[0]!r}")
    for name, parameter in model.named_parameters():
        if name.startswith(beginnings):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput("train.frozen leaves nothing to learn: name fewer")


def fuse(model: Model) -> None:
    """Compile what layers do to tokens one by one; attention stays as it is. oracle: the same layers, not compiled"""
    if next(model.parameters()).device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise BadInput("train.compile needs a C++ compiler on a CPU: install g++, or set train.compile=false")
    for layer in model.layers:
        for expert in layer.experts:
            expert.read, expert.write = torch.compile(expert.read), torch.compile(expert.write)


class Interrupt:
    """Within it Ctrl-C asks the loop to save and stop, asked twice stops it at once; after it, what it did before."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def __enter__(self) -> Interrupt:
        try:
            self.before = signal.signal(signal.SIGINT, self.ask)
        except ValueError:
            pass  # not the main thread: whoever runs it there decides when it ends
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# ---- a step's ends ------------------------------------------------------------------------------------------------


def adjust(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set every group's learning rate to `rate` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak", group["lr"])
            group["lr"] = group["peak"] * rate


@torch.no_grad()
def average(state: State, decay: float) -> None:
    """Move the averaged weights towards the weights, faster at the beginning."""
    pace = 1 - min(decay, (state.step + 1) / (state.step + 10))
    names = list(state.average)
    weights = state.model.state_dict()
    torch._foreach_lerp_([state.average[n] for n in names], [weights[n] for n in names], pace)


# ---- checkpoints --------------------------------------------------------------------------------------------------


def newest_checkpoint(folder: Path) -> Path | None:
    found = sorted(p for p in folder.glob("step_*") if (p / "meta.json").is_file())
    return found[-1] if found else None


def checkpoint(state: State, config: TrainConfig, processor: Processor, folder: Path, run_json: str) -> Path:
    """Save averaged weights for use, and all else for resuming; keep the newest `keep`."""
    path = folder / f"step_{state.step:07d}"
    offered = Model(state.model.config)
    weights = state.model.state_dict()
    offered.load_state_dict(weights | state.average)
    resume = {
        "resume/weights.safetensors": {name: weights[name] for name in state.average},
        "resume/optimizer.safetensors": flatten(state.optimizers),
        "resume/random.safetensors": {"generator": state.generator.get_state()},
    }
    meta = {"step": state.step, "seconds": state.seconds, "batches": state.batches.state(), "torch": torch.__version__}
    save(path, offered, processor, meta=meta, run=run_json, extra=resume)
    for old in sorted(folder.glob("step_*"))[: -config.keep]:
        remove(old)
    return path


def remove(folder: Path) -> None:
    """Delete a checkpoint; meta.json goes first, so that a half-deleted one is never taken for whole."""
    (folder / "meta.json").unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()


def restore(state: State, path: Path, run_json: str) -> None:
    """Continue from a checkpoint. Raises BadInput if it was written by a Run that trains something else."""
    loaded: Checkpoint = load(path)
    ours, theirs = learned_from(run_json), learned_from((path / "run.json").read_text())
    changed = [key for key in LEARNED_FROM if ours[key] != theirs[key]]
    if changed:
        said = ", ".join(changed)
        raise BadInput(f"{path} was trained with another {said}: give this Run a folder of its own (--folder)")
    device = next(state.model.parameters()).device
    offered = loaded.model.state_dict()
    state.model.load_state_dict(offered | load_tensors(path / "resume" / "weights.safetensors"))
    state.average = {name: offered[name].to(device) for name in state.average}
    unflatten(state.optimizers, load_tensors(path / "resume" / "optimizer.safetensors"))
    state.generator.set_state(load_tensors(path / "resume" / "random.safetensors")["generator"])
    state.batches.restore(loaded.meta["batches"])
    state.step, state.seconds = loaded.meta["step"], loaded.meta["seconds"]


def learned_from(run_json: str) -> dict[str, Any]:
    """What a Run says about what is learned."""
    run = json.loads(run_json)
    training = {key: value for key, value in run.get("train", {}).items() if key not in HABITS}
    return {key: training if key == "train" else run.get(key) for key in LEARNED_FROM}


def flatten(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer states as named tensors: "optimizer.parameter.key"."""
    named = {}
    for i, optimizer in enumerate(optimizers):
        for index, entry in optimizer.state_dict()["state"].items():
            named |= {f"{i}.{index}.{key}": torch.as_tensor(value) for key, value in entry.items()}
    return named


def unflatten(optimizers: list[torch.optim.Optimizer], named: Mapping[str, Tensor]) -> None:
    for i, optimizer in enumerate(optimizers):
        whole = optimizer.state_dict()
        whole["state"] = {}
        for name, value in named.items():
            owner, index, key = name.split(".")
            if int(owner) == i:
                whole["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(whole)


def summary(path: Path) -> str:
    """One line about a checkpoint."""
    meta = json.loads((path / "meta.json").read_text())
    return f"{path}: step {meta['step']}, {meta['seconds'] / 60:.1f} minutes of training"
