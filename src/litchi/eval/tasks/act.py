"""Act: episodes in worlds never seen before, in the closed loop; success is what the environment says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

from litchi.eval.item import Figure, Headline, Item, Json, Task
from litchi.schema.episode import Episode
from litchi.schema.protocol import Sampler
from litchi.schema.sample import Sample

Play = Callable[[int], Episode]
"""Plays the episode of a seed."""

HEADLINE = Headline(
    Figure("episodes solved", "right"),
    Figure("episodes solved", "random"),
    "random policy, same seeds",
    "unseen seeds of GoToRedBall; published after imitation of 5 k demonstrations: 89.6 to 99.3 % (BabyAI 1.0, 1.1)",
)
DETAILS = (
    Figure("steps of an episode", "steps", share=False),
    Figure("steps of a random episode", "random_steps", share=False),
    Figure("reward of an episode", "reward"),
)


def act(seeds: Sequence[int], play: Play, random_play: Play) -> Task:
    """The task. `play` and `random_play` must give the same episode for the same seed, whatever was played before."""

    def prompt(sample: Sample) -> Iterator[Item]:
        seed = sample.meta["seed"]

        def ask(_: Sampler) -> Json:
            return {"model": lived(play(seed)), "random": lived(random_play(seed))}

        digest = hashlib.sha256(f"episode of seed {seed}".encode()).hexdigest()
        yield Item(sample.key, sample.key, digest, {"seed": seed}, ask)

    samples = [Sample((), key=f"seed-{seed}", source="act", meta={"seed": seed}) for seed in seeds]
    return Task("act", samples, prompt, score, HEADLINE, DETAILS)


def lived(episode: Episode) -> Json:
    """What is kept of an episode: enough to play it again in the simulator."""
    actions = [step.action.values.tolist() for step in episode.steps]
    reward = sum(step.reward for step in episode.steps)
    return {"task": episode.task, "success": episode.success, "reward": reward, "actions": actions}


def score(part: str, truth: Json, answer: Json) -> dict[str, float]:
    model, random = answer["model"], answer["random"]
    return {
        "right": float(model["success"]),
        "random": float(random["success"]),
        "steps": float(len(model["actions"])),
        "random_steps": float(len(random["actions"])),
        "reward": float(model["reward"]),
        "n": 1.0,
    }
