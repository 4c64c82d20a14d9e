"""A checkpoint of many ranks: the same bytes whatever the layout, and never a torn one."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litchi.config import BadInput, to_json
from litchi.model.network import Model, initialise
from litchi.model.tensorfile import TensorFile, open_tensors
from litchi.model.weights import load, save, save_processor, to_hugging_face
from litchi.parallel.checkpoint import Saver, newest, step_name, whole
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout, World
from litchi.parallel.pieces import Box, Claim, Piece, fill, make_plan, piece_of, read_boxes, write_box
from tests.house.sources import ROOT
from tests.parallel.networks import RESUME, WEIGHTS, build, files, place, values

ALONE = Layout()

# ---- boxes and bytes ----------------------------------------------------------------------------------------------


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    cuts = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return shape, tuple((a, b) for a, b in cuts)


@given(boxes(), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
def test_a_box_is_written_and_read_where_it_belongs(tmp_path_factory, place_of: tuple, dtype: torch.dtype):
    shape, box = place_of
    path = tmp_path_factory.getbasetemp() / "box.safetensors"
    whole = torch.arange(int(np.prod(shape))).reshape(shape).to(dtype)
    save_file({"a": torch.zeros_like(whole), "b": whole}, path)
    cut = tuple(slice(*ends) for ends in box)
    with open_tensors(path) as file:
        found = file.read_box("b", box)
        assert torch.equal(found, TensorFile.read_box(file, "b", box)) and found.dtype == dtype
        offset = file.entries["a"].offset
    handle = os.open(path, os.O_RDWR)
    write_box(handle, offset, Piece("a", shape, box, whole[cut]))
    os.close(handle)
    expected = torch.zeros_like(whole)
    expected[cut] = whole[cut]
    assert torch.equal(load_file(path)["a"], expected) and torch.equal(load_file(path)["b"], whole)


def test_the_file_is_the_bytes_that_the_safetensors_library_writes(tmp_path: Path):
    tensors = {
        **values(0),
        "count": torch.tensor(3),
        "nothing": torch.zeros(0, 3),
        "half": torch.randn(3, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False]),
        "größe": torch.arange(5, dtype=torch.uint8),
    }
    saver = Saver(World(), tmp_path)
    saver.save(1, {"a.safetensors": [piece_of(name, t) for name, t in tensors.items()]}, meta={})
    saver.wait()
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / step_name(1) / "a.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def claims(*cut: Box, shape: tuple[int, ...] = (4, 4)) -> list[list[Claim]]:
    return [[Claim("a", "w", "F32", shape, box)] for box in cut]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ((((0, 2), (0, 4)),), "hold 8 of its 16 values"),
        ((((0, 3), (0, 4)), ((2, 4), (0, 4))), "overlap, or reach beyond it, along dim 0"),
        ((((0, 4), (0, 4)), ((0, 4), (0, 5))), "overlap, or reach beyond it, along dim 1"),
    ],
)
def test_boxes_that_do_not_fill_a_tensor_are_refused(cut: tuple[Box, ...], said: str):
    with pytest.raises(ValueError, match=said):
        make_plan(claims(*cut))


def test_what_many_ranks_hold_is_written_by_one_and_the_work_is_shared_out():
    mine = [Claim("a", f"w{i}", "F32", (4, 4), ((0, 4), (0, 4))) for i in range(8)]
    plan = make_plan([mine] * 4)
    assert sorted(plan.writers.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- any layout in, any layout out --------------------------------------------------------------------------------


def save_as(layout: Layout, folder: Path, seed: int) -> None:
    world = place(layout)
    net, optimizer = build(world, seed)
    saver = Saver(world, folder)
    saver.save(2, files(world, net, optimizer), meta={"step": 2}, texts={"run.json": "{}"})
    saver.wait()


def read_as(layout: Layout, folder: Path) -> list[str]:
    """Names of pieces that differ from those of a network that was never saved."""
    world = place(layout)
    expected = files(world, *build(world, seed=0))
    other = build(world, seed=1)
    path = Saver(world, folder).newest()
    assert path is not None
    wrong = []
    for file, pieces in expected.items():
        fill(path / file, files(world, *other)[file])
        found = files(world, *other)[file]
        wrong += [a.name for a, b in zip(pieces, found, strict=True) if not torch.equal(a.tensor, b.tensor)]
        boxes = read_boxes(path / file, {piece.name: piece.box for piece in pieces})
        wrong += [piece.name for piece in pieces if not torch.equal(piece.tensor, boxes[piece.name])]
    return wrong


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process saves."""
    folder = tmp_path_factory.mktemp("single")
    save_as(ALONE, folder, seed=0)
    return folder / step_name(2)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(replicate=2), Layout(tensor=2), Layout(tensor=2, replicate=2)], ids=str
)
def test_every_layout_saves_the_same_bytes_and_reads_them(crew: Crew, single: Path, tmp_path: Path, layout: Layout):
    crew.run(save_as, layout, tmp_path, 0)
    saved = tmp_path / step_name(2)
    names = sorted(str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file())
    assert names == ["meta.json", WEIGHTS, RESUME, "run.json"]
    assert [n for n in names if (saved / n).read_bytes() != (single / n).read_bytes()] == []
    for other, size in ((layout, 4), (Layout(), 2), (Layout(tensor=2), 2), (Layout(), 1)):
        assert crew.run(read_as, other, tmp_path, size=size) == [[]] * size


def box_of_odd(layout: Layout) -> Box:
    world = place(layout)
    return next(p for p in files(world, *build(world, 0))[WEIGHTS] if p.name == "odd").box


def test_the_layouts_above_hold_rows_unevenly(crew: Crew):
    """Five rows over four ranks: the last has none."""
    rows = [box[0] for box in crew.run(box_of_odd, Layout())]
    assert rows == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_a_wrong_shape_is_named(single: Path):
    with pytest.raises(BadInput, match=r"odd is \[5, 3\] in it and \[6, 3\] here"):
        fill(single / WEIGHTS, [piece_of("odd", torch.zeros(6, 3))])


# ---- a model that is used -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1 << 30, 6000])
def test_what_ranks_save_is_a_checkpoint_like_any_other(tmp_path: Path, shard_bytes: int):
    from tests.train.runs import MODEL, PROCESSOR

    model = Model(MODEL)
    initialise(model, 0)
    pieces = [piece_of(to_hugging_face(name), t) for name, t in model.state_dict().items()]
    saver = Saver(World(), tmp_path, shard_bytes=shard_bytes)
    texts = {"model/config.json": to_json(MODEL)}
    saver.save(1, {WEIGHTS: pieces}, meta={"step": 1}, texts=texts, others=write_processor)
    saver.wait()
    many = sorted(p.name for p in (tmp_path / step_name(1) / "model").glob("*.safetensors"))
    assert many == ["model.safetensors"] if shard_bytes > 6000 else len(many) > 2
    loaded = load(tmp_path / step_name(1))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in loaded.model.state_dict().items())
    assert len(loaded.meta["golden"]) == 16
    fill(tmp_path / step_name(1) / WEIGHTS, pieces)
    if len(many) == 1:
        save(tmp_path / "one", model, PROCESSOR, meta={"step": 1})
        ours, theirs = (load(tmp_path / name).meta for name in (step_name(1), "one"))
        assert ours == theirs, "the same digests of the same files, and the same golden logits"


def write_processor(draft: Path) -> None:
    from tests.train.runs import PROCESSOR

    save_processor(draft / "processor", PROCESSOR)


# ---- while training goes on ---------------------------------------------------------------------------------------


def test_save_returns_before_anything_is_written_and_keeps_the_values_of_its_moment(tmp_path: Path):
    gate, tensor = threading.Event(), torch.ones(3)
    saver = Saver(World(), tmp_path)
    saver.save(1, {WEIGHTS: [piece_of("w", tensor)]}, meta={}, others=lambda draft: None if gate.wait(30) else None)
    tensor.zero_()
    saver.poll()
    assert newest(tmp_path) is None and saver.thread is not None
    gate.set()
    saver.save(2, {WEIGHTS: [piece_of("w", tensor)]}, meta={})  # waits for the one before it
    assert newest(tmp_path) == tmp_path / step_name(1)
    saver.wait()
    found = [float(load_file(path / WEIGHTS)["w"].sum()) for path in whole(tmp_path)]
    assert found == [3.0, 0.0]


def train_beside_a_save(layout: Layout, folder: Path) -> tuple[float, int]:
    world = place(layout)
    saver, total, polls = Saver(world, folder, keep=2), torch.ones(1), 0
    for step in range(1, 5):
        saver.save(step, files(world, *build(world, 0)), meta={"step": step})
        while saver.thread is not None:
            dist.all_reduce(total, group=world.group("spread"))
            total /= world.size
            saver.poll()
            polls += 1
    return float(total), polls


def test_collectives_of_training_go_on_beside_those_of_a_save(crew: Crew, tmp_path: Path):
    answers = crew.run(train_beside_a_save, Layout(), tmp_path)
    assert [total for total, _ in answers] == [1.0] * 4
    assert len({polls for _, polls in answers}) == 1, "all ranks see the end of a save at the same poll"
    assert [path.name for path in whole(tmp_path)] == [step_name(3), step_name(4)]


# ---- failures -----------------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes of a file fail in this process."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_with_a_rank_that_cannot_write(layout: Layout, folder: Path, on_failed: str) -> tuple[str, list[str]]:
    world, lines = place(layout), []
    net, optimizer = build(world, 0)
    saver = Saver(world, folder, on_failed=on_failed, report=lines.append)  # type: ignore[arg-type]
    saver.save(1, files(world, net, optimizer), meta={})
    saver.wait()
    with largest_file(64 if world.rank == 1 else resource.RLIM_INFINITY):
        saver.save(2, files(world, net, optimizer), meta={})
        try:
            saver.wait()
        except BadInput as error:
            return str(error), lines
    saver.save(3, files(world, net, optimizer), meta={})
    saver.wait()
    return "", lines


@pytest.mark.parametrize("on_failed", ["stop", "go on"])
def test_all_ranks_hear_of_one_that_cannot_write(crew: Crew, tmp_path: Path, on_failed: str):
    answers = crew.run(save_with_a_rank_that_cannot_write, Layout(), tmp_path, on_failed)
    said = {error or lines[0] for error, lines in answers}
    assert said == {
        f"the save of step 2 failed: rank 1: {os.strerror(errno.EFBIG)}: raise the limit of file sizes (ulimit -f);"
        f" the newest whole checkpoint is {tmp_path / step_name(1)}"
    }
    kept = [step_name(1)] if on_failed == "stop" else [step_name(1), step_name(3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept, "drafts are removed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system; a limit of file sizes is tested everywhere")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def save_until_full(layout: Layout, folder: Path) -> tuple[list[str], int]:
    world, lines = place(layout), []
    saver = Saver(world, folder, keep=9, report=lines.append, on_failed="go on")
    pieces = [piece_of("w", torch.full((20_000,), float(world.rank)))]
    for step in range(1, 6):
        saver.save(step, {f"{WEIGHTS}": pieces}, meta={"step": step})
        saver.wait()
    path = saver.newest()
    assert path is not None
    return lines, len(load_file(path / WEIGHTS)["w"])


def test_a_full_disk_fails_a_save_and_leaves_those_before_it_whole(crew: Crew, small_disk: Path):
    for lines, count in crew.run(save_until_full, Layout(), small_disk):
        assert len(lines) == 2 and count == 20_000
        assert os.strerror(errno.ENOSPC) in lines[0] and "free space on that disk" in lines[0]
        assert lines[0].endswith(f"the newest whole checkpoint is {small_disk / step_name(3)}")
    assert sorted(p.name for p in small_disk.iterdir()) == [step_name(i) for i in (1, 2, 3)]


def save_where_others_do_not_look(layout: Layout, folder: Path) -> str:
    world = place(layout)
    saver = Saver(world, folder / str(world.rank))
    saver.save(1, files(world, *build(world, 0)), meta={})
    with pytest.raises(BadInput) as caught:
        saver.wait()
    return str(caught.value)


def test_a_folder_that_ranks_do_not_share_is_named(crew: Crew, tmp_path: Path):
    for line in crew.run(save_where_others_do_not_look, Layout(), tmp_path, size=2):
        assert "rank 1: " in line and "No such file or directory: name a folder on a disk that all ranks share" in line


def newest_or_fault(layout: Layout, folder: Path) -> str:
    try:
        return str(Saver(place(layout), folder).newest())
    except BadInput as error:
        return str(error)


def test_damage_is_found_by_the_rank_that_looks_and_told_to_all(crew: Crew, tmp_path: Path):
    crew.run(save_as, Layout(), tmp_path, 0, size=2)
    path = tmp_path / step_name(2) / RESUME
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (said,) = set(crew.run(newest_or_fault, Layout(), tmp_path, size=2))
    assert f"{path} is missing or has changed since it was saved" in said


def test_a_beginning_clears_drafts_and_puts_back_what_was_moved_aside(tmp_path: Path):
    save_as(ALONE, tmp_path, 0)
    (tmp_path / ".step_0000009.writing" / "model").mkdir(parents=True)
    (tmp_path / step_name(2)).rename(tmp_path / ".step_0000002.old")
    assert Saver(World(), tmp_path).newest() == tmp_path / step_name(2)
    assert [p.name for p in tmp_path.iterdir()] == [step_name(2)]


def test_killed_at_any_touch_of_a_file_the_newest_checkpoint_is_whole(tmp_path: Path):
    """SIGKILL in real processes, of one rank and of both; every 23rd touch, all with a stride of 1."""
    command = [sys.executable, "-m", "tests.parallel.kills", str(tmp_path), "23"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.endswith("done\n"), answer.stdout + answer.stderr
    assert "a rank does not answer" in answer.stdout
