"""A small run is killed by SIGKILL at many random moments and begun again, and ends with the bits of one left in peace.

    python bench/kills.py [--kills 50] [--seed 0] [--folder F] [--show]

It learns words, pictures and actions, with clipping, AdamW and Muon. The supervisor of `litchi train --ranks` runs four
ranks, two or one, of any kind of ZeRO. Either one rank is killed, and the supervisor begins again; or all ranks and
the supervisor are, and the same command is given again, often for another number of ranks. Every second kill is held
back until a checkpoint is being written. Ranks are forks, which spares them the imports; all else is as in life.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch._dynamo
import torch.distributed.fsdp  # noqa: F401  both are paid once, here

from bench.row import append
from litchi.config import BadInput
from litchi.parallel.checkpoint import step_name, whole
from litchi.parallel.mesh import Layout
from litchi.record import METRICS
from litchi.schema.sample import Sample
from litchi.train.blame import BAD_INPUT
from litchi.train.ledger import STEPS
from litchi.train.optimizer import OptimizerConfig
from litchi.train.run import TrainConfig
from litchi.train.supervise import Plan, supervise
from litchi.train.watch import WatchConfig
from tests.train.runs import CONFIG, DRAWN, sample, train

RUN = replace(
    CONFIG,
    num_accumulate=4,
    save_every=2,
    optimizer=OptimizerConfig(lr=1e-2, matrix_lr=1e-2, clip=0.5),
    watch=WatchConfig(beat=0.2),
)
SIZES = (4, 4, 2, 1)
"""Numbers of ranks that a command may be given again for."""
LAYOUTS = (Layout(zero=0), Layout(zero=1), Layout(zero=2), Layout(zero=3), Layout(replicate=2))
PATIENCE = 300.0
"""Seconds in which something must happen."""
SUBREAPER = 36
"""Of prctl."""
WATCHED = "watched"
"""A file beside the run that is touched while somebody is there to kill it; without that for LEASE seconds it waits."""
LEASE = 0.5


@dataclass(slots=True)
class Tally:
    """What was done to the run, and what was found on the disk."""

    steps: int
    kills: int = 0
    of_all: int = 0
    """Kills of all ranks and the supervisor; the others were of one rank."""
    in_saves: int = 0
    """Kills while the draft of a checkpoint lay there."""
    at_starts: int = 0
    """Kills before the first new step."""
    commands: int = 0
    """Times that the command was given."""
    restarts: int = 0
    """Times that the supervisor began again by itself."""
    checked: int = 0
    """Whole checkpoints that were found after a kill of all, each of its files summed again."""
    torn: int = 0
    """Of those."""
    seconds: float = 0.0
    same: bool = False
    """Whether the weights, the optimizers' state and the ledger are those of a run on one process, and on four."""


def main() -> int:
    args = parser().parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(dir=Path.cwd(), prefix=".bench_kills_"))
    adopt()
    try:
        tally = campaign(folder, args.kills, random.Random(args.seed))
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(asdict(tally)))
    if not args.show:
        report(tally)
    return 0 if tally.same and not tally.torn else 1


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    found.add_argument("--kills", type=int, default=50)
    found.add_argument("--seed", type=int, default=0, help="of the moments")
    found.add_argument("--folder", type=Path, help="where the runs stay, to be looked at")
    found.add_argument("--show", action="store_true", help="print only, and add no row to the results")
    return found


def campaign(folder: Path, kills: int, draw: random.Random) -> Tally:
    """Two runs that nobody disturbs, then the one that is killed."""
    tally = Tally(steps=3 * kills + 8)
    config = replace(RUN, num_steps=tally.steps)
    peaceful = []
    for ranks in (1, 4):
        finish(folder / f"{ranks}", begin(folder / f"{ranks}", ranks, config))
        peaceful.append(fingerprint(folder / f"{ranks}", tally.steps))
        say(f"left in peace on {ranks}: {peaceful[-1][:16]}")
    began = time.monotonic()
    harass(folder / "killed", config, kills, draw, tally)
    tally.seconds = time.monotonic() - began
    found = fingerprint(folder / "killed", tally.steps)
    tally.same = {found} == set(peaceful)
    say(f"killed {tally.kills} times: {found[:16]}")
    return tally


def report(tally: Tally) -> None:
    """The rows."""
    what = f"{tally.steps} steps on 4, 2 and 1 ranks, killed at random moments"
    kills = f"({tally.kills - tally.of_all} of a rank, {tally.of_all} of all; {tally.in_saves} in a save)"
    survived = tally.kills if tally.same else 0
    append("kills", f"{what} {kills}: survived to the bit", survived, "kills", peer="kills", peer_figure=tally.kills)
    append("kills", f"{what}: begun again by the supervisor", tally.restarts, "times")
    append("kills", f"{what}: torn of {tally.checked} checkpoints that it could have loaded", tally.torn, "checkpoints")
    append("kills", f"{what}: wall time", tally.seconds / 60, "minutes")


# ---- killing ------------------------------------------------------------------------------------------------------


def harass(folder: Path, config: TrainConfig, kills: int, draw: random.Random, tally: Tally) -> None:
    """Begin, kill, begin again where the supervisor does not, and in the end let it come through."""
    command = 0
    while tally.kills < kills:
        before = follow(folder)[0]
        if not command:
            ranks, layout = draw.choice(SIZES), draw.choice(LAYOUTS)
            command = begin(folder, ranks, replace(config, layout=layout if ranks > 1 else Layout()))
            tally.commands += 1
        await_moment(folder, command, before, draw, in_save=tally.kills % 2 == 0)
        if not (crew := children(command)):
            continue  # between two attempts of the supervisor
        everyone = draw.random() < 0.5
        tally.at_starts += follow(folder)[0] == before
        in_save = drafting(folder)
        if everyone:
            end_all(command, crew)
        else:
            shoot(draw.choice(crew))
        tally.kills, tally.of_all, tally.in_saves = tally.kills + 1, tally.of_all + everyone, tally.in_saves + in_save
        whom = "all and the supervisor" if everyone else "a rank"
        say(f"kill {tally.kills} at step {follow(folder)[1]}: {whom} of {len(crew)}{', in a save' if in_save else ''}")
        if everyone:
            command = 0
            check_all(folder, tally)
        else:
            await_fall(folder, command, crew)
    (folder / WATCHED).unlink(missing_ok=True)
    if not command:
        command, tally.commands = begin(folder, 4, config), tally.commands + 1
    finish(folder, command)
    tally.restarts = said(folder).count("from the last checkpoint")


def await_moment(folder: Path, command: int, before: int, draw: random.Random, *, in_save: bool) -> None:
    """Until a random moment of an attempt; one in eight is at its start."""
    if draw.random() < 0.25 and not in_save:
        pause(folder, draw.uniform(0.0, 1.0))
        return
    steps, first = draw.randrange(6), -1
    for _ in patiently(folder, command):
        attempt, step = follow(folder)
        if attempt != before:
            first = step if first < 0 else first
            if step >= first + steps:
                break
    pause(folder, draw.uniform(0.0, 0.3))
    while in_save:
        for _ in patiently(folder, command):
            if drafting(folder):
                break
        pause(folder, draw.uniform(0.0, 0.02))
        in_save = not drafting(folder)


def await_fall(folder: Path, command: int, crew: Sequence[int]) -> None:
    """Until none of these ranks is left: one was killed, and the supervisor ends the others."""
    for _ in patiently(folder, command):
        if not set(crew) & set(children(command)):
            return


def patiently(folder: Path, command: int) -> Iterator[None]:
    """Look again and again. Raises RuntimeError if the command ends, or if nothing comes of it."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        ended, status = os.waitpid(command, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            raise RuntimeError(f"the run ended with {code} too early: {said(folder)[-2000:]}")
        yield
        pause(folder, 0.001)
    raise RuntimeError(f"nothing happened for {PATIENCE:.0f} s: {said(folder)[-2000:]}")


def pause(folder: Path, seconds: float) -> None:
    """Pass time, while the run goes on."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        (folder / WATCHED).touch()
        time.sleep(min(left, LEASE / 5))


# ---- what is on the disk ------------------------------------------------------------------------------------------


def follow(folder: Path) -> tuple[int, int]:
    """A number that changes whenever ranks begin, since they write the metrics anew, and the last step in them."""
    try:
        with (folder / METRICS).open("rb") as file:
            return os.fstat(file.fileno()).st_ino, file.read().count(b"\n")
    except FileNotFoundError:
        return 0, 0


def drafting(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when all were killed."""
    return any(folder.glob(".step_*.writing"))


def check_all(folder: Path, tally: Tally) -> None:
    """Sum every file of every checkpoint again that counts as whole."""
    for path in whole(folder):
        sums = json.loads((path / "meta.json").read_text())["files"]
        tally.checked += 1
        tally.torn += any(hashlib.sha256((path / file).read_bytes()).hexdigest() != sum for file, sum in sums.items())


def fingerprint(folder: Path, step: int) -> str:
    """Of the ledger and of all files of weights and of what resuming needs."""
    digest = hashlib.sha256((folder / STEPS).read_bytes())
    last = folder / step_name(step)
    for path in sorted(p for part in ("model", "resume") for p in (last / part).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(last)}".encode() + path.read_bytes())
    return digest.hexdigest()


def said(folder: Path) -> str:
    """All that the supervisor and rank 0 said."""
    return (folder / "said.log").read_text(errors="replace")


# ---- processes ----------------------------------------------------------------------------------------------------


def adopt() -> None:
    """Let orphans become ours, so that we know when they are gone."""
    ctypes.CDLL("libc.so.6").prctl(SUBREAPER, 1)


class Forked:
    """A rank as a fork of its supervisor."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def begin(folder: Path, ranks: int, config: TrainConfig) -> int:
    """The process of a supervisor, which goes on from whatever is in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    if pid := os.fork():
        return pid
    with become(folder / "said.log"):
        plan = Plan(ranks, restarts=100, poll=0.02)
        os._exit(supervise([], folder, plan, partial(start_rank, config)))


def start_rank(config: TrainConfig, command: Sequence[str], place: Mapping[str, str], log: Path) -> Forked:
    if pid := os.fork():
        return Forked(pid)
    with become(None if place["RANK"] == "0" else log):
        os.environ.update(place)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        try:
            train(log.parents[1], config, samples=partial(undrawn, log.parents[1] / WATCHED))
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            os._exit(BAD_INPUT)
        os._exit(0)


def undrawn(watched: Path, position: int) -> Sample:
    """Of samples that end in no picture to draw, so that steps go on while a checkpoint is written; but none while
    whoever is to kill the run is held up."""
    with suppress(FileNotFoundError):
        while time.time() - watched.stat().st_mtime > LEASE:
            time.sleep(0.01)
    return sample(position + DRAWN)


@contextmanager
def become(log: Path | None) -> Iterator[None]:
    """A process of a session of its own, which never goes back to where it was forked."""
    try:
        os.setsid()
        if log is not None:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        yield
    except BaseException:  # as an interpreter does in the end
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def finish(folder: Path, command: int) -> None:
    """Wait for the end. Raises RuntimeError if it is a failure."""
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    if code:
        raise RuntimeError(f"the run ended with {code}: {said(folder)[-2000:]}")


def children(process: int) -> list[int]:
    """Those that still run."""
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(pid) for pid in listed if not ended(pid)]


def end_all(command: int, crew: Sequence[int]) -> None:
    """Kill a supervisor and its ranks, and wait until they are gone."""
    for process in (command, *crew):
        shoot(process)
    for process in (command, *crew):
        reap(process)


def shoot(process: int) -> None:
    with suppress(ProcessLookupError):  # its supervisor reaped it in between
        os.kill(process, signal.SIGKILL)


def ended(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def reap(process: int) -> None:
    """Until a process, ours or an orphan that became ours, is gone."""
    try:
        os.waitpid(process, 0)
    except ChildProcessError:
        pass  # its supervisor was told before it fell itself


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
