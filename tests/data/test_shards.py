"""Shards give back what was put in, byte for byte, and a broken one says which file and what to do."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from litchi.config import BadInput
from litchi.data.jobs import JOBS
from litchi.data.run import DataConfig, plan, run
from litchi.data.shards import checksum, read_manifest, read_shard, verify, write_shards
from litchi.data.ticket import Ticket
from litchi.schema.sample import Action, Sample, Text

SMALL = DataConfig(train={"talk": 12, "draw": 5, "watch": 2}, test={"talk": 4}, shard_samples=5, workers=1)


def equal(a: Sample, b: Sample) -> bool:
    if (a.key, a.source, dict(a.meta), len(a.parts)) != (b.key, b.source, dict(b.meta), len(b.parts)):
        return False
    for p, q in zip(a.parts, b.parts, strict=True):
        names = p.__dataclass_fields__
        if type(p) is not type(q) or not all(np.array_equal(getattr(p, n), getattr(q, n)) for n in names):
            return False
    return True


def test_a_shard_gives_back_its_samples(tmp_path):
    chunk = Action(values=np.arange(6, dtype=np.float32).reshape(3, 2), space="arm", hz=10.0, weight=1.0)
    odd = Sample((Text(text="荔枝 <|end|>"), chunk), key="odd", source="odd", meta={"a": [1, None, "b"]})
    stored = [odd, *(job(Ticket(source, "train", i)) for source, job in JOBS.items() for i in range(2))]
    manifest = write_shards(stored, tmp_path, shard_samples=4)
    found = [sample for shard in manifest.shards for sample in read_shard(tmp_path / shard.path)]
    assert len(found) == len(stored) and all(equal(a, b) for a, b in zip(stored, found, strict=True))
    assert read_manifest(tmp_path) == manifest == verify(tmp_path)


def test_a_run_makes_what_was_asked_for(tmp_path):
    manifest = run(SMALL, tmp_path)
    assert manifest.counts == {"train/talk": 12, "train/draw": 5, "train/watch": 2, "test/talk": 4}
    assert manifest.facts["seen/talk"] == 0 and 0 <= manifest.facts["guess/follow-up"] <= 1
    assert verify(tmp_path) == manifest
    assert not list(tmp_path.rglob("*.part"))


def test_a_shard_is_regenerated_byte_for_byte(tmp_path):
    first = run(SMALL, tmp_path)
    victim = tmp_path / "train" / "talk-00001.parquet"
    before, others = checksum(victim), {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet") if p != victim}
    victim.unlink()
    assert run(SMALL, tmp_path) == first and checksum(victim) == before
    assert {p: p.stat().st_mtime_ns for p in others} == others


def test_another_seed_or_count_makes_its_shards_again(tmp_path):
    first = run(SMALL, tmp_path)
    assert run(replace(SMALL, seed=1), tmp_path).shards[0].sha256 != first.shards[0].sha256
    assert run(SMALL, tmp_path) == first


@pytest.mark.parametrize("harm", ["truncated", "flipped", "emptied"])
def test_a_broken_shard_names_itself_and_the_mend(tmp_path, harm: str):
    run(SMALL, tmp_path)
    victim = tmp_path / "train" / "draw-00000.parquet"
    data = victim.read_bytes()
    match harm:
        case "truncated":
            victim.write_bytes(data[: len(data) // 2])
        case "flipped":
            victim.write_bytes(data[:200] + bytes([data[200] ^ 255]) + data[201:])
        case "emptied":
            victim.write_bytes(b"")
    with pytest.raises(BadInput, match=r"draw-00000\.parquet is broken: delete it and run `litchi data") as error:
        verify(tmp_path)
    assert "\n" not in str(error.value)
    if harm != "flipped":  # a flipped bit inside a picture only the checksum can see
        with pytest.raises(BadInput, match="is broken"):
            read_shard(victim)
        with pytest.raises(BadInput, match="is broken"):
            run(SMALL, tmp_path)
    victim.unlink()
    with pytest.raises(BadInput, match="is missing"):
        verify(tmp_path)
    run(SMALL, tmp_path)
    verify(tmp_path)


def test_an_unknown_source_is_refused(tmp_path):
    with pytest.raises(BadInput, match="choose among talk"):
        plan(DataConfig(train={"walk": 1}), tmp_path)


KILLED = """
import sys, time
from pathlib import Path
from litchi.data import run
from tests.data.test_shards import SMALL
made = []
def make(task, real=run.make):
    made.append(real(task))
    if len(made) == 2:
        print("two", flush=True)
        time.sleep(600)
    return made[-1]
run.make = make
run.run(SMALL, Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """Killed after two shards, the same command makes the others and ends with the same bytes."""
    whole = run(SMALL, tmp_path / "whole")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(("src", "."))}
    command = [sys.executable, "-c", KILLED, str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as child:
        assert child.stdout.readline() == b"two\n"
        child.send_signal(signal.SIGKILL)
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "killed").rglob("*.parquet")}
    assert len(kept) == 2
    assert run(SMALL, tmp_path / "killed") == whole
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
