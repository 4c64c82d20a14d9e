"""What four bits cost weights that were never in four: by the range of a group, by nearer steps, and with feedback.

    python bench/rounding.py words FOLDER          a small language model, trained here for --seconds on our own source
    python bench/rounding.py moved FOLDER TEXT     SmolLM2, its weights moved by up to a third of a step; TEXT to read
    python bench/rounding.py tiny FOLDER           the shipped checkpoint: abilities on --items of each; 0: its scores
    python bench/rounding.py large FOLDER          the memory of feedback: a layer a quarter as wide as Yi-34B's

All three ways end on a grid that packing keeps to the bit, so that the native path reads the very weights that were
rounded. What is read for feedback is never what is scored: other files of ours, or the training split beside the test
split. FOLDER keeps checkpoints and data, and what is there already is not made again. About four minutes each.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import native
from bench.convert_34b import Watch, anonymous
from bench.formats import apart, matrices
from bench.native import WINDOW, scores_of
from bench.row import append
from litchi.cli import Place, find_checkpoint, make_board
from litchi.config import from_json
from litchi.data.loader import Loader, open_shelves
from litchi.data.run import DataConfig
from litchi.data.run import run as make_data
from litchi.model.calibrate import batches, calibrate, steps, text_windows
from litchi.model.families import parameters
from litchi.model.feedback import round_alone
from litchi.model.native import Trunk
from litchi.model.network import Model, ModelConfig, initialise
from litchi.model.packing import Format, dequantise, quantise
from litchi.model.presets import YI_34B
from litchi.model.weights import Checkpoint, load, save
from litchi.run import Run
from litchi.schema.processor import Builder, Noising, Processor
from litchi.schema.sequence import Batch, TokenSequence, pack
from litchi.schema.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXACT, RANGE, SEARCH, FEEDBACK = "float32", "range of a group", "nearest steps", "errors fed back"
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    RANGE: lambda weight: dequantise(*quantise(weight, 4)),
    SEARCH: round_alone,
}
WORDS = ModelConfig(
    vocab_size=0, width=256, num_layers=4, num_heads=4, num_kv_heads=2, head_width=64, mlp_width=768, max_length=WINDOW
)
"""Of the language model that is trained here."""
ITEMS = {"talk": 4, "describe": 2, "draw": 1, "foresee": 8, "watch": 2, "act": 2}
"""Of --items one in so many is asked; a dialogue is several questions, a dream twenty frames."""


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    asked.folder.mkdir(parents=True, exist_ok=True)
    match asked.part:
        case "large":
            large(asked.folder, asked.tokens)
        case "words":
            words(asked.folder, asked.seconds, asked.tokens)
        case "moved":
            moved(asked.folder, asked.text, asked.tokens)
        case _:
            tiny(asked.folder, asked.tokens, asked.items)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("words", "moved", "tiny", "large"), default="moved")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "runs" / "rounding")
    parser.add_argument("text", type=Path, nargs="?", default=ROOT / "README.md", help="that SmolLM2 is scored on")
    parser.add_argument("--seconds", type=float, default=100, help="of training")
    parser.add_argument("--tokens", type=int, default=16_384, help="that are read for feedback")
    parser.add_argument("--threads", type=int, default=native.THREADS, help="one, beside other work")
    parser.add_argument("--items", type=int, default=64, help="for each ability; 0 looks at scores instead")
    return parser.parse_args()


def all_ways(plain: Path, documents: Callable[[], Iterator[Batch]]) -> dict[str, Model]:
    """The checkpoint as it is and rounded in each way; that with feedback is written beside it, as a user would."""
    loaded = load(plain)
    found = {EXACT: loaded.model.requires_grad_(False)}
    for name, way in ALONE.items():
        found[name] = copy.deepcopy(found[EXACT])
        for matrix in linears(found[name]):
            matrix.weight.copy_(way(matrix.weight))
    fed, began = plain.with_name(f"{plain.name}-fed"), time.perf_counter()
    if not fed.exists():
        going_on = fed.with_name(f".{fed.name}.halfway").exists()
        calibrate(plain, fed, documents())
        if not going_on:
            append("rounding", f"{plain.name}: feedback takes", time.perf_counter() - began, "s")
    found[FEEDBACK] = load(fed).model.requires_grad_(False)
    return found


def linears(model: Model) -> list[nn.Linear]:
    return [m for layer in model.layers for sets in steps(layer) for s in sets for m in s]


# ---- language models on the native path ---------------------------------------------------------------------------


def score(what: str, models: dict[str, Model], windows: Tensor, forms: Sequence[Format] = ("int4", "w4a8")) -> None:
    """Rows of int4 and w4a8 with each way of rounding, beside fp32."""
    whole = models[EXACT]
    exact = scores_of(Trunk(whole, torch.float32, "float32"), whole, windows)
    for form in forms:
        told = {EXACT: apart(exact, exact, windows)}
        for name, model in models.items():
            if name != EXACT:
                told[name] = apart(exact, scores_of(Trunk(model, weights=form), model, windows), windows)
        for measure in told[EXACT]:
            beside = {name: figures[measure] for name, figures in told.items()}
            peer = {"peer": SEARCH, "peer_figure": beside[SEARCH]}
            append("rounding", f"{what}, {form}: {measure}", beside[FEEDBACK], "", **peer, beside=beside)


def words(folder: Path, seconds: float, tokens: int) -> None:
    files = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.py")])
    held = files[5::10]
    learned = "\n".join(path.read_text(encoding="utf-8") for path in files if path not in held)
    plain, text = folder / "words", folder / "learned.txt"
    text.write_text(learned, encoding="utf-8")
    if not plain.exists():
        train(plain, learned, seconds)
    loaded = load(plain)
    unseen = "\n".join(path.read_text(encoding="utf-8") for path in held)
    windows = cut(loaded.processor, unseen, 32)
    models = all_ways(plain, lambda: batches(text_windows(text, loaded.processor, tokens), tokens))
    score("words", models, windows)


def train(folder: Path, text: str, seconds: float, rows: int = 4, row: int = 256) -> None:
    """From nothing, one seed, on random windows."""
    tokenizer = Tokenizer.train(text.split("\n\n"), vocab_size=2048)
    ids = torch.tensor(tokenizer.encode(text))
    model = Model(replace(WORDS, vocab_size=len(tokenizer)))
    initialise(model, 0)
    inner, rest = [*matrices(model)], [p for name, p in model.named_parameters() if not is_matrix(name, p)]
    optimizers = [
        torch.optim.Muon(inner, lr=4e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    generator, began = torch.Generator().manual_seed(0), time.perf_counter()
    loss, step = torch.tensor(0.0), 0
    while (spent := (time.perf_counter() - began) / seconds) < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 20, 1.05 - spent)
        at = torch.randint(0, len(ids) - row - 1, (rows,), generator=generator).tolist()
        batch = pack([document(ids[a : a + row].tolist()) for a in at], row=row)
        labels = torch.cat([ids[a + 1 : a + row + 1] for a in at])
        loss = F.cross_entropy(model.logits(model(batch)), labels)
        for parameter in model.parameters():
            parameter.grad = None
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        step += 1
    print(f"{step} steps of {rows * row} tokens, of {len(ids)}; last loss {float(loss.detach()):.3f}")
    save(folder, model.eval(), Processor(tokenizer, None, {}, Noising()), meta={"step": step, "seconds": seconds})


def is_matrix(name: str, parameter: Tensor) -> bool:
    return parameter.dim() == 2 and name.startswith("layers.")


def document(ids: list[int]) -> TokenSequence:
    builder = Builder()
    for index in ids:
        builder.token(index)
    return builder.build()


def cut(processor: Processor, text: str, most: int) -> Tensor:
    ids = processor.tokenizer.encode(text)[: most * WINDOW]
    return torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW)


def moved(folder: Path, text: Path, tokens: int) -> None:
    """The weights of bench/formats.py's `off_the_grid`, fed with our documentation."""
    plain = folder / "moved"
    if not plain.exists():
        loaded, generator = load(find_checkpoint("smollm2")), torch.Generator().manual_seed(0)
        for weight in matrices(loaded.model.requires_grad_(False)):
            _, step, _ = quantise(weight, 4)
            noise = torch.rand(weight.shape, generator=generator) - 0.5
            weight.add_(noise * step.float().repeat_interleave(32, 1) / 1.5)
        save(plain, loaded.model, loaded.processor, meta={})
    read = folder / "docs.txt"
    read.write_text("\n".join(p.read_text(encoding="utf-8") for p in sorted((ROOT / "docs").glob("*.md"))))
    processor = load(plain).processor
    models = all_ways(plain, lambda: batches(text_windows(read, processor, tokens), tokens))
    score("SmolLM2, weights moved", models, cut(processor, text.read_text(encoding="utf-8"), 4), ("int4",))


# ---- the shipped checkpoint, in PyTorch ---------------------------------------------------------------------------


def tiny(folder: Path, tokens: int, items: int) -> None:
    plain, place = folder / "tiny", Place(folder)
    loaded = load(find_checkpoint("tiny"))
    run = from_json(Run, (loaded.folder / "run.json").read_text(encoding="utf-8"))
    data = DataConfig(train=dict.fromkeys(run.data.train, 400), test=dict.fromkeys(run.data.test, 160))
    make_data(data, place.data)
    if not plain.exists():
        save_as(plain, loaded, loaded.model, run)
    read = {split: documents(loaded.processor, run, place, split) for split in ("train", "test")}
    models = all_ways(plain, lambda: batches(read["train"], tokens))
    if not items:
        unseen = list(batches(read["test"], 8_192))
        scores = {name: torch.cat([m.logits(m(batch)) for batch in unseen]) for name, m in models.items()}
        told = {name: float((s - scores[EXACT]).pow(2).mean().sqrt()) for name, s in scores.items()}
        peer = {"peer": SEARCH, "peer_figure": told[SEARCH]}
        append("rounding", "tiny: scores of words apart from fp32", told[FEEDBACK], "rms", **peer, beside=told)
        return
    less = {name: items // share for name, share in ITEMS.items()}
    asked = replace(run, eval=replace(run.eval, **less, drift_steps=0, free_dialogues=0, baseline_samples=400))
    boards = {}
    for name, model in models.items():
        rounded = folder / f"tiny {name}"
        save_as(rounded, loaded, model, run)
        boards[name] = make_board(asked, rounded, place)
    for name, board in boards.items():
        for row in board.rows:
            beside = {"low": row.score.low, "high": row.score.high, "n": float(row.score.n)}
            append("rounding", f"tiny, {name}: {row.ability}", row.score.value, row.score.name, beside=beside)


def documents(processor: Processor, run: Run, place: Place, split: str) -> Iterator[TokenSequence]:
    shelves = open_shelves(place.data, split)
    mixture = {source: share for source, share in run.mixture.items() if source in shelves}
    at = Loader(shelves, mixture, run.train.seed).at
    return (processor.encode(at(index), np.random.default_rng(index)) for index in count())


def save_as(folder: Path, loaded: Checkpoint, model: Model, run: Run) -> None:
    text = (loaded.folder / "run.json").read_text(encoding="utf-8")
    save(folder, model, loaded.processor, meta={"name": run.name}, run=text)


# ---- memory -------------------------------------------------------------------------------------------------------


def large(folder: Path, tokens: int, part: int = 4) -> None:
    """Everything that matters is a matrix, so that the whole width takes the square of `part` times as much."""
    c = YI_34B
    config = replace(
        WORDS,
        vocab_size=330,
        width=c.width // part,
        num_layers=1,
        num_heads=c.num_heads // part,
        num_kv_heads=c.num_kv_heads // part,
        head_width=c.head_width,
        mlp_width=c.mlp_width // part,
    )
    model = Model(config)
    initialise(model, 0)
    processor = Processor(Tokenizer.train(["words"], vocab_size=330), None, {}, Noising())
    save(folder / "large", model.eval(), processor, meta={})
    del model
    ids = torch.randint(0, 330, (tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    read = batches((document(row.tolist()) for row in ids), tokens)
    before, watch = anonymous(), Watch()
    watch.start()
    calibrate(folder / "large", folder / "large-fed", read)
    watch.done.set()
    grown, whole = watch.most - before, sum(shape.numel() for shape in parameters(c).values()) * 4
    what = f"memory of a layer with 1/{part} of Yi-34B's widths, {tokens} tokens"
    peer = {"peer": f"all weights of Yi-34B in fp32, over {part**2}", "peer_figure": whole / part**2 / 1e9}
    append("rounding", what, grown / 1e9, "GB", **peer)


if __name__ == "__main__":
    main()
