"""LoRA adapters as PEFT saves them: small changes of a network's matrices, read from folders that nobody trusts.

    adapter = read_adapter(Path("runs/poet"), "poet", model)
    adapter.updates["layers.0.experts.0.self_attn.q_proj"]  # y = W x becomes y = W x + up (down x)

Nothing is unpickled, no name is a pattern, and what a configuration asks for and the network does not compute is
refused by its name. Source: https://huggingface.co/docs/peft, `LoraConfig` and its `adapter_model.safetensors`

R rank, I inner values and O outputs of a matrix.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from litchi.config import BadInput, nearest
from litchi.model.network import Model
from litchi.model.tensorfile import DTYPES, PICKLE_MEND, TensorFile, check_finite, open_safetensors, show, unique
from litchi.model.weights import to_hugging_face

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

MAX_RANK = 256
MAX_CONFIG = 1 << 20
"""Bytes of a configuration; a real one has a thousand."""
MAX_NAMES = 4096
"""Of modules in one field of it, each of which is held against every matrix of the network."""

MATRIX = re.compile(
    r"layers\.\d+\.experts\.0\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
)
"""What an adapter may change, under our names."""

PREFIX = "base_model.model."
ENDS = {".lora_A.weight": "down", ".lora_B.weight": "up"}

PLAIN = re.compile(r"[\w.]{1,200}")
"""A name within a pattern: PEFT takes regular expressions, which a stranger may make endless."""

READ = frozenset(
    "peft_type r lora_alpha use_rslora rank_pattern alpha_pattern target_modules init_lora_weights".split()
)
NO_BEARING = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode lora_dropout task_type peft_version exclude_modules "
    "layers_to_transform layers_pattern megatron_core megatron_config ensure_weight_tying eva_config corda_config "
    "loftq_config lora_ga_config qalora_group_size runtime_config".split()
)
"""What was of use in training, or only together with a field that is refused."""

WORDS = {
    "use_dora": "DoRA, which also scales the rows of matrices",
    "bias": "biases that were trained with it",
    "lora_bias": "biases of its own",
    "modules_to_save": "modules that were trained whole",
    "target_parameters": "parameters that are no linear maps",
    "trainable_token_indices": "tokens that were trained",
    "layer_replication": "layers that are copied",
}
INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
"""Beginnings of training that leave the weights of the network as they are; PiSSA, OLoRA and LoftQ change those."""


@dataclass(frozen=True, slots=True)
class Update:
    """What is added to one matrix, fp32: `up` times `down`, the scale within `up`."""

    down: Float[Tensor, "R I"]
    up: Float[Tensor, "O R"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """Updates of a network's matrices, by the names of our modules."""

    name: str
    digest: str
    """SHA-256 of all that bits depend on: names, shapes and values of the updates."""
    updates: Mapping[str, Update]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a configuration says, in PEFT's words; names of modules are those of Hugging Face."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...]
    """Ends of names that are changed; empty where it is told by a pattern, which is not followed."""
    everywhere: bool
    """Whether `targets` hold in every layer."""

    def rank(self, module: str) -> int:
        return of_module(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        rank = self.rank(module)
        return of_module(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def read_adapter(folder: Path, name: str, model: Model) -> Adapter:
    """Raises BadInput, naming file, fault and mend, for what does not fit the network or is not LoRA."""
    settings, matrices = read_settings(folder / CONFIG), matrices_of(model)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise BadInput(f"{folder} has only {PICKLED}: {PICKLE_MEND}")
    with open_safetensors(folder / WEIGHTS) as file:
        found = modules_in(file, matrices)
        check_targets(file.path, settings, found, matrices)
        updates = {matrices[m][0]: read_update(file, m, settings, matrices[m][1]) for m in sorted(found)}
    return Adapter(name, digest_of(updates), updates)


def matrices_of(model: Model) -> dict[str, tuple[str, nn.Linear]]:
    """What an adapter may change, by the name that Hugging Face has for it: our name, and the matrix."""
    if model.config.experts != 1:
        raise BadInput("adapters are read for networks with one set of weights, and this one has two: serve without")
    found = {n: m for n, m in model.named_modules() if MATRIX.fullmatch(n) and isinstance(m, nn.Linear)}
    return {to_hugging_face(name): (name, module) for name, module in found.items()}


def digest_of(updates: Mapping[str, Update]) -> str:
    digest = hashlib.sha256()
    for module, update in sorted(updates.items()):
        for part in (update.down, update.up):
            digest.update(json.dumps([module, list(part.shape)]).encode())
            digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- tensors ------------------------------------------------------------------------------------------------------


def modules_in(file: TensorFile, matrices: Mapping[str, Any]) -> set[str]:
    """The modules that a file changes, each by two tensors."""
    halves: dict[str, set[str]] = {}
    for name in file.entries:
        end = next((end for end in ENDS if name.endswith(end)), "")
        module = name.removeprefix(PREFIX).removesuffix(end)
        if not end or not name.startswith(PREFIX) or module not in matrices:
            hint = nearest(module, matrices) if len(name) < 200 else ""
            raise BadInput(
                f"{file.path}: tensor {show(name)} is no low-rank change of a projection of this network{hint}; "
                "train on q, k, v, o, gate, up and down projections only"
            )
        halves.setdefault(module, set()).add(end)
    if torn := sorted(module for module, ends in halves.items() if len(ends) < 2):
        raise BadInput(f"{file.path}: {torn[0]} has only one of lora_A and lora_B: copy the adapter again")
    if not halves:
        raise BadInput(f"{file.path} changes nothing: copy the adapter again")
    return set(halves)


def check_targets(path: Path, settings: Settings, found: set[str], matrices: Mapping[str, Any]) -> None:
    """That tensors and configuration speak of the same modules."""
    if not settings.targets:
        return
    asked = {module for module in matrices if any(ends(module, target) for target in settings.targets)}
    if odd := sorted(found - asked):
        raise BadInput(f"{path}: {odd[0]} is changed, and target_modules does not name it: copy the adapter again")
    if settings.everywhere and (odd := sorted(asked - found)):
        raise BadInput(f"{path}: target_modules names {odd[0]}, which is not there: copy the adapter again")


def read_update(file: TensorFile, module: str, settings: Settings, matrix: nn.Linear) -> Update:
    rank = settings.rank(module)
    shapes = {".lora_A.weight": (rank, matrix.in_features), ".lora_B.weight": (matrix.out_features, rank)}
    found = []
    for end, shape in shapes.items():
        entry = file.entries[f"{PREFIX}{module}{end}"]
        if entry.shape != shape:
            raise BadInput(
                f"{file.path}: tensor {show(entry.name)} is {list(entry.shape)}, and rank {rank} on this network is "
                f"{list(shape)}: serve it with the network that it was trained on"
            )
        if not DTYPES[entry.dtype].is_floating_point or entry.dtype.startswith("F8"):
            raise BadInput(f"{file.path}: tensor {show(entry.name)} is {entry.dtype}: save it in BF16, F16 or F32")
        found.append(file.read(entry.name, torch.float32))
        check_finite(found[-1], entry.name, file.path)
    up = found[1] * settings.scale(module)
    check_finite(up, f"{PREFIX}{module}.lora_B.weight", file.path)
    return Update(found[0], up)


# ---- configuration ------------------------------------------------------------------------------------------------


def read_settings(path: Path) -> Settings:
    """Raises BadInput for whatever is not LoRA as it is computed here."""
    said = read_object(path)
    if said.get("peft_type") != "LORA":
        raise BadInput(
            f"{path}: peft_type is {shown(said.get('peft_type'))}, and only LORA is read: train a LoRA adapter"
        )
    if said.pop("bias", "none") != "none":
        refuse(path, "bias", "not none")
    for name in sorted(said.keys() - READ - NO_BEARING):
        if said[name]:
            refuse(path, name, shown(said[name]))
    if (initial := said.get("init_lora_weights", True)) not in INITIAL:
        raise BadInput(
            f"{path}: init_lora_weights is {shown(initial)}, which changes the network's own weights: convert it to a "
            "plain LoRA as PEFT's guide on initialisation says"
        )
    fault = f"{path}: target_modules must be up to {MAX_NAMES} names, or a pattern"
    targets = said.get("target_modules") or ()
    names = () if isinstance(targets, str) else targets
    if not isinstance(names, list | tuple) or len(names) > MAX_NAMES or not all(isinstance(n, str) for n in names):
        raise BadInput(f"{fault}, and is {shown(targets)}: copy the adapter again")
    some = any(said.get(name) for name in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    rooted = said.get("use_rslora") or False
    if not isinstance(rooted, bool):
        raise BadInput(f"{path}: use_rslora must be true or false, and is {shown(rooted)}: copy the adapter again")
    return Settings(
        r=rank_of(path, "r", said.get("r")),
        lora_alpha=alpha_of(path, "lora_alpha", said.get("lora_alpha")),
        use_rslora=rooted,
        rank_pattern={k: rank_of(path, k, v) for k, v in patterns(path, said, "rank_pattern").items()},
        alpha_pattern={k: alpha_of(path, k, v) for k, v in patterns(path, said, "alpha_pattern").items()},
        targets=tuple(names),
        everywhere=not some,
    )


def read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"{path} is missing: name a folder that PEFT's save_pretrained wrote")
    if path.stat().st_size > MAX_CONFIG:
        raise BadInput(f"{path} has more than {MAX_CONFIG} bytes: copy the adapter again")
    try:
        said = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON ({str(error)[:200]}): copy the adapter again") from error
    if not isinstance(said, dict):
        raise BadInput(f"{path} is no JSON object: copy the adapter again")
    return said


def rank_of(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise BadInput(
            f"{path}: the rank {show(name)} must be 1 to {MAX_RANK}, and is {shown(value)}: train a smaller one"
        )
    return value


def alpha_of(path: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e6:  # NaN is not either
        raise BadInput(f"{path}: the scale {show(name)} must be a number up to 1e6, and is {shown(value)}")
    return float(value)


def patterns(path: Path, said: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values for some modules, by the ends of their names."""
    found = said.get(name) or {}
    if not isinstance(found, dict) or len(found) > MAX_NAMES:
        raise BadInput(f"{path}: {name} must be an object of names, and is {shown(found)}: copy the adapter again")
    if odd := [key for key in found if not PLAIN.fullmatch(key)]:
        raise BadInput(f"{path}: {name} has the pattern {show(odd[0])}, and only plain names are read: spell it out")
    return found


def of_module(found: Mapping[str, Any], module: str, usual: Any) -> Any:
    return next((value for key, value in found.items() if ends(module, key)), usual)


def ends(module: str, name: str) -> bool:
    """Whether `name` is the module, or the last words of it, as PEFT has it."""
    return module == name or module.endswith(f".{name}")


def refuse(path: Path, name: str, value: str) -> None:
    what = WORDS.get(name, "something that is not computed here")
    raise BadInput(f"{path}: {name} is {value}, which asks for {what}: train a plain LoRA adapter, without {name}")


def shown(value: Any) -> str:
    """A value of JSON as a message quotes it: short, however deep it is."""
    match value:
        case str():
            return show(value)
        case dict() | list():
            return "an object" if isinstance(value, dict) else "a list"
    return str(value)[:60]
