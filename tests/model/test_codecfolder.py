"""What others keep an autoencoder in becomes a codec folder by `litchi convert`, and goes back with every bit of it."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from litchi.cli import main
from litchi.config import BadInput, from_json, to_json
from litchi.model import latent
from litchi.model.autoencoder import KLConfig
from litchi.model.codecfolder import CodecFolder, load_codec
from litchi.model.latent import (
    AutoencoderConfig,
    LatentCodec,
    LatentCodecConfig,
    build_autoencoder,
    export_autoencoder,
    load_autoencoder,
    write_autoencoder,
)
from litchi.model.taesd import TinyConfig
from litchi.model.wan import WanConfig
from litchi.model.weights import load_processor, save_processor
from litchi.schema.sample import Image, Role, Sample, Text
from litchi.train.fit import FitConfig, fit_processor
from tests.model.autoencoders import picture, random_weights
from tests.model.table import record

REAL = Path(__file__).parents[3] / "shared" / "weights" / "taef2"

FLUX = KLConfig(channels=4, widths=(4, 8), num_blocks=1, groups=2, shift=(0.1159,), scale=(0.3611,))
SD3 = replace(FLUX, shift=(0.0609,), scale=(1.5305,))
SDXL = replace(FLUX, mixed=True, shift=(0.0,), scale=(0.13025,))
SD15 = replace(SDXL, scale=(0.18215,))
WAN = WanConfig(4, 4, (1, 2), 1, (True,), (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5))
TAESD = TinyConfig(4, 8)
DIFFUSERS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    """The published autoencoders have hundreds of megabytes; these have the same parts."""
    ours = {"flux": FLUX, "sd3": SD3, "sdxl": SDXL, "sd15": SD15, "wan21": WAN}
    assert ours.keys() == latent.KNOWN.keys()
    for name, config in ours.items():
        monkeypatch.setitem(latent.KNOWN, name, config)


def tensors_of(config: AutoencoderConfig, naming: latent.Naming, dtype: torch.dtype) -> dict[str, Tensor]:
    return export_autoencoder(random_weights(build_autoencoder(config)), naming, dtype)


def convert(*words: str | Path) -> int:
    return main(["convert", *map(str, words)])


def there_and_back(source: Path, place: Path, *options: str) -> tuple[LatentCodec, dict[str, dict[str, Tensor]]]:
    """The codec that the folder became, and the tensors of each file that came back."""
    assert convert(source, place / "ours", *options) == 0
    assert convert(place / "ours", place / "back", "--to", "huggingface") == 0
    return load_codec(place / "ours"), {p.name: load_file(p) for p in (place / "back").glob("*.safetensors")}


def same(found: dict[str, Tensor], told: dict[str, Tensor]) -> bool:
    return found.keys() == told.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in told.items()
    )


# ---- both ways ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, label, config, options",
    [
        ("ae.safetensors", "FLUX.1's `ae.safetensors`", FLUX, ()),
        ("sdxl_vae.safetensors", "an SDXL's, one file", SDXL, ("--as", "sdxl")),
        ("vae.safetensors", "an SD 1.5's, one file", SD15, ("--as", "sd15")),
        ("vae.safetensors", "an SD3's, one file", SD3, ("--as", "sd3")),
        ("Wan2.1_VAE.pth", "Wan 2.1's `Wan2.1_VAE.pth`", WAN, ()),
        ("taesd.safetensors", "a TAESD's, one file", TAESD, ()),
    ],
    ids=["FLUX", "SDXL", "SD15", "SD3", "Wan", "TAESD"],
)
def test_one_file_goes_both_ways(
    name: str, label: str, config: AutoencoderConfig, options: tuple[str, ...], tmp_path: Path
) -> None:
    for number, kind in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        place = tmp_path / str(number)
        place.mkdir()
        told = tensors_of(config, "original", kind)
        save_file(told, place / name) if name.endswith("safetensors") else torch.save(OrderedDict(told), place / name)
        codec, files = there_and_back(place / name, place, *options)
        [(back, found)] = files.items()
        assert back == Path(name).with_suffix(".safetensors").name and same(found, told)
        direct = LatentCodec.of(load_autoencoder(place / name, config))
        assert torch.equal(codec.encode(picture(16, 16)), direct.encode(picture(16, 16)))
        assert codec.config.autoencoder == config
    again = "the same names" + ("" if name.endswith("safetensors") else ", as safetensors")
    record("what `litchi convert` takes", label, " ".join(options) or "nothing", again, "bit for bit")


@pytest.mark.parametrize(
    "name, config, kind",
    [
        ("AutoencoderTiny", TAESD, torch.float16),
        ("AutoencoderKL", replace(FLUX, shift=(0.5,)), torch.float32),
        ("AutoencoderKLWan", WAN, torch.bfloat16),
        ("AutoencoderKLQwenImage", WAN, torch.bfloat16),
    ],
)
def test_a_folder_of_diffusers_goes_both_ways(
    name: str, config: AutoencoderConfig, kind: torch.dtype, tmp_path: Path
) -> None:
    """What its configuration says to nobody here comes back too."""
    told, source = tensors_of(config, "diffusers", kind), tmp_path / "vae"
    source.mkdir()
    save_file(told, source / DIFFUSERS)
    said = write_autoencoder(config) | {"_class_name": name, "_diffusers_version": "0.99", "sample_size": 7}
    (source / "config.json").write_text(json.dumps(said))
    codec, files = there_and_back(source, tmp_path)
    assert files.keys() == {DIFFUSERS} and same(files[DIFFUSERS], told)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == said
    assert codec.config.autoencoder == config
    record("what `litchi convert` takes", f"a folder of `{name}`", "nothing", "a folder of its class", "bit for bit")


@pytest.mark.skipif(not REAL.is_dir(), reason="TAEF2's weights are not here (github.com/madebyollin/taesd)")
def test_a_real_one_goes_both_ways(tmp_path: Path) -> None:
    codec, files = there_and_back(REAL, tmp_path)
    assert files.keys() == {"taef2_encoder.safetensors", "taef2_decoder.safetensors"}
    for half in ("encoder", "decoder"):
        told = torch.load(REAL / f"taef2_{half}.pth", weights_only=True)
        assert same(files[f"taef2_{half}.safetensors"], told)
    assert (codec.patch, codec.channels) == (8, 32)
    assert same({n: p for n, p in codec.state_dict().items()}, LatentCodec.of(load_autoencoder(REAL)).state_dict())
    assert convert(tmp_path / "back", tmp_path / "again") == 0, "what came back is read as what came"
    record(
        "what `litchi convert` takes",
        "TAEF2's two files, real weights",
        "nothing",
        "two files, safetensors",
        "bit for bit",
    )


def test_a_processor_is_fitted_around_a_codec_folder(tmp_path: Path) -> None:
    """And keeps it: a flow then learns its rows, four cells a row as FLUX has them."""
    save_file(tensors_of(FLUX, "original", torch.bfloat16), tmp_path / "ae.safetensors")
    assert convert(tmp_path / "ae.safetensors", tmp_path / "ours") == 0
    sample = Sample((Text(text="a red ball"), Image(pixels=picture(8, 16), role=Role.USER)), "k", "s")
    config = FitConfig(codec=CodecFolder(tmp_path / "ours", pack=2), vocab_size=300)
    assert from_json(FitConfig, to_json(config)) == config
    processor = fit_processor(config, [sample], seed=0)
    save_processor(tmp_path / "kept", processor)
    again = load_processor(tmp_path / "kept").codec
    assert isinstance(again, LatentCodec) and again.channels == 16
    rows = again.encode(picture(8, 16))
    assert rows.shape == (8, 16) and torch.equal(rows, load_codec(tmp_path / "ours", pack=2).encode(picture(8, 16)))
    assert np.array_equal(again.decode(rows, 8, 16), processor.codec.decode(rows, 8, 16))
    with pytest.raises(BadInput, match="film_patch=0"):
        fit_processor(replace(config, film_patch=4), [sample], seed=0)


# ---- what is refused ----------------------------------------------------------------------------------------------


def refusal(capsys, *words: str | Path) -> str:
    """The one line that says why."""
    capsys.readouterr()
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_a_file_that_does_not_say_what_it_is_asks(tmp_path: Path, capsys) -> None:
    save_file(tensors_of(FLUX, "original", torch.float32), tmp_path / "x.safetensors")
    assert "add --as, one of flux, sd3" in refusal(capsys, tmp_path / "x.safetensors", tmp_path / "ours")
    assert "did you mean 'flux'" in refusal(capsys, tmp_path / "x.safetensors", tmp_path / "ours", "--as", "flax")
    assert "asks for [4, 3, 3, 3, 3]" in refusal(capsys, tmp_path / "x.safetensors", tmp_path / "ours", "--as", "wan21")
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "llm.safetensors")
    assert "--as says which autoencoder" in refusal(
        capsys, tmp_path / "llm.safetensors", tmp_path / "o", "--as", "flux"
    )
    assert "also holds config.json" in refusal(capsys, tmp_path / "llm.safetensors", tmp_path / "o")


FAULTS = {
    "missing": "has no tensor",
    "shape": "its configuration asks for",
    "NaN": "NaN",
    "over": "nothing reads, such as 'encoder.odd'",
    "wide": "save it as float32, float16, bfloat16",
    "cut": "lies at bytes",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_refused_and_nothing_is_written(fault: str, tmp_path: Path, capsys) -> None:
    tensors, path = tensors_of(FLUX, "original", torch.float32), tmp_path / "ae.safetensors"
    name = "encoder.conv_in.weight"
    match fault:
        case "missing":
            del tensors[name]
        case "shape":
            tensors[name] = tensors[name][:, :2].contiguous()
        case "NaN":
            tensors[name][0, 0, 0, 0] = float("nan")
        case "over":
            tensors["encoder.odd"] = torch.zeros(1)
        case "wide":
            tensors[name] = tensors[name].double()
    save_file(tensors, path)
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    error = refusal(capsys, path, tmp_path / "ours")
    assert FAULTS[fault] in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ae.safetensors"]


def test_a_codec_folder_that_changed_is_refused(tmp_path: Path, capsys) -> None:
    save_file(tensors_of(FLUX, "original", torch.float32), tmp_path / "ae.safetensors")
    assert convert(tmp_path / "ae.safetensors", tmp_path / "ours") == 0
    assert "holds no network" in refusal(capsys, tmp_path / "ours", tmp_path / "again")
    assert "not empty" in refusal(capsys, tmp_path / "ours", tmp_path / "ours", "--to", "huggingface")
    (tmp_path / "ours" / "codec.json").write_text((tmp_path / "ours" / "codec.json").read_text() + " ")
    assert "has changed" in refusal(capsys, tmp_path / "ours", tmp_path / "back", "--to", "huggingface")


@pytest.mark.parametrize("stem", ["../out", "/etc/out", "..", "", "a\\b", "a\0b"])
def test_a_codec_folder_writes_nowhere_else(stem: str) -> None:
    said = {"autoencoder": {"type": "TinyConfig"}, "origin": {"stem": stem}}
    with pytest.raises(BadInput, match="is no name of a file"):
        from_json(LatentCodecConfig, json.dumps(said))


def test_a_half_or_a_folder_of_another_class_is_refused(tmp_path: Path, capsys) -> None:
    save_file({"0.weight": torch.zeros(3)}, tmp_path / "own_encoder.safetensors")
    assert "one half of an autoencoder" in refusal(capsys, tmp_path / "own_encoder.safetensors", tmp_path / "o")
    assert "nor NAME_decoder.pth" in refusal(capsys, tmp_path, tmp_path / "o")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    assert "class 'VQModel' cannot be read" in refusal(capsys, tmp_path / "vae", tmp_path / "o")
    (tmp_path / "model_index.json").write_text("{}")
    assert "name one part of it, such as" in refusal(capsys, tmp_path, tmp_path / "o")
    assert "leave out --as flux" in refusal(capsys, tmp_path / "vae", tmp_path / "o", "--as", "flux")
