"""An episode is what happened; a policy reads what training read; what was recorded can be lived again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from litchi.act.policy import Policy, RandomAgent, Replay
from litchi.act.run import ActConfig, play, run
from litchi.config import BadInput
from litchi.envs.minigrid import HELD_OUT, SPACE, Room, expert
from litchi.schema.episode import Episode
from litchi.schema.protocol import Agent
from litchi.schema.request import Completion, Delta, Request
from litchi.schema.sample import Action, Image, Part, Sample

GO = "BabyAI-GoToRedBall-v0"


class Planner:
    """BabyAI's planner behind an action request: it sees the room, and answers as a model would."""

    def __init__(self, room: Room) -> None:
        self.room, self.asked = room, list[Request]()

    def complete(self, request: Request) -> Completion:
        if len(request.parts) == 2:
            self.bot = expert(self.room)
        self.asked.append(request)
        action = Action.discrete(int(self.bot.replan()), request.space)
        return Completion(parts=(action,), text="", finish="stop", prompt_tokens=0, tokens=())

    def stream(self, request: Request) -> Iterator[Delta]:
        yield Delta(part=self.complete(request).parts[0], finish="stop")


class Counting:
    """An environment of numbered frames that ends after `length` steps, or never."""

    task = "count"

    def __init__(self, length: int = 1000) -> None:
        self.length = length

    def reset(self, seed: int) -> tuple[Part, ...]:
        self.count = 0
        return self.frame()

    def step(self, action: Action) -> tuple[tuple[Part, ...], float, bool, bool]:
        self.count += 1
        return self.frame(), float(self.count == self.length), self.count == self.length, False

    def frame(self) -> tuple[Part, ...]:
        return (Image(pixels=np.full((8, 8, 3), self.count, np.uint8)),)


def same(a: Sample, b: Sample) -> bool:
    return len(a.parts) == len(b.parts) and all(equal(x, y) for x, y in zip(a.parts, b.parts, strict=True))


def equal(a: Part, b: Part) -> bool:
    return type(a) is type(b) and all(
        np.array_equal(getattr(a, f), getattr(b, f)) for f in a.__slots__ if f != "weight"
    )


def story(episode: Episode) -> Sample:
    return episode.to_sample(learn_actions=True, learn_frames=False)


def test_an_episode_is_frame_action_frame() -> None:
    episode = play(Counting(3), RandomAgent(7, 0), seed=1, max_steps=10)
    seen = [int(step.observation[0].pixels[0, 0, 0]) for step in episode.steps]  # type: ignore[union-attr]
    assert seen == [0, 1, 2]
    assert int(episode.last[0].pixels[0, 0, 0]) == 3  # type: ignore[union-attr]
    assert episode.success and episode.key == "seed-1"


def test_an_episode_that_does_not_end_is_truncated() -> None:
    episode = play(Counting(), RandomAgent(7, 0), seed=1, max_steps=5)
    assert [step.truncated for step in episode.steps] == [False] * 4 + [True]
    assert not episode.success


def test_success_at_the_last_step_is_no_truncation() -> None:
    episode = play(Counting(5), RandomAgent(7, 0), seed=1, max_steps=5)
    assert episode.success and not episode.steps[-1].truncated


def test_a_policy_reads_what_training_reads() -> None:
    """Each request is the sample of the episode up to there, so that no off-by-one can hide between the two."""
    room = Room(GO, "agent")
    planner = Planner(room)
    episode = play(room, Policy(planner, SPACE, context_frames=100), HELD_OUT, 64)
    assert episode.success
    whole = story(episode)
    for count, request in enumerate(planner.asked):
        until = Sample(whole.parts[: 2 + 2 * count], key="", source="")
        assert same(Sample(request.parts, key="", source=""), until)
        assert (request.want, request.space) == ("action", SPACE)


def test_a_policy_shows_its_last_frames_and_the_actions_between() -> None:
    class Listener(Planner):
        def __init__(self) -> None:
            self.asked = []

        def complete(self, request: Request) -> Completion:
            self.asked.append(request)
            answer = Action.discrete(len(self.asked) - 1, SPACE)
            return Completion(parts=(answer,), text="", finish="stop", prompt_tokens=0, tokens=())

    listener = Listener()
    play(Counting(), Policy(listener, SPACE, context_frames=3), seed=0, max_steps=6)
    _, *shown = listener.asked[-1].parts
    numbers = [int(p.pixels[0, 0, 0]) if isinstance(p, Image) else int(p.values[0, 0]) for p in shown]  # type: ignore[union-attr]
    assert numbers == [3, 3, 4, 4, 5]
    assert [len(request.parts) for request in listener.asked] == [2, 4, 6, 6, 6, 6]


def test_a_policy_forgets_between_episodes() -> None:
    room = Room(GO, "agent")
    policy = Policy(Planner(room), SPACE)
    play(room, policy, HELD_OUT + 1, 64)
    again = play(room, policy, HELD_OUT, 64)
    fresh = play(room, Policy(Planner(room), SPACE), HELD_OUT, 64)
    assert same(story(again), story(fresh))


def test_a_sampler_without_an_action_is_named() -> None:
    class Silent(Planner):
        def complete(self, request: Request) -> Completion:
            return Completion(parts=(), text="left", finish="stop", prompt_tokens=0, tokens=())

    with pytest.raises(BadInput, match="without an action"):
        play(Counting(), Policy(Silent(Room(GO)), SPACE), 0, 3)
    with pytest.raises(BadInput, match="at least 1"):
        Policy(Silent(Room(GO)), SPACE, context_frames=0)


def test_the_random_agent_follows_its_seed_alone() -> None:
    room = Room(GO, "agent")
    first, second, other = (play(room, RandomAgent(7, seed), HELD_OUT, 30) for seed in (1, 1, 2))
    assert same(story(first), story(second))
    assert not same(story(first), story(other))
    assert {int(step.action.values[0, 0]) for step in first.steps} <= set(range(7))


def test_recorded_actions_live_the_same_episode() -> None:
    room = Room(GO, "agent")
    lived = play(room, RandomAgent(7, 3), HELD_OUT + 2, 20)
    agent: Agent = Replay([step.action for step in lived.steps])
    assert same(story(play(room, agent, HELD_OUT + 2, 20)), story(lived))
    with pytest.raises(BadInput, match="ends after 20 actions"):
        play(room, agent, HELD_OUT + 2, 21)


def test_a_run_keeps_every_episode_and_counts() -> None:
    room, kept = Room(GO, "agent"), list[Episode]()
    config = ActConfig(episodes=3)
    tally = run(config, room, Policy(Planner(room), SPACE), kept.append)
    assert config.first_seed == HELD_OUT, "the first seeds played are the first that training may not use"
    assert [episode.key for episode in kept] == [f"seed-{HELD_OUT + i}" for i in range(3)]
    assert (tally.episodes, tally.successes) == (3, 3)
    assert tally.steps == sum(len(episode.steps) for episode in kept)
