"""The training stage, whole: samples in, checkpoints out, and nothing lost when it is killed in between."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.network import Model, ModelConfig
from litchi.model.tensorfile import open_tensors
from litchi.model.weights import from_hugging_face
from litchi.parallel import float8
from litchi.parallel.checkpoint import Saver, newest, step_name
from litchi.parallel.collectives import gather_all
from litchi.parallel.fuse import fuse
from litchi.parallel.mesh import DATA, Layout, World, join, leave
from litchi.parallel.offload import offload
from litchi.parallel.plan import Placed, build, fill, first_values
from litchi.parallel.recompute import Recompute
from litchi.record import Progress, Recorder
from litchi.schema.processor import Processor
from litchi.schema.sequence import Batch
from litchi.train.batches import BatchConfig, Batches, Samples, check_coverage, coverage
from litchi.train.guard import GuardConfig, Judgement, check, judge
from litchi.train.ledger import Ledger
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.pictures import Pictures
from litchi.train.schedule import Schedule, Trapezoid, factor
from litchi.train.state import State, checkpoint, restore
from litchi.train.step import Metrics, find_gradient, step_optimizers
from litchi.train.watch import Watch, WatchConfig


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One run of the loop. Weights are fp32, and `dtype` is what matrices are multiplied in; "float8" is for those of
    the trunk, and bfloat16 for the rest.

    A step reads `num_accumulate` batches, which ranks of data parallelism share out: their number divides it.
    """

    num_steps: int
    seed: int = 0
    batches: BatchConfig = BatchConfig()
    num_accumulate: int = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: Schedule = Trapezoid()
    chunk: int = 0
    """Labelled tokens whose scores of the vocabulary exist at once, 0 for all: less memory where it is large."""
    recompute: Recompute = "none"
    """What layers forget after the forward and compute again for the backward: less memory, more work."""
    offload: bool = False
    """Whether AdamW's state lies on the CPU while weights are on a GPU."""
    ema: float = 0.998
    """Decay of the averaged weights, which are what a checkpoint offers."""
    scale: dict[str, float] = field(default_factory=dict)
    """Factor of each modality's mean loss, 1 where not named."""
    dtype: Literal["float32", "bfloat16", "float8"] = "float32"
    compile: bool = False
    """Fuse the elementwise work of layers with torch.compile, which on a CPU needs a C++ compiler."""
    layout: Layout = Layout()
    """How ranks share the work, where there are several."""
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
    bucket: str = ""
    """An s3:// address where each checkpoint is put as well."""
    on_failed_save: Literal["go on", "stop"] = "stop"
    """What a full disk or a store that is gone means; the checkpoint before stays whole."""
    guard: GuardConfig = GuardConfig()
    watch: WatchConfig = WatchConfig()


def run(
    config: TrainConfig, model_config: ModelConfig, processor: Processor, samples: Samples, folder: Path, run_json: str
) -> Path:
    """Train to the last step, from the newest checkpoint in `folder` if there is one; returns the last checkpoint.

    Every rank calls this, and the first one writes.
    """
    world = join(config.layout, prepare(config))
    lead = world.rank == 0
    state = fresh(config, model_config, processor, samples, world)
    saver = Saver(world, folder, config.keep, config.on_failed_save, config.bucket)
    if newest := saver.newest():
        restore(state, newest, run_json)
    recorder, ledger = Recorder(folder, silent=not lead), Ledger(folder, silent=not lead)
    recorder.rewind(state.step + 1)
    ledger.rewind(state.step + 1)
    pictures = Pictures(folder, processor, samples, silent=not lead)

    if state.step == config.num_steps:
        leave(world)
        return newest_checkpoint(folder) or folder

    with (
        saver,
        Watch(world, folder, config.watch, state.placed.model) as watch,
        Interrupt() as stop,
        Progress(config.num_steps, "train", done=state.step, silent=not lead) as progress,
    ):
        watch.step(state.step)
        mark = time.monotonic()
        while state.step < config.num_steps:
            group = [next(batches).to(world.device) for batches in state.batches]
            if state.step == 0 and lead:
                check_coverage(group[0])
                print(coverage(group[0], processor))
            metrics, judgement = take_step(state, config, group)
            ledger.write(state.step, metrics, judgement)
            check(config.guard, judgement, state.step)
            state.seconds, mark = state.seconds + time.monotonic() - mark, time.monotonic()

            watch.step(state.step)
            saver.poll()
            last, stopped = state.step == config.num_steps, anyone(stop.asked, world)
            if state.step % config.log_every == 0 or last:
                recorder.write(state.step, {**metrics.row(), **watch.row(), "seconds": state.seconds})
            progress.advance(1, note=" ".join(f"{m} {v:.3f}" for m, v in metrics.losses.items()))
            if state.step % config.save_every == 0 or last or stopped:
                with watch.during("save"):
                    checkpoint(state, saver, processor, run_json)
                    if pictures.samples or last or stopped:
                        saver.wait()
                    pictures.draw(folder / step_name(state.step), state.step)
            if stopped and not last:
                raise KeyboardInterrupt
    leave(world)
    return newest_checkpoint(folder) or folder


def take_step(state: State, config: TrainConfig, group: list[Batch]) -> tuple[Metrics, Judgement]:
    """One step of optimizers, unless its loss or gradient is no sound one; a step that is left out counts as well."""
    adjust(state.optimizers, factor(config.schedule, state.step, config.num_steps))
    draw, dtype = (config.seed, state.step), torch.float32 if config.dtype == "float32" else torch.bfloat16
    metrics = find_gradient(state.placed, group, scale=config.scale, dtype=dtype, draw=draw, chunk=config.chunk)
    judgement = judge(config.guard, state.history, metrics.losses, metrics.gradient_norm)
    state.history = judgement.history
    if judgement.sound:
        step_optimizers(state.placed, state.optimizers, metrics, config.optimizer.clip)
        average(state, config.ema)
    state.step += 1
    return metrics, judgement


def anyone(asked: bool, world: World) -> bool:
    """Whether any rank was asked to stop: they stop at the same step."""
    return any(said for (said,) in gather_all([asked], world.everyone()))


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


def fresh(config, model_config: ModelConfig, processor: Processor, samples: Samples, world: World) -> State:
    if 0 < model_config.max_length < config.batches.row:
        most = model_config.max_length
        raise BadInput(
            f"train.batches.row={config.batches.row}, but this network reads {most} tokens: lower it to {most}"
        )
    first, ranks, slots = world.index(*DATA), world.degree(*DATA), config.num_accumulate
    if slots % ranks:
        raise BadInput(
            f"train.num_accumulate={slots} batches a step cannot be shared out over {ranks} ranks that read: "
            f"set a multiple of {ranks}"
        )
    placed = build(model_config, world, freeze=lambda model: freeze(model, config.frozen), again=config.recompute)
    begin(placed, config)
    for stage in placed.models:
        if config.dtype == "float8":
            float8.apply(stage, world.device)
        if config.compile:
            fuse(stage, world.device)
    learned = placed.learned()
    optimizers = build_optimizers(learned, config.optimizer)
    if config.offload:
        optimizers = offload(optimizers, exact=world.layout.exact)
    return State(
        step=0,
        placed=placed,
        average={leaf.name: leaf.local.detach().clone() for leaf in learned},
        optimizers=optimizers,
        batches=[
            Batches(samples, processor, config.batches, config.seed, m, slots) for m in range(first, slots, ranks)
        ],
    )


def begin(placed: Placed, config: TrainConfig) -> None:
    """First values, or those of a checkpoint where it has them.

    Raises BadInput if the network has no place of that shape for one of the checkpoint's.
    """
    values = first_values(placed, config.seed)
    if config.start is None:
        fill(placed, values)
        return
    with open_tensors(config.start / "model") as tensors:
        names = {from_hugging_face(theirs): theirs for theirs in tensors.entries}
        for name, theirs in names.items():
            leaf, shape = placed.leaves.get(name), tuple(tensors.entries[theirs].shape)
            if leaf is None or leaf.shape != shape:
                found = "none" if leaf is None else list(leaf.shape)
                raise BadInput(f"{config.start}: {name} is {list(shape)}, the network has {found}: start from another")
        fill(
            placed,
            lambda name, shape: tensors.read(names[name], torch.float32) if name in names else values(name, shape),
        )


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


class Interrupt:
    """Within it Ctrl-C, or SIGTERM, asks the loop to save and stop, asked twice stops it at once; after it, what it did
    before."""

    def __init__(self) -> None:
        self.asked = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        try:
            self.before = {sig: signal.signal(sig, self.ask) for sig in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            pass  # not the main thread: whoever runs it there decides when it ends
        return self

    def __exit__(self, *_: object) -> None:
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

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
    weights: list[Tensor] = [state.placed.leaves[name].local for name in state.average]
    torch._foreach_lerp_(list(state.average.values()), weights, pace)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole one."""
    return newest(folder)


def summary(path: Path) -> str:
    """One line about a checkpoint."""
    meta = json.loads((path / "meta.json").read_text())
    return f"{path}: step {meta['step']}, {meta['seconds'] / 60:.1f} minutes of training"
