"""A checkpoint is one folder: safetensors with Hugging Face's names, the processor, and golden logits to check a load.

    model/config.json  model/model.safetensors      the network
    processor/tokenizer.json  processor.json  codec.safetensors
    run.json                                        the exact Run, if a run wrote it
    meta.json                                       what this is, SHA-256 of each file, golden logits

No pickle anywhere: a load runs no code from the folder.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from litchi.config import BadInput, from_json, to_json
from litchi.model.codec import CodecConfig, PixelCodec, PixelCodecConfig, TileCodec, build_codec, regroup
from litchi.model.efficientnet import from_tensors
from litchi.model.eye import NAME, FrozenEye, FrozenEyeConfig
from litchi.model.latent import LatentCodec, LatentCodecConfig, keep_codec, kept_codec
from litchi.model.network import Mask, Model, ModelConfig
from litchi.model.seal import FORMAT, Check, check_files, digest, read_meta, seal
from litchi.model.tensorfile import open_tensors
from litchi.schema.backends import from_file
from litchi.schema.foreign import ChatConfig, ForeignProcessor, ForeignTokenizer
from litchi.schema.processor import Noising, Processor, Space
from litchi.schema.sequence import Modality, TokenSequence, Vectors, pack
from litchi.schema.sight import Sight, SightConfig
from litchi.schema.tokenizer import Tokenizer

log = logging.getLogger("litchi.start")

ORIGINAL = "original.json"
"""The config.json of a model that others trained, kept beside ours: it is given back on the way out."""
EYE = "eye.safetensors"
"""The weights of a frozen network that a model sees with."""
CODEC = "codec.safetensors"
"""The weights with which pictures are coded."""
PREPROCESSOR = "preprocessor_config.json"
"""The same for how it looks at pictures."""

GOLDEN_TOLERANCE = 2e-3
"""Largest difference of golden logits in fp32; machines differ in the order of their sums."""


@dataclass(frozen=True, slots=True)
class ProcessorConfig:
    """All of a processor that is not weights."""

    codec: CodecConfig | LatentCodecConfig | None
    spaces: dict[str, Space]
    noising: Noising = Noising()
    sight: PixelCodecConfig | None = None
    """How pictures that a user shows are cut for the vision tower; None reads them as codes."""
    film_patch: int = 0
    """Pixels of a token of a frame of a world or clip; 0 codes frames as pictures are coded."""
    chat: ChatConfig | None = None
    """How a language model that others trained lays out its text; None for ours."""
    eye: SightConfig | FrozenEyeConfig | None = None
    """How such a model looks at pictures; None for one that does not see."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a folder holds, loaded."""

    model: Model
    processor: Processor
    meta: dict
    folder: Path


# ---- writing ------------------------------------------------------------------------------------------------------


def save(
    folder: Path,
    model: Model,
    processor: Processor,
    *,
    meta: Mapping[str, object],
    run: str = "",
    original: str = "",
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write a checkpoint beside `folder` and rename it into place, so that a torn one is never seen.

    `extra` are further safetensors files by relative path: what resuming needs.
    """
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "model").mkdir(parents=True)
    weights = {
        to_hugging_face(name): t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()
    }
    save_file(weights, draft / "model" / "model.safetensors", metadata={"format": "pt"})
    (draft / "model" / "config.json").write_text(to_json(model.config))
    save_processor(draft / "processor", processor)
    if run:
        (draft / "run.json").write_text(run)
    if original:
        (draft / "model" / ORIGINAL).write_text(original)
    for path, tensors in (extra or {}).items():
        (draft / path).parent.mkdir(parents=True, exist_ok=True)
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, draft / path)
    publish(draft, folder, meta=meta)


def publish(
    draft: Path,
    folder: Path,
    *,
    meta: Mapping[str, object],
    check: bool = True,
    digests: Mapping[str, str] | None = None,
) -> None:
    """Seal a draft and rename it into place; with `check`, load it once for golden logits.

    `digests` are those of files by relative path that somebody has already computed.
    """
    known = digests or {}
    names = [str(p.relative_to(draft)) for p in sorted(draft.rglob("*")) if p.is_file()]
    files = {name: known.get(name) or digest(draft / name) for name in names}
    whole = {"format": FORMAT, **meta, "golden": golden(load_model(draft)) if check else None, "files": files}
    (draft / "meta.json").write_text(json.dumps({**whole, "sha256": seal(whole)}, indent=1))
    for path in draft.rglob("*"):
        if path.is_file():
            flush(path)
    replace_folder(draft, folder)


def save_processor(folder: Path, processor: Processor) -> None:
    folder.mkdir(parents=True)
    processor.tokenizer.backend.save(str(folder / "tokenizer.json"), pretty=False)
    codec = processor.codec
    if isinstance(codec, LatentCodec):
        keep_codec(codec, folder / CODEC)
    elif isinstance(codec, nn.Module):
        save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, folder / CODEC)
    if isinstance(processor, ForeignProcessor):
        eye = processor.eye.config if isinstance(processor.eye, Sight | FrozenEye) else None
        config = ProcessorConfig(getattr(codec, "config", None), {}, chat=processor.tokenizer.config, eye=eye)
        (folder / "processor.json").write_text(to_json(config))
        if isinstance(processor.eye, FrozenEye):
            save_file(processor.eye.network.state_dict(), folder / EYE)
        return
    sight = getattr(processor.sight, "config", None)
    film_patch = 0 if processor.film is None else processor.film.patch
    config = ProcessorConfig(getattr(codec, "config", None), processor.spaces, processor.noising, sight, film_patch)
    (folder / "processor.json").write_text(to_json(config))


def replace_folder(draft: Path, folder: Path) -> None:
    """Put `draft` where `folder` is, by renames; a kill in between leaves the old one whole, as `.NAME.old`."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- reading ------------------------------------------------------------------------------------------------------


Place = Callable[[Model], Callable[[str, Tensor], Tensor]]
"""For a network without weights: where each parameter goes, by its name, and in which type."""


def load(folder: Path, *, check: bool = True, place: Place | None = None, checked: Check | None = None) -> Checkpoint:
    """Read a checkpoint in fp32. Raises BadInput, naming the file and the mend, if anything is missing or changed.

    With `place` parameters lie where that has them; golden logits, which are of fp32 on a CPU, are then not compared.
    `checked` is a check of its files that has been begun already.
    """
    meta = read_meta(folder)
    if not (folder / "model").is_dir():
        raise BadInput(f"{folder} holds no network, but {meta.get('family', 'something else')}: name a checkpoint")
    with ThreadPoolExecutor(2) as beside:  # hashing and copying hold nobody up
        files = checked or beside.submit(check_files, folder, meta if check else {"files": {}})
        processor = beside.submit(load_processor, folder / "processor")
        try:
            model = load_model(folder, place)
        finally:
            files.result()  # what is known of a changed file goes before what it made of the load
    log.debug("read the network")
    if (
        check
        and place is None
        and meta["golden"]
        and (gap := golden_gap(golden(model), meta["golden"])) > GOLDEN_TOLERANCE
    ):
        raise BadInput(f"{folder}: golden logits differ by {gap:.2g}: the weights are not those that were saved")
    return Checkpoint(model, processor.result(), meta, folder)


def load_model(folder: Path, place: Place | None = None) -> Model:
    """The network alone, in fp32 or as `place` has it, one tensor after another."""
    with torch.device("meta"), Unset():
        model = Model(load_config(folder))
    put = place(model) if place is not None else lambda _, value: value
    named = dict(model.named_parameters())
    with open_tensors(folder / "model") as tensors, torch.no_grad():
        names = {from_hugging_face(name): name for name in tensors.entries}
        if names.keys() != named.keys():
            odd = sorted(names.keys() ^ named.keys())[:3]
            raise BadInput(f"{folder}: weights and config.json do not fit: {', '.join(odd)}: copy the checkpoint again")
        weights = {}
        for name, parameter in named.items():
            if (found := tensors.entries[names[name]].shape) != tuple(parameter.shape):
                raise BadInput(f"{folder}: weights and config.json do not fit: {name} is {found}: copy it again")
            weights[name] = put(name, tensors.read(names[name], torch.float32))
            log.debug("read %s", name)
    model.load_state_dict(weights, assign=True)
    return model.eval()


class Unset(TorchFunctionMode):
    """Parameters are made and not filled; to fill meta ones, torch would load its compiler for a second."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        named = dict(kwargs or {})
        if getattr(func, "__module__", "") == nn.init.__name__:
            return named.get("tensor", args[0] if args else None)
        return func(*args, **named)


def load_config(folder: Path) -> ModelConfig:
    return from_json(ModelConfig, (folder / "model" / "config.json").read_text())


def load_processor(folder: Path) -> Processor:
    config = from_json(ProcessorConfig, (folder / "processor.json").read_text())
    codec = load_codec(config.codec, folder / CODEC)
    if config.chat is not None:
        tokenizer = ForeignTokenizer(from_file(folder / "tokenizer.json"), config.chat, take=True)
        match config.eye:
            case None:
                eye = None
            case FrozenEyeConfig() as c:
                eye = FrozenEye(c, from_tensors(load_tensors(folder / EYE), NAME))
            case SightConfig() as c:
                eye = Sight(c)
        return ForeignProcessor(tokenizer, eye, codec=codec)
    sight = None if config.sight is None else PixelCodec(config.sight)
    film = (
        regroup(codec, config.film_patch) if isinstance(codec, PixelCodec | TileCodec) and config.film_patch else None
    )
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return Processor(tokenizer, codec, config.spaces, config.noising, film=film, sight=sight)


def load_codec(
    config: CodecConfig | LatentCodecConfig | None, path: Path
) -> PixelCodec | TileCodec | LatentCodec | None:
    match config:
        case None:
            return None
        case LatentCodecConfig():
            return kept_codec(config, path)
    codec = build_codec(config)
    if isinstance(codec, nn.Module):
        codec.load_state_dict(load_tensors(path))
    return codec


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise BadInput(f"{path} cannot be read ({error}): copy the checkpoint again") from error


# ---- names --------------------------------------------------------------------------------------------------------


def to_hugging_face(name: str) -> str:
    """The trunk under Qwen3's names; a second expert's modules end in `_moe_gen`, as BAGEL has them.

    Its MLP is one such module, `mlp_moe_gen`; its attention shares the module and has projections of its own.
    """
    parts = name.split(".")
    if parts[0] == "layers":
        expert, rest = int(parts[3]), parts[4:]
        if expert:
            rest[0 if rest[0] == "mlp" else -2] += "_moe_gen"
        return ".".join(["model", "layers", parts[1], *rest])
    return f"model.{name}" if parts[0] in ("embed_tokens", "norm", "norm_moe_gen") else name


def from_hugging_face(name: str) -> str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        expert = int("_moe_gen" in name)
        return ".".join(["layers", parts[2], "experts", str(expert), *(p.removesuffix("_moe_gen") for p in parts[3:])])
    return name.removeprefix("model.")


# ---- golden logits ------------------------------------------------------------------------------------------------


@torch.no_grad()
def golden(model: Model) -> list[float]:
    """Sixteen scores after a fixed document of text and, where the model reads codes, a picture."""
    c, count = model.config, 12
    tokens = torch.arange(1, count + 1) * 7919 % c.vocab_size
    positions = torch.arange(count)[:, None].expand(-1, 3).contiguous()
    vectors = {}
    match c.modalities.get(Modality.IMAGE):
        case Mask(digits, levels):
            index = torch.arange(4, 8)
            value = (torch.arange(4 * digits) * 31 % levels).float().view(4, digits)
            place = torch.tensor([(0, 0, 0)]).expand(4, -1)  # all in the middle, as the positions below say
            vectors[Modality.IMAGE] = Vectors(index, place, value, torch.ones(4), torch.zeros(4))
    spans = torch.tensor([0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 8])
    ones = torch.ones(count, dtype=torch.bool)
    document = TokenSequence(tokens, torch.full((count,), -100), torch.zeros(count), positions, spans, ones, vectors)
    was = model.training
    scores = model.eval().logits(model(pack([document])))[-1]
    model.train(was)
    return [round(float(x), 6) for x in scores[:16]]


def golden_gap(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, expected, strict=True))
