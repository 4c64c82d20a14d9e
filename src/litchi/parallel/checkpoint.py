"""Many ranks save one checkpoint while training goes on, and a save that fails leaves the one before it whole.

    saver = Saver(world, folder, keep=2)
    begin = saver.newest()                              # None, or a folder that `fill` reads pieces from
    saver.save(step, {"model/model.safetensors": pieces}, meta=meta, texts={"run.json": run_json})
    saver.poll()                                        # after every step: is it done, did it fail
    saver.wait()                                        # at the end

`save` copies what this rank will write into memory of its own and returns. A thread then does the rest in phases, after
each of which all ranks hear of a fault: rank 0 lays out files in a draft folder, every rank writes its boxes into them,
ranks share out the files to compute SHA-256 of, and rank 0 seals meta.json and renames the draft. What is named step_N
and has a meta.json is whole, whoever was killed when. The folder must be one that all ranks share.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.model.tensorwriter import SHARD_BYTES
from litchi.model.weights import digest, flush, publish, read_meta, replace_folder
from litchi.parallel.bucket import Bucket
from litchi.parallel.mesh import World
from litchi.parallel.peers import Failed, Peers
from litchi.parallel.pieces import Box, Claim, Piece, Plan, claim_of, make_plan, write_box

OnFailed = Literal["go on", "stop"]

MAX_GOLDEN = 4_000_000_000
"""Bytes of the network (a billion values in fp32) up to which rank 0 loads it for the golden logits in meta.json."""


@dataclass(frozen=True, slots=True)
class Job:
    """One save: what this rank writes, in its own memory, and what only rank 0 writes."""

    step: int
    plan: Plan
    pieces: Mapping[str, Sequence[Piece]]
    """By path."""
    meta: Mapping[str, object]
    texts: Mapping[str, str]
    """Further files by relative path."""
    others: Callable[[Path], None] | None
    """Writes whatever else belongs into the draft folder."""


@dataclass(slots=True)
class Host:
    """Memory that pieces are copied into; it is kept from one save to the next."""

    buffers: dict[tuple[str, str, Box], Tensor] = field(default_factory=dict)

    def copy(self, path: str, piece: Piece) -> Piece:
        """The piece with a copy of its values, which on a GPU is on its way until `arrive`."""
        key, tensor = (path, piece.name, piece.box), piece.tensor
        buffer = self.buffers.get(key)
        if buffer is None or buffer.dtype != tensor.dtype or buffer.shape != tensor.shape:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self.buffers[key] = buffer
        buffer.copy_(tensor, non_blocking=True)
        return Piece(piece.name, piece.shape, piece.box, buffer)

    def arrive(self) -> None:
        if any(buffer.is_pinned() for buffer in self.buffers.values()):
            torch.cuda.synchronize()


class Saver:
    """Saves one checkpoint at a time. Every rank makes one, and calls all of it in the same order.

    Drafts that a kill left in `folder` are removed, so that nobody but the run itself may make one.

    `bucket` is "" or an s3:// address, where each checkpoint is put as well once it is whole in `folder`. With
    `on_failed` "go on" a failure is one line to `report` on every rank; with "stop" that line is raised as BadInput.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        keep: int = 2,
        on_failed: OnFailed = "stop",
        bucket: str = "",
        *,
        shard_bytes: int = SHARD_BYTES,
        report: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
    ) -> None:
        self.world, self.folder, self.keep, self.on_failed = world, folder, keep, on_failed
        self.bucket = Bucket(bucket) if bucket else None
        self.shard_bytes, self.report = shard_bytes, report
        self.host = Host()
        self.claims: list[Claim] | None = None
        self.plan: Plan | None = None
        self.thread: threading.Thread | None = None
        self.failure, self.seconds = "", 0.0
        """Of the last save: why it came to nothing, and how long it took in all."""
        with self.or_bad_input():
            self.peers, self.votes = Peers(world), Peers(world)
            self.peers.together(lambda: clean(folder, keep) if world.rank == 0 else None)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def save(
        self,
        step: int,
        files: Mapping[str, Sequence[Piece]],
        *,
        meta: Mapping[str, object],
        texts: Mapping[str, str] | None = None,
        others: Callable[[Path], None] | None = None,
    ) -> None:
        """Begin to save `files`, pieces by relative path, as `folder`/step_N; waits only for the save before it.

        `meta`, `texts` and `others` count on rank 0. Raises ValueError if the pieces of all ranks do not fill a tensor.
        """
        self.wait()
        with self.or_bad_input():
            plan = self.agree_on_plan([claim_of(path, piece) for path, pieces in files.items() for piece in pieces])
        held: dict[str, list[Piece]] = {}
        for path, pieces in files.items():
            mine = [p for p in pieces if plan.writers.get((path, p.name, p.box)) == self.world.rank]
            held[path] = [self.host.copy(path, piece) for piece in mine]
        self.host.arrive()
        job = Job(step, plan, held, meta, texts or {}, others)
        self.thread = threading.Thread(target=self._run, args=(job,), name=f"save of step {step}", daemon=True)
        self.thread.start()

    def poll(self) -> None:
        """See to a save that is under way; costs nothing when there is none. Raises BadInput as `on_failed` says."""
        if self.thread is None:
            return
        with self.or_bad_input():
            done = self.votes.all(not self.thread.is_alive())
        if done:
            self.wait()

    def wait(self) -> None:
        """Until the save that is under way is done. Raises BadInput as `on_failed` says."""
        if self.thread is None:
            return
        self.thread.join()
        self.thread = None
        if not self.failure:
            return
        last = newest(self.folder)
        line = f"{self.failure}; the newest whole checkpoint is {last or 'none'}"
        if self.on_failed == "stop":
            raise BadInput(line)
        self.report(line)

    def newest(self) -> Path | None:
        """The newest whole checkpoint, its files checked by all ranks together; from the bucket if that has a newer.

        Raises BadInput if a file of it has changed.
        """
        self.wait()
        with self.or_bad_input():
            last = self.peers.together(lambda: self._look() if self.world.rank == 0 else None)[0]
            if last is None:
                return None
            path = self.folder / last
            if self.peers.all((path / "meta.json").is_file()):
                self.peers.together(lambda: self._check(path))
            else:
                self._fetch(path)
        return path

    def agree_on_plan(self, claims: list[Claim]) -> Plan:
        """The plan of the last save as long as no rank has other pieces."""
        same = self.peers.all(claims == self.claims)
        if not same or self.plan is None:
            texts = self.peers.gather(json.dumps(claims))
            self.plan = make_plan([read_claims(text) for text in texts], self.shard_bytes)
            self.claims = claims
            self.host.buffers.clear()
        return self.plan

    @contextmanager
    def or_bad_input(self) -> Iterator[None]:
        """What failed on some rank is raised on all, as what a person can mend."""
        try:
            yield
        except Failed as error:
            raise BadInput(f"{self.folder}: {error}") from error

    # ---- in the thread -----------------------------------------------------------------------------------------

    def _run(self, job: Job) -> None:
        began = time.monotonic()
        folder = self.folder / step_name(job.step)
        draft = draft_of(folder)
        self.failure = f"the save of step {job.step} ended before its time"
        try:
            self._write(job, draft, folder)
            self.failure = ""
        except Failed as error:
            self.failure = f"the save of step {job.step} failed: {error}"
            if self.world.rank == 0:  # no other: it may be that rank 0 is well, and about to rename the draft
                shutil.rmtree(draft, ignore_errors=True)
        else:
            try:
                self._upload(folder)
            except Failed as error:
                assert self.bucket is not None
                self.failure = f"step {job.step} is whole in {folder}, but not at {self.bucket.url}: {error}"
        self.seconds = time.monotonic() - began

    def _write(self, job: Job, draft: Path, folder: Path) -> None:
        lead = self.world.rank == 0
        self.peers.together(lambda: begin(draft, job) if lead else None)
        self.peers.together(lambda: write_pieces(draft, job))
        mine = sorted(job.plan.heads)[self.world.rank :: self.world.size]
        digests: dict[str, str] = {}
        for answer in self.peers.together(lambda: {file: digest(draft / file) for file in mine}):
            digests |= answer
        self.peers.together(lambda: self._seal(job, draft, folder, digests) if lead else None)

    def _seal(self, job: Job, draft: Path, folder: Path, digests: Mapping[str, str]) -> None:
        size = sum(size for file, size in job.plan.sizes.items() if file.startswith("model/"))
        check = "model/config.json" in job.texts and size <= MAX_GOLDEN
        publish(draft, folder, meta=job.meta, check=check, digests=digests)
        prune(self.folder, self.keep)

    def _upload(self, folder: Path) -> None:
        """Every rank puts its share of the files; meta.json follows when all are there."""
        if (bucket := self.bucket) is None:
            return
        lead, name = self.world.rank == 0, folder.name
        self.peers.together(lambda: bucket.unseal(name) if lead else None)
        self.peers.together(lambda: bucket.put(name, folder, self._share(folder)))
        self.peers.together(lambda: bucket.seal(name, folder, self.keep) if lead else None)

    # ---- in the beginning --------------------------------------------------------------------------------------

    def _look(self) -> str | None:
        """The name of the newest checkpoint, here or in the bucket."""
        names = self.bucket.whole() if self.bucket else []
        if last := newest(self.folder):
            names.append(last.name)
        return max(names, key=step_of, default=None)

    def _fetch(self, path: Path) -> None:
        """Bring a checkpoint here, each rank its share, and rename it into place when all of it has come."""
        bucket, draft, lead = self.bucket, draft_of(path), self.world.rank == 0
        if bucket is None:
            raise Failed("other ranks do not see what rank 0 sees there: name a folder on a disk that all ranks share")
        try:
            names = self.peers.together(lambda: bucket.begin(path.name, draft) if lead else None)[0]
            mine = names[self.world.rank :: self.world.size]
            self.peers.together(lambda: bucket.get(path.name, draft, mine))
            self.peers.together(lambda: self._check(draft))
            self.peers.together(lambda: replace_folder(draft, path) if lead else None)
        except Failed:
            if lead:
                shutil.rmtree(draft, ignore_errors=True)
            raise

    def _check(self, path: Path) -> None:
        """Raises BadInput if a file of this rank's share is not what meta.json says."""
        files = read_meta(path)["files"]
        for file in sorted(files)[self.world.rank :: self.world.size]:
            if not (path / file).is_file() or digest(path / file) != files[file]:
                raise BadInput(f"{path / file} is missing or has changed since it was saved: copy the checkpoint again")

    def _share(self, folder: Path) -> list[str]:
        """This rank's share of the files of a checkpoint, without meta.json."""
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        files.remove("meta.json")
        return files[self.world.rank :: self.world.size]


# ---- a draft ------------------------------------------------------------------------------------------------------


def begin(draft: Path, job: Job) -> None:
    """Lay out all files: headers and room for tensors, and whole those that hold none."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for file, head in job.plan.heads.items():
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        with (draft / file).open("wb") as out:
            out.write(head)
            out.truncate(job.plan.sizes[file])
    for file, text in {**job.plan.indexes, **job.texts}.items():
        (draft / file).parent.mkdir(parents=True, exist_ok=True)
        (draft / file).write_text(text)
    if job.others is not None:
        job.others(draft)


def write_pieces(draft: Path, job: Job) -> None:
    """This rank's boxes, file after file."""
    files: dict[str, list[tuple[int, Piece]]] = {}
    for path, pieces in job.pieces.items():
        for piece in pieces:
            slot = job.plan.slots[(path, piece.name)]
            files.setdefault(slot.file, []).append((slot.offset, piece))
    for file, placed in files.items():
        handle = os.open(draft / file, os.O_RDWR)
        try:
            for offset, piece in placed:
                write_box(handle, offset, piece)
            os.fsync(handle)
        finally:
            os.close(handle)


def read_claims(text: str) -> list[Claim]:
    return [
        Claim(path, name, dtype, tuple(shape), tuple(map(tuple, box)))
        for path, name, dtype, shape, box in json.loads(text)
    ]


# ---- folders of a run ---------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    return f"step_{step:07d}"


def step_of(name: str) -> int:
    """The step of a checkpoint's folder; -1 for another name."""
    number = name.removeprefix("step_")
    return int(number) if name.startswith("step_") and number.isdecimal() else -1


def draft_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def whole(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("step_*") if step_of(path.name) >= 0 and (path / "meta.json").is_file()]
    return sorted(found, key=lambda path: step_of(path.name))


def newest(folder: Path) -> Path | None:
    return next(reversed(whole(folder)), None)


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` whole checkpoints, and nothing older, whole or not."""
    for path in whole(folder)[-keep:][:1]:
        for old in folder.glob("step_*"):
            if 0 <= step_of(old.name) < step_of(path.name):
                remove(old)


def remove(folder: Path) -> None:
    """Delete a checkpoint; meta.json goes first, so that a half-deleted one is never taken for whole."""
    (folder / "meta.json").unlink(missing_ok=True)
    flush(folder)
    shutil.rmtree(folder)


def clean(folder: Path, keep: int) -> None:
    """Undo what a kill left behind: drafts, a checkpoint that had been moved aside for another one, and old ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(".step_*.writing"):
        shutil.rmtree(draft)
    for old in folder.glob(".step_*.old"):
        if (old / "meta.json").is_file() and not (kept := folder / old.name[1:].removesuffix(".old")).exists():
            old.rename(kept)
        else:
            shutil.rmtree(old)
    prune(folder, keep)
