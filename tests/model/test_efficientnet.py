"""EfficientNet-Lite0 is that of its package to 1e-4, sees what it was trained to see, and refuses what it cannot be."""

from __future__ import annotations

import os
import pickle
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from litchi.config import BadInput
from litchi.data.emoji import on_white
from litchi.model.efficientnet import (
    CHANNELS,
    EfficientNetLite,
    center_crop,
    from_tensors,
    load_efficientnet,
    normalise,
    resize,
)

SHARED = Path(__file__).parents[3] / "shared"
WEIGHTS = SHARED / "weights" / "efficientnet_lite0" / "efficientnet-lite0-57934424.pth"
EMOJI = SHARED / "data" / "emoji_google" / "images64.zip"
needs_weights = pytest.mark.skipif(not WEIGHTS.exists(), reason=f"{WEIGHTS.name} is not beside the checkout")

TOLERANCE = 1e-4
SEEN = {
    "26bd": 805,  # soccer ball
    "1f3c0": 430,  # basketball
    "1f427": 145,  # king penguin
    "1f691": 407,  # ambulance
    "1f9e9": 611,  # jigsaw puzzle
    "231b": 604,  # hourglass
    "1f528": 587,  # hammer
    "1f5a8-fe0f": 742,  # printer
    "1f9ee": 398,  # abacus
    "1f9f7": 772,  # safety pin
    "1faa0": 731,  # plunger
    "1faa3": 463,  # bucket
    "1fa82": 701,  # parachute
    "1f577-fe0f": 73,  # barn spider
}
"""Pictures of emoji by their code points and the class that comes first. These are right, and chosen so: of 241 emoji
that ImageNet has a class for (by name alone, 24 of them clocks), 68 came first and 101 among five; of 86 animals 3."""
NOISE = [0.0992, -0.1815, -0.5674, 1.8051, -2.0976, -1.2501, 0.245, -0.78]
"""Every 125th logit of coloured noise, as it was when the weights were first read."""


@pytest.fixture(scope="module")
def eye() -> EfficientNetLite:
    """Random weights, and statistics far from 0 and 1."""
    torch.manual_seed(0)
    net = EfficientNetLite().eval()
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith("running_var") or ("_bn" in name and name.endswith("weight")):
                tensor.uniform_(0.8, 1.6)
            elif name.endswith("running_mean") or ("_bn" in name and name.endswith("bias")):
                tensor.uniform_(-0.5, 0.5)
    return net


@pytest.fixture(scope="module")
def real() -> EfficientNetLite:
    return load_efficientnet(WEIGHTS)


def pictures(number: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (number, height, width, 3), dtype=np.uint8))


def theirs(tensors: dict[str, torch.Tensor], side: int) -> torch.nn.Module:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="pip install --no-deps efficientnet_lite_pytorch")
    net = package.EfficientNet.from_name("efficientnet-lite0", image_size=side)
    net.load_state_dict(tensors)
    return net.eval()


@torch.no_grad()
def test_logits_and_maps_are_those_of_the_package(eye: EfficientNetLite) -> None:
    net, seen = theirs(eye.state_dict(), 96), pictures(2, 96, 96)
    assert (eye.logits(seen) - net(normalise(seen))).abs().max() <= TOLERANCE
    told = net.extract_features(normalise(seen)).permute(0, 2, 3, 1)
    assert (eye.features(seen) - told).abs().max() <= TOLERANCE


@needs_weights
@torch.no_grad()
def test_real_weights_are_read_as_the_package_reads_them(real: EfficientNetLite) -> None:
    net, seen = theirs(real.state_dict(), 224), pictures(1, 224, 224)
    assert (real.logits(seen) - net(normalise(seen))).abs().max() <= TOLERANCE


@needs_weights
@torch.no_grad()
def test_the_weights_compute_what_they_did(real: EfficientNetLite) -> None:
    """Resizing too. 1e-2: libraries differ in how they sum, through fifty layers."""
    found = real.logits(resize(pictures(1, 7, 9)))[0, ::125]
    assert (found - torch.tensor(NOISE)).abs().max() <= 1e-2


@needs_weights
@pytest.mark.skipif(not EMOJI.exists(), reason="the pictures of emoji are not beside the checkout")
@torch.no_grad()
def test_it_knows_what_emoji_show(real: EfficientNetLite) -> None:
    with zipfile.ZipFile(EMOJI) as archive:
        shown = [np.array(Image.open(BytesIO(archive.read(f"64/{code}.png"))).convert("RGBA")) for code in SEEN]
    seen = resize(torch.from_numpy(np.stack([on_white(rgba) for rgba in shown])))
    assert real.logits(seen).argmax(1).tolist() == list(SEEN.values())


@needs_weights
@torch.no_grad()
def test_it_knows_a_uniform_in_a_photograph(real: EfficientNetLite) -> None:
    """Grace Hopper, the photograph that TensorFlow's examples classify: 652 is "military uniform"."""
    matplotlib = pytest.importorskip("matplotlib", reason="the photograph comes with matplotlib")
    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photo = torch.from_numpy(np.array(Image.open(path).convert("RGB")))[None]
    assert real.logits(resize(photo)).argmax() == 652
    assert 652 in real.logits(resize(center_crop(photo)))[0].topk(3).indices


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(64, 64), (100, 400), (33, 1)])
def test_a_map_has_a_cell_for_each_32_pixels_begun(eye: EfficientNetLite, height: int, width: int) -> None:
    for layer, channels in CHANNELS.items():
        shape = eye.features(pictures(1, height, width), layer).shape
        assert shape == (1, -(-height // 32), -(-width // 32), channels)


@torch.no_grad()
def test_the_head_reads_the_map_of_the_blocks(eye: EfficientNetLite) -> None:
    """The head convolution is of single cells: from 320 channels of a cell follow its 1280."""
    seen = pictures(1, 64, 64)
    cells = eye.features(seen, "blocks").permute(0, 3, 1, 2)
    told = torch.nn.functional.relu6(eye._bn1(eye._conv_head(cells))).permute(0, 2, 3, 1)
    assert torch.equal(eye.features(seen, "head"), told)


@torch.no_grad()
def test_neighbours_are_invisible_in_training_too(eye: EfficientNetLite) -> None:
    """1e-5: a batch of another size may be summed in another order."""
    seen, before = pictures(3, 64, 64), {name: t.clone() for name, t in eye.state_dict().items()}
    eye.train()
    together = eye.features(seen)
    eye.eval()
    assert (together[1:2] - eye.features(seen[1:2])).abs().max() <= 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in eye.state_dict().items())


def test_a_loaded_eye_is_frozen_and_equal(eye: EfficientNetLite) -> None:
    loaded = from_tensors(eye.state_dict())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(tensor, eye.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_resizing_keeps_flat_colours_and_the_middle_is_cut() -> None:
    flat = torch.tensor([10, 20, 255], dtype=torch.uint8).expand(1, 40, 80, 3)
    assert torch.equal(resize(flat, 224, 448), flat[:, :1, :1].expand(1, 224, 448, 3))
    assert resize(flat, 40, 80) is flat
    columns = torch.arange(80, dtype=torch.uint8)[None, None, :, None].expand(1, 40, 80, 3)
    middle = center_crop(columns)
    assert middle.shape == (1, 35, 35, 3) and middle[0, 0, [0, -1], 0].tolist() == [23, 57]


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["EVIL"],))


def test_bad_files_are_refused_and_nothing_in_them_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    evil, text, nested, empty = (tmp_path / name for name in ("evil.pth", "text.pth", "nested.pth", "empty.pth"))
    evil.write_bytes(pickle.dumps(Evil(), protocol=2))
    text.write_text("no weights")
    empty.touch()
    torch.save({"state_dict": {}}, nested)
    for path, reason in ((evil, "weights alone"), (text, "weights alone"), (empty, "weights alone")):
        with pytest.raises(BadInput, match=reason):
            load_efficientnet(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(BadInput, match="no table of tensors"):
        load_efficientnet(nested)
    with pytest.raises(BadInput, match=r"nowhere\.pth is missing"):
        load_efficientnet(tmp_path / "nowhere.pth")


def test_tensors_of_another_network_are_named(eye: EfficientNetLite) -> None:
    state = dict(eye.state_dict())
    with pytest.raises(BadInput, match=r"'_blocks\.0\._se_reduce\.weight' \(1 in all\)"):
        from_tensors(state | {"_blocks.0._se_reduce.weight": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"_fc\.bias is \(10,\) and not \(1000,\)"):
        from_tensors(state | {"_fc.bias": torch.zeros(10)})
    del state["_conv_stem.weight"]
    with pytest.raises(BadInput, match="lacks '_conv_stem.weight'"):
        from_tensors(state)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)])
def test_only_batches_of_8_bit_pictures_are_read(eye: EfficientNetLite, wrong: torch.Tensor) -> None:
    with pytest.raises(BadInput, match="reads pictures as uint8"):
        eye.features(wrong)
