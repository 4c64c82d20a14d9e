"""Samplers whose scores are known beforehand: one that knows everything, one that copies, one that says nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from minigrid.core.grid import Grid

from litchi.data.jobs import JOBS
from litchi.data.ticket import Split, Ticket
from litchi.envs.minigrid import Room
from litchi.envs.scene import DIRECTIONS, Scene, Thing, read, render
from litchi.envs.tiles import CLASSES
from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sample import Action, Image, Part, Role, Sample, Text, Video


def samples(source: str, count: int, split: Split = "test") -> list[Sample]:
    return [JOBS[source](Ticket(source, split, index)) for index in range(count)]


def completion(*parts: Part, text: str = "") -> Completion:
    return Completion(parts=parts, text=text, finish="stop", prompt_tokens=0, tokens=())


class Quiet:
    """Answers nothing at all."""

    def complete(self, request: Request) -> Completion:
        return completion()

    def stream(self, request: Request) -> Iterator[Delta]:
        answer = self.complete(request)
        yield from (Delta(part=part) for part in answer.parts)
        yield Delta(text=answer.text, finish="stop")


class Copier(Quiet):
    """Repeats the last frame."""

    def complete(self, request: Request) -> Completion:
        return completion(*[part for part in request.parts if isinstance(part, Image)][-1:])


class Oracle(Quiet):
    """Knows the answers of the samples it was given, and works frames out in the simulator."""

    def __init__(self, known: Iterable[Sample]) -> None:
        self.room, self.asked = Room("BabyAI-GoToLocal-v0"), 0
        self.room.reset(0)
        self.answers: dict[tuple, Part] = {}
        for sample in known:
            for place, part in enumerate(sample.parts):
                if part.role is Role.ASSISTANT:
                    self.answers[meaning(sample.parts[:place])] = part

    def complete(self, request: Request) -> Completion:
        self.asked += 1
        if request.want == "frame":
            *_, frame, action = request.parts
            assert isinstance(frame, Image) and isinstance(action, Action)
            return completion(Image(pixels=self.next_frame(frame.pixels, int(action.values[0, 0]))))
        answer = self.answers[meaning(request.parts)]
        if request.want == "image" and isinstance(answer, Text):
            answer = self.answers[meaning((*request.parts, answer))]
        return completion(text=answer.text) if isinstance(answer, Text) else completion(answer)

    def next_frame(self, pixels: np.ndarray, action: int) -> np.ndarray:
        scene = read(pixels)
        assert scene is not None and scene.agent is not None
        put(self.room, scene)
        self.room.act(action)
        return render(self.room.scene)


def meaning(parts: Iterable[Part]) -> tuple:
    """Parts without their weights, as a key."""
    found: list[tuple] = []
    for part in parts:
        match part:
            case Text():
                found.append((part.role, part.text))
            case Image():
                found.append((part.role, part.pixels.tobytes()))
            case Video():
                found.append((part.role, part.frames.tobytes()))
    return tuple(found)


def put(room: Room, scene: Scene) -> None:
    """Make the simulator stand as a scene shows it."""

    def solid(thing: Thing):
        return CLASSES[thing.kind](thing.colour)

    sim = room.sim
    sim.grid = Grid(sim.width, sim.height)
    sim.grid.wall_rect(0, 0, sim.width, sim.height)
    for thing in scene.things:
        sim.grid.set(thing.column, thing.row, solid(thing))
        sim.grid.get(thing.column, thing.row).cur_pos = np.array([thing.column, thing.row])
    assert scene.agent is not None
    row, column, direction = scene.agent
    sim.agent_pos, sim.agent_dir = np.array([column, row]), DIRECTIONS.index(direction)
    sim.carrying = solid(scene.carried) if scene.carried else None
