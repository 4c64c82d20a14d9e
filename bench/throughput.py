"""How many tokens of text a second one model trains on here, in Hugging Face's Trainer and in a plain compiled loop.

python -m bench.throughput [--rounds 5] [--threads 1]

All train the same Llama (sizes, values, bf16 by autocast, clipping, fused AdamW) on the same documents: functions and
classes of Python's standard library. Ours reads rows of whole documents, none of which sees another; Trainer reads
documents padded to the longest of their batch, as it does if it is told nothing, or blocks cut from all documents end
to end, as its examples do; the plain loop reads such blocks. Only tokens of documents count. Each takes its turn in
every round, so that what else the machine does befalls all alike; ratios are those of the median round.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import cycle, islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.plain_loop import Plain, PlainLoop
from bench.row import append
from litchi.model.network import Model, ModelConfig, count, initialise
from litchi.parallel.fuse import fuse
from litchi.parallel.mesh import World
from litchi.parallel.plan import apply
from litchi.schema.arrays import IGNORE
from litchi.schema.sequence import Batch, TokenSequence, pack_rows
from litchi.schema.tokenizer import Tokenizer
from litchi.train.optimizer import OptimizerConfig, build_optimizers
from litchi.train.run import tame_memory
from litchi.train.step import train_step

ROW, ROWS = 512, 4
"""Tokens of a row, and rows of a step."""
CONFIG = ModelConfig(
    vocab_size=8192, width=384, num_layers=6, num_heads=6, num_kv_heads=6, head_width=64, mlp_width=1024, qk_norm=False
)
OPTIMIZER = OptimizerConfig(lr=3e-4, matrix_lr=0.0, weight_decay=0.1, beta1=0.9, beta2=0.95, clip=1.0)
STEPS = 3
"""Steps of a turn."""

Turn = Callable[[], float]
"""Trains for STEPS steps; tokens of documents a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    tame_memory()
    documents = tokenised()
    ours = "ours, rows of documents, compiled"
    turns: dict[str, Turn] = {
        ours: our_turn(documents, compiled=True),
        "ours, not compiled": our_turn(documents, compiled=False),
        "plain loop with torch.compile, blocks": plain_turn(documents),
        "Hugging Face Trainer, padded documents": trainer_turn(documents, blocks=False),
        "Hugging Face Trainer, blocks": trainer_turn(documents, blocks=True),
    }
    for turn in turns.values():
        turn()  # compiles, and meets every shape once
    paces = [{name: turn() for name, turn in turns.items()} for _ in range(asked.rounds)]
    peak = statistics.median(product_rate() for _ in range(5))
    figure = statistics.median(pace[ours] for pace in paces)
    append("throughput", f"{ours}: share of the rate of a bf16 product", figure * work(documents) / peak, "of 1")
    for name in turns:
        if name != ours:
            ratio = statistics.median(pace[ours] / pace[name] for pace in paces)
            append("throughput", f"text trained, {ours}", figure, "tokens/s", peer=name, peer_figure=figure / ratio)


def clock() -> float:
    """Seconds. Of one thread those that it ran, so that other work on the machine counts for little."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


# ---- documents ----------------------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Functions and classes of the standard library, in one order everywhere."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield ast.get_source_segment(source, node) or ""


def tokenised() -> list[Tensor]:
    """Documents of 16 to ROW tokens."""
    found = list(texts())
    tokenizer = Tokenizer.train(found, vocab_size=CONFIG.vocab_size)
    ids = [torch.tensor(tokenizer.encode(text)[:ROW]) for text in found]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    return [ids[i] for i in order if len(ids[i]) >= 16]


def blocks_of(documents: list[Tensor]) -> list[Tensor]:
    """Documents end to end, cut into rows: what is left over is dropped."""
    joined = torch.cat(documents)
    return list(joined[: len(joined) // ROW * ROW].view(-1, ROW))


# ---- ours ---------------------------------------------------------------------------------------------------------


def our_turn(documents: list[Tensor], *, compiled: bool) -> Turn:
    model = Model(CONFIG)
    initialise(model, 0)
    if compiled:
        fuse(model, torch.device("cpu"))
    placed = apply(model, World())
    optimizers = build_optimizers(placed.learned(), OPTIMIZER)
    batches = cycle(packed(documents))

    def turn() -> float:
        began, read = clock(), 0
        for batch in islice(batches, STEPS):
            options = {"scale": {}, "clip_at": OPTIMIZER.clip, "dtype": torch.bfloat16, "draw": (0, 0)}
            train_step(placed, optimizers, [batch], **options)
            read += int((batch.labels != IGNORE).sum())
        return read / (clock() - began)

    return turn


def packed(documents: list[Tensor]) -> list[Batch]:
    """Rows filled best-fit from a window of documents, as training does."""
    rows: list[list[TokenSequence]] = []
    free: list[int] = []
    for ids in sorted(documents[:400], key=len, reverse=True):
        room = [i for i, left in enumerate(free) if left >= len(ids)]
        best = min(room, key=lambda i: free[i], default=len(rows))
        if best == len(rows):
            rows.append([])
            free.append(ROW)
        rows[best].append(sequence(ids))
        free[best] -= len(ids)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    groups = [[rows[i] for i in order[at : at + ROWS]] for at in range(0, len(order) - ROWS + 1, ROWS)]
    return [pack_rows(group, ROW, 0) for group in groups]


def sequence(ids: Tensor) -> TokenSequence:
    count = torch.arange(len(ids))
    return TokenSequence(
        tokens=ids,
        labels=torch.cat([ids[1:], torch.tensor([IGNORE])]),
        weights=torch.ones(len(ids)),
        positions=count[:, None].expand(-1, 3).contiguous(),
        spans=count,
        readable=torch.ones(len(ids), dtype=torch.bool),
        vectors={},
    )


# ---- peers --------------------------------------------------------------------------------------------------------


def plain_turn(documents: list[Tensor]) -> Turn:
    sizes = Plain(CONFIG.vocab_size, CONFIG.width, CONFIG.num_layers, CONFIG.num_heads, CONFIG.mlp_width)
    loop = PlainLoop(sizes, lr=OPTIMIZER.lr, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), decay=OPTIMIZER.weight_decay)
    rows = cycle(blocks_of(documents))

    def turn() -> float:
        began = clock()
        for _ in range(STEPS):
            loop.step(torch.stack(list(islice(rows, ROWS))))
        return STEPS * ROWS * (ROW - 1) / (clock() - began)

    return turn


def trainer_turn(documents: list[Tensor], *, blocks: bool) -> Turn:
    """Trainer, told what the others are told and nothing else; the clock runs from its second step on."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer

    sizes = LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.width,
        intermediate_size=CONFIG.mlp_width,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        tie_word_embeddings=True,
        max_position_embeddings=ROW,
    )
    model = LlamaForCausalLM(sizes)
    chosen = documents[:400]
    # of documents as many as fill ROWS rows on average, so that steps weigh the same
    per_step = ROWS if blocks else round(ROWS * ROW / statistics.mean(map(len, chosen)))
    rows = blocks_of(documents) if blocks else chosen

    def turn() -> float:
        watch = Watch()
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            arguments = trainer_arguments(folder, per_step)
            trainer = Trainer(model, arguments, train_dataset=rows, data_collator=watch.collate)
            trainer.add_callback(watch.callback())
            trainer.train()
        return sum(watch.read[1 : STEPS + 1]) / (watch.marks[-1] - watch.marks[1])

    return turn


def trainer_arguments(folder: str, per_step: int):
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        max_steps=STEPS + 1,
        per_device_train_batch_size=per_step,
        learning_rate=OPTIMIZER.lr,
        lr_scheduler_type="constant",
        weight_decay=OPTIMIZER.weight_decay,
        adam_beta2=OPTIMIZER.beta2,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class Watch:
    """What Trainer reads, and when its steps begin and end."""

    def __init__(self) -> None:
        self.read: list[int] = []
        """Labels of each batch; batches are made ahead, in the order of steps."""
        self.marks: list[float] = []

    def collate(self, chosen: list[Tensor]) -> dict[str, Tensor]:
        """A batch padded to its longest document; without any padding there is no mask."""
        self.read.append(sum(len(ids) - 1 for ids in chosen))
        longest = max(map(len, chosen))
        ids = torch.stack([F.pad(row, (0, longest - len(row))) for row in chosen])
        inside = torch.stack([torch.arange(longest) < len(row) for row in chosen])
        batch = {"input_ids": ids, "labels": torch.where(inside, ids, IGNORE)}
        return batch if bool(inside.all()) else {**batch, "attention_mask": inside.long()}

    def callback(self):
        from transformers import TrainerCallback

        class Marks(TrainerCallback):
            def on_step_begin(_self, *_given, **_named) -> None:
                self.marks.append(clock())

            def on_train_end(_self, *_given, **_named) -> None:
                self.marks.append(clock())

        return Marks()


# ---- what the machine could do ------------------------------------------------------------------------------------


def work(documents: list[Tensor]) -> float:
    """Floating-point operations that a token needs, forward and backward: 6 a weight, 6 a key that it reads, twice."""
    model = Model(CONFIG)
    read = sum(len(d) * (len(d) + 1) / 2 for d in documents[:400]) / sum(len(d) for d in documents[:400])
    weights = count(model)  # the table is the head as well, where it is multiplied
    return 6 * weights + 12 * CONFIG.num_layers * CONFIG.num_heads * CONFIG.head_width * read


def product_rate(size: int = 1024) -> float:
    """Operations a second of a bf16 matrix product."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    began = clock()
    for _ in range(8):
        a @ b
    return 16 * size**3 / (clock() - began)


if __name__ == "__main__":
    sys.exit(main())
