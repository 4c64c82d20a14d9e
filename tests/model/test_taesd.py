"""TAEF2 draws real pictures again, the family equals diffusers' class, and a bad file of weights is refused."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from litchi.config import BadInput
from litchi.model.latent import (
    LatentCodec,
    export_autoencoder,
    from_tensors,
    load_autoencoder,
    read_autoencoder,
    save_autoencoder,
)
from litchi.model.network import Flow, Model, ModelConfig, initialise
from litchi.model.taesd import TinyAutoencoder, TinyConfig, infer_tiny, read_tiny
from litchi.model.torchfile import read_pickled
from litchi.model.weights import load, save
from litchi.schema.processor import Noising, Processor
from litchi.schema.tokenizer import Tokenizer
from tests.model.autoencoders import TINY, gap, random_weights, signals, their_config, their_model
from tests.model.table import digit, record

SHARED = Path(__file__).parents[3] / "shared"
TAEF2, EMOJI = SHARED / "weights" / "taef2", SHARED / "data" / "emoji_google" / "images64.zip"
real = pytest.mark.skipif(not TAEF2.is_dir(), reason="TAEF2's two files are not here (github.com/madebyollin/taesd)")

SMALL = TinyConfig(channels=3, width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1), normed=True)
TOLERANCE = 1e-4
"""Of values up to 10 in fp32; sums may run in another order."""


def halves(model: TinyAutoencoder, dtype: torch.dtype = torch.float32) -> dict[str, OrderedDict]:
    """The two files of their owners."""
    found = {"encoder": OrderedDict(), "decoder": OrderedDict()}
    for name, tensor in export_autoencoder(model, "original", dtype).items():
        half, _, rest = name.partition(".")
        found[half][rest] = tensor
    return found


# ---- real weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def taef2() -> TinyAutoencoder:
    return load_autoencoder(TAEF2)


def test_a_checkpoint_keeps_the_autoencoder_that_it_draws_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = LatentCodec.of(TinyAutoencoder(SMALL), pack=2)
    tokenizer = Tokenizer.train(["a red ball"], vocab_size=300, actions=[])
    net = Model(ModelConfig(vocab_size=len(tokenizer), width=16, num_layers=1, num_heads=1, num_kv_heads=1,
                            head_width=16, mlp_width=16, modalities={"image": Flow(codec.channels)}))  # fmt: skip
    initialise(net, 0)
    save(tmp_path / "kept", net, Processor(tokenizer, codec, {}, Noising()), meta={})
    again = load(tmp_path / "kept").processor.codec
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert isinstance(again, LatentCodec) and again.config == codec.config
    assert torch.equal(again.encode(pixels), codec.encode(pixels))


@real
@pytest.mark.skipif(not EMOJI.is_file(), reason="Noto Emoji's pictures are not here (npm emoji-datasource-google)")
@pytest.mark.parametrize("code, floor", [("1f1e7-1f1f7", 25.0), ("1f56f-fe0f", 33.0)])
def test_taef2_draws_a_real_picture_again(taef2: TinyAutoencoder, code: str, floor: float) -> None:
    """Measured: the flag of Brazil 25.5 dB, the candle 34.0 dB; with red and blue exchanged 11.6 and 16.9 dB."""
    codec = LatentCodec.of(taef2)
    with zipfile.ZipFile(EMOJI) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(f"/{code}.png") or n == f"{code}.png"]
        drawn = Image.open(io.BytesIO(archive.read(name))).convert("RGBA")
    pixels = np.array(Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB"))
    rows = codec.encode(pixels)
    assert rows.shape == (64, 32) and 0.5 < float(rows.std()) < 1.5, "near unit noise, as a flow needs it"
    error = np.square(codec.decode(rows, 64, 64).astype(float) - pixels).mean()
    assert 10 * np.log10(255**2 / error) > floor


@real
def test_taef2_goes_back_bit_for_bit(taef2: TinyAutoencoder) -> None:
    assert taef2.config == TinyConfig(channels=32, normed=True)
    for half, tensors in halves(taef2, torch.float16).items():
        told = torch.load(TAEF2 / f"taef2_{half}.pth", weights_only=True)
        assert tensors.keys() == told.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in told.items())


@real
def test_one_file_under_the_names_of_diffusers_is_the_same(taef2: TinyAutoencoder, tmp_path: Path) -> None:
    save_file(export_autoencoder(taef2, "diffusers", torch.float16), tmp_path / "taef2.safetensors")
    again = load_autoencoder(tmp_path / "taef2.safetensors")
    assert again.config == taef2.config
    named = dict(again.named_parameters())
    assert all(torch.equal(named[name], tensor) for name, tensor in taef2.named_parameters())


# ---- the oracle ---------------------------------------------------------------------------------------------------


def test_it_is_the_class_of_diffusers(tmp_path: Path) -> None:
    theirs, ours = their_model("AutoencoderTiny", TINY, tmp_path, 0.1), load_autoencoder(tmp_path)
    pixels = signals(2, 3, 16, 24)
    with torch.no_grad():
        latents = theirs.encode(pixels).latents
        seen = gap(ours.encode(pixels), latents)
        beyond = signals(2, 4, 4, 6) * 9
        drawn = theirs.decode(beyond).sample
        assert min(float(x.std(dim=(2, 3)).min()) for x in (latents, drawn)) > 0.01, "a constant would prove nothing"
        shown = gap(ours.decode(beyond), drawn)
        assert max(seen, shown) <= TOLERANCE
    saved, back = load_file(tmp_path / "diffusion_pytorch_model.safetensors"), tmp_path / "back"
    save_autoencoder(back, ours)
    written = load_file(back / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == written.keys() and all(torch.equal(saved[name], written[name]) for name in saved)
    assert read_autoencoder(their_config(back)) == ours.config
    with torch.no_grad():
        assert torch.equal(type(theirs).from_pretrained(back).encode(pixels).latents, latents)
    record(
        "autoencoder", "TAESD, TAESDXL, TAESD3, TAEF1", "`AutoencoderTiny`", digit(seen), digit(shown), "bit for bit"
    )


# ---- without either -----------------------------------------------------------------------------------------------


def test_both_namings_hold_the_same_weights(tmp_path: Path) -> None:
    model = random_weights(TinyAutoencoder(SMALL))
    for naming in ("diffusers", "original"):
        again = from_tensors(SMALL, export_autoencoder(model, naming, torch.float32), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for half, tensors in halves(model).items():
        torch.save(tensors, tmp_path / f"own_{half}.pth")
    with pytest.raises(BadInput, match="name its configuration, or a folder with config.json"):
        load_autoencoder(tmp_path)
    again = load_autoencoder(tmp_path, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_group_norm_sees_the_whole_picture() -> None:
    """A change in one corner reaches the other end only through it."""
    moved = {}
    for normed in (True, False):
        model = random_weights(TinyAutoencoder(TinyConfig(3, 4, (1, 1), (1, 1), normed)))
        pixels = signals(1, 3, 64, 64)
        other = pixels.clone()
        other[..., :8, :8] *= -1
        moved[normed] = gap(model.encode(pixels)[..., -1, -1], model.encode(other)[..., -1, -1])
    assert moved[True] > 0 and moved[False] == 0


def test_every_size_of_the_family_is_told_from_its_tensors() -> None:
    for channels, normed in ((4, False), (16, False), (32, True)):
        with torch.device("meta"):
            tensors = TinyAutoencoder(TinyConfig(channels, normed=normed)).state_dict()
        assert infer_tiny(tensors) == TinyConfig(channels, normed=normed)


def test_what_diffusers_cannot_say_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no group norm"):
        save_autoencoder(tmp_path / "new", TinyAutoencoder(SMALL))
    plain = TinyAutoencoder(TinyConfig(3, 4, (1, 1), (1, 1)))
    (tmp_path / "here").write_text("")
    with pytest.raises(BadInput, match="not empty"):
        save_autoencoder(tmp_path, plain)


# ---- bad files ----------------------------------------------------------------------------------------------------


class Attack:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return print, ("run",)


def damaged(tensors: OrderedDict, fault: str) -> object:
    name = next(iter(tensors))
    match fault:
        case "missing":
            return OrderedDict(list(tensors.items())[1:])
        case "shape":
            return tensors | {name: tensors[name][..., :2]}
        case "NaN":
            return tensors | {name: tensors[name] * float("nan")}
        case "over":
            return tensors | {"odd": torch.zeros(1)}
        case "sparse":
            return tensors | {name: tensors[name].to_sparse()}
        case "code":
            return tensors | {name: Attack()}
        case "text":
            return tensors | {name: "text"}
    return [tensors]


FAULTS = {
    "missing": "has no tensor 'encoder.0.weight'",
    "shape": "has shape .4, 3, 3, 2., its configuration asks for .4, 3, 3, 3.",
    "NaN": "'encoder.0.weight' holds NaN",
    "over": "1 tensors that nothing reads, such as 'encoder.odd'",
    "sparse": "'0.weight' is no dense tensor",
    "code": "holds more than tensors",
    "text": "'0.weight' is str and not a tensor",
    "list": "no dictionary of tensors, but list",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_half_is_refused_with_its_reason(fault: str, tmp_path: Path, capsys) -> None:
    both = halves(random_weights(TinyAutoencoder(SMALL)))
    torch.save(damaged(both["encoder"], fault), tmp_path / "own_encoder.pth")
    torch.save(both["decoder"], tmp_path / "own_decoder.pth")
    with pytest.raises(BadInput, match=FAULTS[fault]):
        load_autoencoder(tmp_path, SMALL)
    assert capsys.readouterr().out == "", "nothing in the file ran"


def test_what_is_no_archive_of_tensors_is_refused(tmp_path: Path, capsys) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(Attack()))
    for read in (read_pickled, load_autoencoder):
        with pytest.raises(BadInput, match="no archive of torch.save|is a pickle|cut off"):
            read(path)
    torch.save({"a": torch.zeros(64)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:200])
    with pytest.raises(BadInput, match="cannot be read"):
        read_pickled(path)
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(BadInput, match="compressed"):
        read_pickled(path)
    assert capsys.readouterr().out == ""


def test_a_folder_that_lacks_a_file_says_which(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="NAME_encoder.pth"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(BadInput, match="no diffusion_pytorch_model.safetensors"):
        load_autoencoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    with pytest.raises(BadInput, match="class 'VQModel' cannot be read"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"act_fn": "gelu"},
        {"encoder_block_out_channels": [8, 16]},
        {"latent_channels": -4},
        {"num_encoder_blocks": [10**9]},
        {"scaling_factor": float("nan")},
        {"scaling_factor": 0},
        {"num_decoder_blocks": [1, 1]},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_configuration_that_cannot_be_computed_is_refused(wrong: dict) -> None:
    with pytest.raises(BadInput):
        read_tiny({"_class_name": "AutoencoderTiny"} | wrong)
