"""The autoencoders of FLUX, Stable Diffusion and Wan equal those of diffusers, and their latents are a modality."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litchi.config import BadInput, from_json, to_json
from litchi.model.autoencoder import FLUX, SD3, SD15, SDXL, KLAutoencoder, KLConfig, kl_places, read_kl, write_kl
from litchi.model.latent import (
    Autoencoder,
    LatentCodec,
    LatentCodecConfig,
    export_autoencoder,
    from_tensors,
    load_autoencoder,
    pack_cells,
    read_autoencoder,
    save_autoencoder,
    unpack_cells,
)
from litchi.model.network import Flow, Model, ModelConfig, initialise
from litchi.model.objective import objective
from litchi.model.taesd import TinyAutoencoder, TinyConfig
from litchi.model.wan import WAN21, Past, WanAutoencoder, WanConfig, read_wan, wan_places, write_wan
from litchi.schema.processor import Noising, Processor
from litchi.schema.sample import Image, Role, Sample, Text
from litchi.schema.sequence import Modality, pack
from tests.laws.documents import processor
from tests.model.autoencoders import (
    FLUX_LIKE,
    KL,
    WAN,
    gap,
    picture,
    random_weights,
    signals,
    their_config,
    their_model,
)
from tests.model.table import digit, record

TOLERANCE = 1e-4
"""Of values up to 10 in fp32; sums may run in another order."""

laws = settings(max_examples=20, deadline=None, derandomize=True)

SMALL_KL = KLConfig(channels=4, widths=(4, 8), num_blocks=1, groups=2, shift=(0.1159,), scale=(0.3611,))
SMALL_WAN = WanConfig(4, 4, (1, 2), 1, (True,), (0.1, -0.2, 0.3, 0.0), (1.0, 2.0, 0.5, 1.5))
SMALL_TINY = TinyConfig(4, 4, (1, 1), (1, 1))


def small(config: TinyConfig | KLConfig | WanConfig) -> Autoencoder:
    return random_weights(LatentCodec(LatentCodecConfig(config)).autoencoder)


def check_written_back(folder: Path, ours: Autoencoder) -> Path:
    """Bit for bit, under a configuration that says the same; returns the folder that was written."""
    back = folder / "back"
    save_autoencoder(back, ours)
    saved, written = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder, back))
    assert saved.keys() == written.keys() and all(torch.equal(saved[name], written[name]) for name in saved)
    assert read_autoencoder(their_config(back)) == ours.config
    return back


# ---- the oracle ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"), [("FLUX.1, SD3", FLUX_LIKE), ("SD 1.5, SDXL (quant convs)", KL)], ids=["FLUX", "SD"]
)
def test_the_image_autoencoder_is_that_of_diffusers(family: str, options: dict, tmp_path: Path) -> None:
    theirs, ours = their_model("AutoencoderKL", options, tmp_path), load_autoencoder(tmp_path)
    pixels = signals(2, 3, 16, 24)
    with torch.no_grad():
        latents = theirs.encode(pixels).latent_dist.mode()
        gaps = gap(ours.encode(pixels), latents), gap(ours.decode(latents), theirs.decode(latents).sample)
        assert max(gaps) <= TOLERANCE
        back = check_written_back(tmp_path, ours)
        assert torch.equal(type(theirs).from_pretrained(back).decode(latents).sample, theirs.decode(latents).sample)
    record("autoencoder", family, "`AutoencoderKL`", *map(digit, gaps), "bit for bit")


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLQwenImage"])
def test_the_video_autoencoder_is_that_of_diffusers(name: str, tmp_path: Path) -> None:
    """Nine frames, which theirs reads as one, four and four."""
    theirs, ours = their_model(name, WAN, tmp_path), load_autoencoder(tmp_path)
    clip = signals(2, 3, 9, 16, 24)
    with torch.no_grad():
        latents = theirs.encode(clip).latent_dist.mode()
        assert latents.shape == (2, 4, 3, 2, 3)
        told = theirs.decode(latents).sample
        drawn = ours.decode_clip(latents, Past()).clamp(-1, 1)
        gaps = gap(ours.encode_clip(clip, Past()), latents), gap(drawn, told)
        assert max(gaps) <= TOLERANCE
        assert gap(ours.encode(clip[:, :, 0]), latents[:, :, 0]) <= TOLERANCE, "a picture is a clip of one frame"
    check_written_back(tmp_path, ours)
    family = {"AutoencoderKLWan": "Wan 2.1, nine frames"}.get(name, "Qwen-Image, nine frames")
    record("autoencoder", family, f"`{name}`", *map(digit, gaps), "bit for bit")


def test_the_original_names_are_those_that_diffusers_reads(tmp_path: Path) -> None:
    """Its own converters take our files under the original names; their order of the decoder's stages is one step."""
    pytest.importorskip("diffusers", reason="pip install diffusers, the oracle of these tests")
    from diffusers.loaders import single_file_utils as convert

    shallow = replace(SMALL_KL, widths=(4, 8, 8), mixed=True)
    told = convert.convert_ldm_vae_checkpoint(
        export_autoencoder(small(shallow), "original", torch.float32), write_kl(shallow)
    )
    ours = export_autoencoder(small(shallow), "diffusers", torch.float32)
    assert told.keys() == ours.keys() and all(torch.equal(told[name], ours[name]) for name in ours)
    deep = WanConfig(channels=4, width=2, mean=(0.0,), deviation=(1.0,))
    told = convert.convert_wan_vae_to_diffusers(export_autoencoder(small(deep), "original", torch.float32))
    ours = export_autoencoder(small(deep), "diffusers", torch.float32)
    assert told.keys() == ours.keys() and all(torch.equal(told[name], ours[name]) for name in ours)


def test_packed_rows_are_those_of_flux() -> None:
    pytest.importorskip("diffusers", reason="pip install diffusers, the oracle of these tests")
    from diffusers import FluxPipeline

    latents = signals(1, 16, 4, 6)
    assert torch.equal(pack_cells(latents[0], 2), FluxPipeline._pack_latents(latents, 1, 16, 4, 6)[0])


# ---- names and configurations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SMALL_KL, replace(SMALL_KL, mixed=True), SMALL_WAN], ids=["FLUX", "SD", "Wan"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_one_file_under_the_original_names_goes_in_and_out(
    config: KLConfig | WanConfig, suffix: str, tmp_path: Path
) -> None:
    model = small(config)
    saved = export_autoencoder(model, "original", torch.bfloat16)
    path = tmp_path / f"ae{suffix}"
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    back = export_autoencoder(load_autoencoder(path, config), "original", torch.bfloat16)
    assert back.keys() == saved.keys() and all(torch.equal(back[name], saved[name]) for name in saved)


def test_the_real_files_have_these_names() -> None:
    """As they stand in FLUX's ae.safetensors and Wan2.1_VAE.pth: counts of tensors, and names that are easy to miss."""
    flux = {place.theirs for place in kl_places(FLUX, "original")}
    assert len(flux) == 244
    assert flux >= {"decoder.up.0.block.0.nin_shortcut.weight", "decoder.up.3.upsample.conv.weight"}
    assert flux >= {
        "encoder.mid.attn_1.proj_out.bias",
        "encoder.down.2.downsample.conv.bias",
        "decoder.norm_out.weight",
    }
    wan = {place.theirs for place in wan_places(WAN21, "original")}
    assert len(wan) == 194
    assert wan >= {"decoder.upsamples.4.shortcut.weight", "decoder.upsamples.7.time_conv.weight", "conv1.bias"}
    assert wan >= {"encoder.downsamples.5.time_conv.bias", "encoder.head.0.gamma", "decoder.middle.2.residual.6.bias"}
    assert wan >= {"decoder.upsamples.11.resample.1.weight", "decoder.upsamples.14.residual.3.gamma"}


def test_a_configuration_survives_being_written() -> None:
    for config in (FLUX, SD3, SDXL, SD15, SMALL_KL, replace(SD15, shift=(0.5,) * 4, scale=(0.5, 1.0, 2.0, 0.25))):
        assert read_kl(write_kl(config)) == config
    for config in (WAN21, SMALL_WAN):
        assert read_wan(write_wan(config)) == config
    for config in (FLUX, SD15, WAN21, SMALL_TINY):
        assert from_json(LatentCodecConfig, to_json(LatentCodecConfig(config, 2))) == LatentCodecConfig(config, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"_class_name": "AutoencoderKL", "act_fn": "relu"},
        {"_class_name": "AutoencoderKL", "block_out_channels": [30], "norm_num_groups": 4},
        {"_class_name": "AutoencoderKL", "layers_per_block": 10**9},
        {"_class_name": "AutoencoderKL", "down_block_types": ["AttnDownEncoderBlock2D"]},
        {"_class_name": "AutoencoderKL", "latents_std": [0.0, 1.0, 1.0, 1.0]},
        {"_class_name": "AutoencoderKLWan", "is_residual": True},
        {"_class_name": "AutoencoderKLWan", "attn_scales": [1.0]},
        {"_class_name": "AutoencoderKLWan", "temperal_downsample": [True]},
        {"_class_name": "AutoencoderKLWan", "latents_std": [1.0, 2.0]},
        {"_class_name": "AutoencoderKLWan", "base_dim": 3},
    ],
    ids=lambda wrong: "-".join(map(str, list(wrong)[1:])),
)
def test_a_configuration_that_cannot_be_computed_is_refused(wrong: dict) -> None:
    with pytest.raises(BadInput):
        read_autoencoder(wrong)


def test_a_file_that_does_not_fit_is_refused_with_its_reason(tmp_path: Path) -> None:
    path, whole = tmp_path / "ae.safetensors", export_autoencoder(small(SMALL_KL), "original", torch.float32)
    name = "encoder.mid.attn_1.q.weight"
    faults = {
        "has no tensor 'encoder.mid.attn_1.q.weight'": {n: t for n, t in whole.items() if n != name},
        "has shape .8, 8., its configuration asks for .8, 8, 1, 1.": whole
        | {name: whole[name][:, :, 0, 0].contiguous()},
        "'encoder.mid.attn_1.q.weight' holds NaN": whole | {name: whole[name] / 0},
        "1 tensors that nothing reads, such as 'loss.logvar'": whole | {"loss.logvar": torch.zeros(1)},
    }
    for reason, tensors in faults.items():
        save_file(tensors, path)
        with pytest.raises(BadInput, match=reason):
            load_autoencoder(path, SMALL_KL)
    with pytest.raises(BadInput, match="name its configuration"):
        load_autoencoder(path)


# ---- clips --------------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.integers(0, 2), st.integers(0, 1))
def test_a_clip_in_pieces_is_coded_as_a_whole(first: int, second: int, third: int) -> None:
    """Both ways. The tolerance is that of convolutions over other lengths."""
    model, lengths = small(SMALL_WAN), [first, second, third]
    clip = signals(1, 3, 2 * sum(lengths) - 1, 4, 6)
    pieces = clip.split([2 * n - (not i) for i, n in enumerate(lengths)], dim=2)
    with torch.no_grad():
        whole, past = model.encode_clip(clip, Past()), Past()
        coded = [model.encode_clip(piece, past) for piece in pieces if piece.shape[2]]
        assert gap(torch.cat(coded, dim=2), whole) <= 1e-5
        frames, past = model.decode_clip(whole, Past()), Past()
        drawn = [model.decode_clip(latents, past) for latents in coded]
        assert frames.shape == clip.shape and gap(torch.cat(drawn, dim=2), frames) <= 1e-5


def test_no_frame_sees_a_later_one() -> None:
    model, clip = small(SMALL_WAN), signals(1, 3, 5, 4, 4)
    other = clip.clone()
    other[:, :, 3:] *= -1
    with torch.no_grad():
        before, after = (model.encode_clip(c, Past()) for c in (clip, other))
        assert gap(before[:, :, :2], after[:, :, :2]) <= 1e-6 and gap(before[:, :, 2], after[:, :, 2]) > 1e-3
        latents = before.clone()
        latents[:, :, 2] *= -1
        drawn, changed = (model.decode_clip(z, Past()) for z in (before, latents))
        assert gap(drawn[:, :, :3], changed[:, :, :3]) <= 1e-6 and gap(drawn[:, :, 3:], changed[:, :, 3:]) > 1e-3


def test_a_clip_of_a_wrong_length_is_refused() -> None:
    model, past = small(SMALL_WAN), Past()
    with pytest.raises(BadInput, match="begins with one frame and has after it groups of 2 frames, but 4 came"):
        model.encode_clip(signals(1, 3, 4, 4, 4), past)
    model.encode_clip(signals(1, 3, 1, 4, 4), past)
    with pytest.raises(BadInput, match="goes on in groups of 2 frames, but 3 came"):
        model.encode_clip(signals(1, 3, 3, 4, 4), past)


# ---- as a codec ---------------------------------------------------------------------------------------------------


@laws
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_cells_come_back_from_rows(channels: int, side: int, height: int, width: int) -> None:
    latents = signals(channels, side * height, side * width)
    rows = pack_cells(latents, side)
    assert torch.equal(unpack_cells(rows, side, height, width), latents)
    assert torch.equal(rows[-1].view(channels, side, side), latents[:, -side:, -side:]), "reading order"


@pytest.mark.parametrize("config", [SMALL_TINY, SMALL_KL, SMALL_WAN], ids=["TAESD", "FLUX", "Wan"])
@pytest.mark.parametrize("side", [1, 2])
def test_rows_are_the_normalised_latents(config: TinyConfig | KLConfig | WanConfig, side: int) -> None:
    model = small(config)
    codec, pixels = LatentCodec.of(model, pack=side), picture(8, 12)
    assert (codec.patch, codec.channels) == (2 * side, 4 * side**2)
    rows = codec.encode(pixels)
    with torch.no_grad():
        signal = torch.from_numpy(pixels).permute(2, 0, 1).float()[None] / 127.5 - 1
        latents = model.encode(signal)[0]
        drawn = model.decode(latents[None])[0]
    shift, scale = (torch.tensor(values)[:, None, None] for values in (config.shift, config.scale))
    assert torch.equal(rows, pack_cells((latents - shift) * scale, side))
    told = ((drawn.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255)
    assert np.abs(codec.decode(rows, 8, 12) - told.numpy()).max() <= 0.51, "rounded to the nearest byte"
    with pytest.raises(BadInput, match="cannot be cut"):
        codec.encode(picture(9, 12))


def test_a_picture_goes_through_the_processor_as_a_flow_and_back() -> None:
    codec = LatentCodec.of(small(SMALL_KL), pack=2)
    p = Processor(processor().tokenizer, codec, {}, Noising())
    pixels = picture(8, 16)
    asked, drawn = Text(text="red", role=Role.USER), Image(pixels=pixels, role=Role.ASSISTANT, weight=1.0)
    sequence = p.encode(Sample((asked, drawn), "a", "b"), np.random.default_rng(0))
    vectors = sequence.vectors[Modality.IMAGE]
    assert vectors.value.shape == (8, codec.channels) and torch.equal(vectors.value, codec.encode(pixels))
    text, back = p.decode(sequence)
    assert text == asked and np.array_equal(back.pixels, codec.decode(codec.encode(pixels), 8, 16))
    config = ModelConfig(
        vocab_size=len(p.tokenizer),
        width=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_width=12,
        mlp_width=16,
        modalities={"image": Flow(codec.channels)},
    )
    model = Model(config)
    initialise(model, 0)
    loss = objective(model, pack([sequence]), torch.Generator().manual_seed(0))
    loss.total["image"].backward()
    moved = [q for q in model.writers.parameters() if q.grad is not None and bool(q.grad.abs().sum() > 0)]
    assert moved and all(q.grad is None for q in codec.parameters()), "the flow learns, the autoencoder stays"


def test_a_codec_is_built_again_from_its_configuration_and_weights() -> None:
    """As a checkpoint would hold it."""
    codec = LatentCodec.of(small(SMALL_WAN), pack=2)
    again = LatentCodec(from_json(LatentCodecConfig, to_json(codec.config)))
    again.load_state_dict(codec.state_dict())
    assert torch.equal(again.encode(picture(8, 8)), codec.encode(picture(8, 8)))


def test_tensors_find_their_naming_by_themselves(tmp_path: Path) -> None:
    for model in (small(SMALL_KL), small(SMALL_WAN), small(SMALL_TINY)):
        assert isinstance(model, (KLAutoencoder, WanAutoencoder, TinyAutoencoder))
        for naming in ("diffusers", "original"):
            again = from_tensors(model.config, export_autoencoder(model, naming, torch.float32), tmp_path)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
