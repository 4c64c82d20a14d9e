"""BAGEL's folder becomes a checkpoint by `litchi convert`: it talks as BAGEL does, keeps its codec, and goes back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch import Tensor

from litchi.cli import main
from litchi.config import BadInput
from litchi.model import latent
from litchi.model.autoencoder import FLUX, KLAutoencoder, KLConfig
from litchi.model.bagel import read_bagel
from litchi.model.generate import Generator
from litchi.model.latent import LatentCodec, export_autoencoder, pack_cells, unpack_cells
from litchi.model.weights import load
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Role, Text
from litchi.schema.sequence import pack
from tests.model.autoencoders import picture, random_weights
from tests.model.table import digit, record
from tests.model.test_bagel import LLM, SMALL, TOLERANCE, Reference, Words, theirs

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
START, END = 1, 2
CODEC = KLConfig(channels=3, widths=(4, 4, 8, 8), num_blocks=1, groups=2, shift=FLUX.shift, scale=FLUX.scale)
BIG = SMALL | {"llm_config": LLM | {"vocab_size": 280}}
FILES = {"ema.safetensors", "ae.safetensors", "config.json", "llm_config.json", "vit_config.json", "tokenizer.json"}


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """FLUX's own autoencoder has 335 MB; this one has the same parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(latent.KNOWN, "flux", CODEC)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """As BAGEL-7B-MoT is published: bf16, an autoencoder in fp32, Qwen's tokenizer, and an index of other programs."""
    place = tmp_path_factory.mktemp("bagel") / "BAGEL"
    place.mkdir()
    save_file({n: t.bfloat16() for n, t in theirs(read_bagel(BIG)).items()}, place / "ema.safetensors")
    save_file(codec_tensors(), place / "ae.safetensors")
    for key in ("llm_config", "vit_config"):
        (place / f"{key}.json").write_text(json.dumps(BIG[key]))
    inner = ("llm_config", "vit_config")
    (place / "config.json").write_text(json.dumps({key: value for key, value in BIG.items() if key not in inner}))
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "ema.safetensors"}}))
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=CONTROLS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["a red ball", "where is the red ball"], trainer)
    backend.save(str(place / "tokenizer.json"))
    qwen = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    said = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": qwen, "add_bos_token": False}
    (place / "tokenizer_config.json").write_text(json.dumps(said))
    return place


def codec_tensors() -> dict[str, Tensor]:
    return export_autoencoder(random_weights(KLAutoencoder(CODEC)), "original", torch.float32)


@pytest.fixture(scope="module")
def ours(folder: Path, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ours") / "bagel"
    assert main(["convert", str(folder), str(place)]) == 0
    return place


def said(*texts: str) -> tuple[Text, ...]:
    """Turns of a user and an assistant."""
    return tuple(Text(text=t, role=(Role.USER, Role.ASSISTANT)[i % 2]) for i, t in enumerate(texts))


# ---- in -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_says_what_bagel_says(folder: Path, ours: Path) -> None:
    """Each text between two marks and nothing else, as `prepare_prompts` has it; then the scores, then the words."""
    loaded = load(ours)
    tokens = loaded.processor.prompt(said("a red ball", "where", "is the red")).tokens
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    told = [[START, *backend.encode(text).ids, END] for text in ("a red ball", "where", "is the red")]
    assert tokens == [*sum(told, []), START]
    reference = Reference({n: t.float() for n, t in load_file(folder / "ema.safetensors").items()})
    words, ids = list(tokens), []
    for _ in range(12):
        hidden, _, _ = reference.read([Words(tuple(words))])
        ids.append(int(reference.linear("language_model.lm_head", hidden[-1]).argmax()))
        words.append(ids[-1])
    stop = ids.index(END) if END in ids else len(ids)
    request = Request(parts=said("a red ball", "where", "is the red"), params=SamplingParams(max_tokens=12))
    assert list(Generator(loaded.model, loaded.processor).complete(request).tokens) == ids[:stop] != []
    document = loaded.processor.prompt(said("a red ball", "where", "is the red")).build()
    found = loaded.model.logits(loaded.model(pack([document])))
    hidden, _, _ = reference.read([Words(tuple(tokens))])
    gap = float((found - reference.linear("language_model.lm_head", hidden)).abs().max())
    assert gap <= TOLERANCE
    how = f"the same on a conversation, {stop} greedy tokens equal"
    record("model that sees and draws", "BAGEL, by `litchi convert`", how, digit(gap), "bit for bit, autoencoder too")


def test_its_autoencoder_is_kept_as_its_codec(ours: Path) -> None:
    codec = load(ours).processor.codec
    assert isinstance(codec, LatentCodec) and (codec.patch, codec.channels) == (16, 12)
    pixels = picture(32, 48)
    direct = random_weights(KLAutoencoder(CODEC))
    with torch.no_grad():
        cells = direct.encode(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1)[0]
    cells = (cells - FLUX.shift[0]) * FLUX.scale[0]
    told = torch.einsum("chpwq->hwpqc", cells.reshape(3, 2, 2, 3, 2)).reshape(-1, 12)  # as BAGEL's forward has it
    rows = codec.encode(pixels)
    torch.testing.assert_close(rows, told, rtol=0, atol=1e-5)
    assert codec.decode(rows, 32, 48).shape == (32, 48, 3)
    assert torch.equal(unpack_cells(pack_cells(cells, 2, "channel"), 2, 2, 3, "channel"), cells)


def test_it_draws_and_sees_nothing_in_a_conversation_yet(ours: Path) -> None:
    loaded = load(ours)
    generator = Generator(loaded.model, loaded.processor)
    for want in ("image", "frame"):
        with pytest.raises(BadInput, match="cannot draw"):
            generator.complete(Request(parts=said("a red ball"), want=want, height=32, width=32))
    with pytest.raises(BadInput, match="reads text only"):
        loaded.processor.prompt((Image(pixels=picture(32, 32), role=Role.USER),))


# ---- back ---------------------------------------------------------------------------------------------------------


def test_it_goes_back_bit_for_bit(folder: Path, ours: Path, tmp_path: Path, capsys) -> None:
    """And once more after the checkpoint was written again, and what came back is read as what came."""
    assert main(["convert", str(ours), str(tmp_path / "again")]) == 0
    for source, back in ((ours, tmp_path / "a"), (tmp_path / "again", tmp_path / "b")):
        assert main(["convert", str(source), str(back), "--to", "huggingface"]) == 0
        assert FILES <= {path.name for path in back.iterdir()}
        for name in ("ema.safetensors", "ae.safetensors"):
            told, found = load_file(folder / name), load_file(back / name)
            assert told.keys() == found.keys()
            assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in told.items())
        for name in ("llm_config.json", "vit_config.json"):
            assert json.loads((back / name).read_text()) == json.loads((folder / name).read_text())
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "ours")]) == 0
    assert "read as bagel" in capsys.readouterr().out
    assert load(tmp_path / "ours").meta["golden"] == load(ours).meta["golden"]


def test_without_an_autoencoder_it_has_no_codec(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("ae.*"))
    assert main(["convert", str(tmp_path / "bare"), str(tmp_path / "ours")]) == 0
    assert load(tmp_path / "ours").processor.codec is None
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    assert not (tmp_path / "back" / "ae.safetensors").exists()


# ---- what is refused ----------------------------------------------------------------------------------------------


def broken(place: Path, fault: str) -> None:
    match fault:
        case "ema cut off":
            path = place / "ema.safetensors"
            path.write_bytes(path.read_bytes()[:-64])
        case "NaN":
            tensors = load_file(place / "ema.safetensors")
            odd = tensors | {"llm2vae.bias": tensors["llm2vae.bias"] * float("nan")}
            save_file({name: tensor.clone() for name, tensor in odd.items()}, place / "ema.safetensors")
        case "a pickle":
            torch.save({"a": torch.zeros(1)}, place / "ema.safetensors")
        case "llm_config of another kind":
            (place / "llm_config.json").write_text(json.dumps(LLM | {"rms_norm_eps": 1e-6, "rope_scaling": [1]}))
        case "vae_config of another kind":
            (place / "config.json").write_text(json.dumps(SMALL | {"vae_config": [3], "llm_config": BIG["llm_config"]}))
        case "no vit_config":
            (place / "vit_config.json").unlink()
        case "no tokenizer":
            (place / "tokenizer.json").unlink()
        case "another autoencoder":
            other = KLAutoencoder(replace(CODEC, widths=(4, 8, 8, 8)))
            save_file(export_autoencoder(other, "original", torch.float32), place / "ae.safetensors")
        case "cells of another size":
            (place / "config.json").write_text(json.dumps(BIG | {"vae_config": {"z_channels": 3, "downsample": 4}}))


FAULTS = {
    "ema cut off": "ema.safetensors is broken",
    "NaN": "'llm2vae.bias' holds NaN",
    "a pickle": "it is a pickle",
    "llm_config of another kind": "its configurations hold what cannot be read",
    "vae_config of another kind": "its configurations hold what cannot be read",
    "no vit_config": "vit_config.json is missing",
    "no tokenizer": "tokenizer.json",
    "another autoencoder": "ae.safetensors: encoder.down.1.block.0.norm2.weight|its configuration asks for",
    "cells of another size": "makes cells of 8 pixels, config.json asks for 4",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_folder_is_refused_in_one_line(fault: str, folder: Path, tmp_path: Path, capsys) -> None:
    place = tmp_path / "in"
    shutil.copytree(folder, place)
    broken(place, fault)
    assert main(["convert", str(place), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert any(words in error for words in FAULTS[fault].split("|")), error
    assert not (tmp_path / "ours").exists()
