"""Pipeline parallelism: a rank holds some layers of the one network, and microbatches travel from rank to rank.

The schedules are torch's (`torch.distributed.pipelining`). All ranks of a pipeline know all of its microbatches,
whatever vectors those hold; between ranks only hidden states travel, and their gradients. Names of parameters stay.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from litchi.config import BadInput
from litchi.model.network import Model
from litchi.model.objective import Loss, loss_from
from litchi.parallel.collectives import gather_all
from litchi.parallel.mesh import DATA, World
from litchi.parallel.stages import (
    SCHEDULES,
    Action,
    Moment,
    Work,
    check_microbatches,
    deal,
    idle,
    rank_of,
    stages_per_rank,
)
from litchi.parallel.tensor import shares_tokens
from litchi.schema.sequence import Batch

Pair = tuple[Batch, Batch]
"""The truth, and what is read of it."""
After = Callable[[Model], None]
"""Told when a stage's gradient of one microbatch is whole."""
M = TypeVar("M", bound=nn.Module)
TABLE = "embed_tokens.weight"
PARTED = ("zero_bubble", "zbv", "dualpipev")
"""Schedules that find the gradient of weights apart, by the whole weights of the forward; with ZeRO-3 they keep those
until a step ends. Torch 2.13 would add them to the wrong tensors, and say nothing."""


def split(model: Model, world: World, *, wire: torch.dtype | None = None, sight: float = 0.5) -> Pipeline:
    """This rank's stages, which share their modules with `model`: let go of that one.

    Slices of matrices are cut before, ZeRO divides after. `wire` is the type of hidden states between ranks, that of
    the table of words if not given; `sight` is as in `deal`. Raises BadInput if the layers do not suffice.
    """
    schedule, ranks = world.layout.schedule, world.degree("pipeline")
    dealt = deal(model.config, ranks * stages_per_rank(schedule), sight=sight)
    here = [s for s in range(len(dealt)) if rank_of(s, schedule, ranks) == world.index("pipeline")]
    return Pipeline(world, dealt, {s: part(model, dealt, s) for s in here}, wire or model.embed_tokens.weight.dtype)


def part(model: Model, dealt: Sequence[range], stage: int) -> Model:
    """The network with the layers of one stage only; the first reads, the last has the last norm and the heads."""
    part, first, last = shell(model), stage == 0, stage == len(dealt) - 1
    part.layers = keep(model.layers, [str(index) for index in dealt[stage]])
    gone = [] if first or (last and model.config.tied) else ["embed_tokens"]
    gone += [] if first else ["embed_positions"]
    gone += [] if last else ["norm", "norm_moe_gen", "lm_head"]
    for name in gone:
        part._modules.pop(name, None)
    if not first:
        part.readers = keep(model.readers, [])
    if not last:
        part.writers = keep(model.writers, [])
        part.finish = hand_on
    return part


def keep(modules: M, names: Sequence[str]) -> M:
    kept = shell(modules)
    kept._modules = {name: modules._modules[name] for name in names}
    return kept


def shell(module: M) -> M:
    """The same module with registers of its own, so that entries can be taken from it."""
    made = copy.copy(module)
    made.__dict__.update({name: copy.copy(held) for name, held in module.__dict__.items() if isinstance(held, dict)})
    return made


def hand_on(x_TD: Tensor, batch: Batch) -> Tensor:
    """What a stage that is not the last makes of its layers' rows."""
    return x_TD


@dataclass(slots=True)
class Step:
    """One run of a schedule: what is read, and what was found."""

    pairs: Sequence[Pair]
    weight: Mapping[str, float]
    scale: Mapping[str, float]
    dtype: torch.dtype
    chunk: int = 0
    after: After | None = None
    loss: Loss | None = None
    trace: list[Moment] = field(default_factory=list)
    begin: float = 0.0
    stop: float = 0.0


class Pipeline:
    """This rank's stages of one network. `stages` are networks with the layers of one stage each, by its number."""

    def __init__(self, world: World, dealt: Sequence[range], stages: Mapping[int, Model], wire: torch.dtype) -> None:
        group = world.group("pipeline")
        assert group is not None, "a pipeline has at least two ranks"
        self.world, self.dealt, self.stages, self.wire = world, dealt, dict(sorted(stages.items())), wire
        self.group: ProcessGroup = group
        self.config = next(iter(self.stages.values())).config
        self.last = len(dealt) - 1
        self.built: tuple[int, int, Any] = (0, 0, None)
        self.step = Step([], {}, {}, torch.float32)

    # ---- parameters

    @property
    def models(self) -> list[Model]:
        return list(self.stages.values())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter of this rank once."""
        found: dict[str, nn.Parameter] = {}
        for model in self.models:
            found = dict(model.named_parameters()) | found
        yield from found.items()

    def copies(self) -> set[str]:
        """Parameters here that another rank has as well and counts as its own: a tied table, at the last stage."""
        return {TABLE} if self.config.tied and self.last in self.stages and 0 not in self.stages else set()

    def borrowed(self, model: Model) -> set[nn.Parameter]:
        """Parameters of a stage that are an earlier one's on this rank: ZeRO divides them there."""
        ends = self.config.tied and 0 in self.stages and model is self.stages.get(self.last)
        return {dict(model.named_parameters())[TABLE]} if ends else set()

    # ---- training

    def backward(
        self,
        pairs: Sequence[Pair],
        weight: Mapping[str, float],
        scale: Mapping[str, float],
        dtype: torch.dtype = torch.float32,
        chunk: int = 0,
        after: After | None = None,
    ) -> Loss | None:
        """Adds the gradients of all microbatches to `.grad` of this rank's parameters; gives the loss where the last
        stage is.

        `weight` is the global weight, as for `Loss.over`; `chunk` is that of `objective.text_loss`. `after` is called
        with a stage when one microbatch's gradient of it is whole; if it takes gradients away, `tie` is the caller's.
        Raises BadInput if microbatches differ in length, or if the schedule cannot run so many.
        """
        length = self.check(pairs)
        schedule = self.schedule(length, len(pairs))
        self.step = Step(pairs, weight, scale, dtype, chunk, after)
        which = torch.arange(len(pairs))
        first = (which,) if 0 in self.stages else ()
        target = which if self.last in self.stages else None
        self.step.begin = time.perf_counter()
        schedule.step(*first, target=target, return_outputs=False, microbatch=which)
        self.step.stop = time.perf_counter()
        self.tie()
        return self.step.loss

    def check(self, pairs: Sequence[Pair]) -> int:
        """The length of all microbatches."""
        lengths = sorted({len(corrupted) for _, corrupted in pairs})
        if len(lengths) != 1:
            said = " and ".join(map(str, lengths))
            raise BadInput(f"a pipeline's microbatches have {said} tokens: lay them out in as many rows (pack_rows)")
        layout = self.world.layout
        check_microbatches(layout.schedule, layout.pipeline, len(pairs), self.world.degree(*DATA))
        return lengths[0]

    def schedule(self, length: int, count: int) -> Any:
        """Torch's schedule for so many microbatches of this length, with their buffers; the last one is kept."""
        if self.built[:2] != (length, count):
            told = gather_all([length, count], self.group)
            if told.count(told[0]) != len(told):
                raise RuntimeError(f"ranks of a pipeline read different microbatches, (length, number): {told}")
            stations = [Station(self, stage, length) for stage in self.stages]
            name = self.world.layout.schedule
            for model in self.models:
                if name in PARTED and isinstance(model, FSDPModule):
                    model.set_reshard_after_forward(False)
            on = stations[0] if stages_per_rank(name) == 1 else stations
            self.built = length, count, SCHEDULES[name](on, count, self.judge, scale_grads=False)
        return self.built[2]

    def work(self, stage: int, batch: Batch, x_TD: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What one stage makes of a microbatch; x_TD comes from the stage before."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            made_TD = self.stages[stage](batch, None, x_TD)
        return made_TD if stage == self.last else made_TD.to(self.wire)

    def judge(self, x_TD: Tensor, which: Tensor) -> Tensor:
        """The scalar that the last stage differentiates for one microbatch."""
        step = self.step
        loss = self.loss_from(x_TD, step.pairs[int(which)], step.dtype, step.chunk)
        told = Loss({m: total.detach() for m, total in loss.total.items()}, loss.weight)
        step.loss = told if step.loss is None else step.loss + told
        scalar = loss.over(step.weight, step.scale)
        step.trace[-1] = replace(step.trace[-1], stop=time.perf_counter())
        return scalar

    def loss_from(self, x_TD: Tensor, pair: Pair, dtype: torch.dtype, chunk: int = 0) -> Loss:
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return loss_from(self.stages[self.last], x_TD, *pair, chunk)

    @torch.no_grad()
    def tie(self) -> None:
        """A tied table lies at both ends: both take the sum of their gradients, so that every bit stays equal."""
        ranks = self.world.layout.pipeline
        ends = [0, rank_of(self.last, self.world.layout.schedule, ranks)]
        here = self.world.index("pipeline")
        if not self.config.tied or ends[0] == ends[1] or here not in ends:
            return
        grad = dict(self.named_parameters())[TABLE].grad
        if grad is None:
            return
        own = grad.to_local() if isinstance(grad, DTensor) else grad
        other, there = torch.empty_like(own), sum(ends) - here
        send = dist.P2POp(dist.isend, own.contiguous(), group=self.group, group_peer=there)
        take = dist.P2POp(dist.irecv, other, group=self.group, group_peer=there)
        for waiting in dist.batch_isend_irecv([send, take]):
            waiting.wait()
        own.copy_(own + other if here == ends[0] else other + own)

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self, pairs: Sequence[Pair], dtype: torch.dtype = torch.float32) -> Loss | None:
        """The loss, where the last stage is. Any number of microbatches of any length."""
        read = self.read([corrupted for _, corrupted in pairs], dtype)
        losses = [self.loss_from(x_TD, pair, dtype) for x_TD, pair in zip(read or [], pairs, strict=bool(read))]
        whole = losses[0] if losses else None
        for loss in losses[1:]:
            whole = loss if whole is None else whole + loss
        return whole

    @torch.no_grad()
    def read(self, batches: Sequence[Batch], dtype: torch.dtype = torch.float32) -> list[Tensor] | None:
        """Hidden states of each batch, as `Model.forward` gives them, where the last stage is."""
        made: list[Tensor] = []
        sent: list[Any] = []
        for stage in self.stages:
            before, made = made, []
            for m, batch in enumerate(batches):
                x_TD = before[m] if stage - 1 in self.stages else self.receive(stage, len(batch))
                made.append(self.work(stage, batch, x_TD, dtype))
                if stage < self.last and stage + 1 not in self.stages:
                    sent.append(dist.isend(made[-1].contiguous(), group=self.group, group_dst=self.rank_of(stage + 1)))
        for waiting in sent:
            waiting.wait()
        return made if self.last in self.stages else None

    def receive(self, stage: int, length: int) -> Tensor | None:
        """What the stage before sends; the first stage has none."""
        if stage == 0:
            return None
        x_TD = torch.empty(self.rows(stage - 1, length), self.config.width, dtype=self.wire, device=self.world.device)
        dist.recv(x_TD, group=self.group, group_src=self.rank_of(stage - 1))
        return x_TD

    # ---- what stages send

    def rank_of(self, stage: int) -> int:
        return rank_of(stage, self.world.layout.schedule, self.world.layout.pipeline)

    def rows(self, stage: int, length: int) -> int:
        """Rows that leave a stage: from the first layer on, ranks of tensor parallelism may share them out."""
        shared = shares_tokens(self.config, self.world) and self.dealt[stage].stop > 0
        return length // self.world.degree("tensor") if shared else length

    # ---- what it cost

    def waits(self) -> list[float]:
        """The share of the last `backward` in which each rank of this pipeline had nothing to work on, by the host's
        clock; what it sent and received counts as waiting."""
        share = idle(self.step.trace, self.step.begin, self.step.stop)
        return [rank[0] for rank in gather_all([share], self.group)]


class Station(PipelineStage):
    """A stage as torch's schedules drive it: knows microbatches by their number, and notes when it did what."""

    def __init__(self, pipeline: Pipeline, stage: int, length: int) -> None:
        self.pipeline = pipeline

        def rows(stage: int) -> Tensor:
            shape = pipeline.rows(stage, length), pipeline.config.width
            return torch.empty(shape, dtype=pipeline.wire, device="meta", requires_grad=True)

        super().__init__(
            pipeline.stages[stage],
            stage,
            len(pipeline.dealt),
            pipeline.world.device,
            input_args=rows(stage - 1) if stage else torch.empty(1, dtype=torch.long, device="meta"),
            output_args=rows(stage),
            group=pipeline.group,
        )

    def forward_maybe_with_nosync(self, x_TD: Tensor, microbatch: Tensor) -> Tensor:
        step = self.pipeline.step
        _, corrupted = step.pairs[int(microbatch)]
        return self.pipeline.work(self.stage_index, corrupted, None if self.is_first else x_TD, step.dtype)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.noted("forward", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        with self.noted("backward" if full_backward else "input", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if full_backward:
            self.told()

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        with self.noted("weight", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)
        self.told()

    def told(self) -> None:
        """Let `after` know, once ZeRO has summed over its ranks; weights are gathered again, as torch left them."""
        after, model = self.pipeline.step.after, self.pipeline.stages[self.stage_index]
        if after is not None:
            self.perform_reduce_grad(1)
            after(model)
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.unshard()

    @contextmanager
    def noted(self, work: Work, microbatch: int) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        moment = Moment(Action(work, self.stage_index, microbatch), begin, time.perf_counter())
        self.pipeline.step.trace.append(moment)
