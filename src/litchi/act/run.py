"""Acting: an agent lives through an episode of an environment, and what it lived through becomes a sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from litchi.record import Progress
from litchi.schema.episode import Episode, Step
from litchi.schema.protocol import Agent, Env


@dataclass(frozen=True, slots=True)
class ActConfig:
    """Which episodes to play, and how much of each the policy sees."""

    env: str = "BabyAI-GoToRedBall-v0"
    view: str = "agent"
    episodes: int = 512
    first_seed: int = 1_000_000_000
    """Seeds run on from here; in our rooms training uses smaller ones only."""
    max_steps: int = 64
    context_frames: int = 12
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Tally:
    """How a run of episodes went."""

    episodes: int
    successes: int
    steps: int


def play(env: Env, agent: Agent, seed: int, max_steps: int) -> Episode:
    """One episode, to its end or to `max_steps`, where it counts as truncated."""
    observation = env.reset(seed)
    agent.begin(env.task)
    task, steps = env.task, []
    for count in range(1, max_steps + 1):
        action = agent.act(observation)
        seen = observation
        observation, reward, terminated, truncated = env.step(action)
        truncated = truncated or (count == max_steps and not terminated)
        steps.append(Step(seen, action, reward, terminated, truncated))
        if terminated or truncated:
            break
    return Episode(tuple(steps), task=task, key=f"seed-{seed}", source="act", last=observation)


def run(config: ActConfig, env: Env, agent: Agent, keep: Callable[[Episode], None]) -> Tally:
    """Play the episodes of a config and hand each to `keep`, which may save it."""
    successes = steps = 0
    with Progress(config.episodes, f"act {config.env}") as progress:
        for seed in range(config.first_seed, config.first_seed + config.episodes):
            episode = play(env, agent, seed, config.max_steps)
            keep(episode)
            successes += episode.success
            steps += len(episode.steps)
            progress.advance(1)
    return Tally(config.episodes, successes, steps)
