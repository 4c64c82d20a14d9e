"""An episode in the real simulator becomes a sample, and the sample holds enough to live the episode again."""

# %% BabyAI's planner shows the way in a world; the episode is what it lived through.
import numpy as np

from litchi.act.policy import RandomAgent, Replay
from litchi.act.run import play
from litchi.envs.minigrid import ACTIONS, Room, demonstrate
from litchi.schema.sample import Action, Image, Text

LEVEL, SEED = "BabyAI-GoToRedBall-v0", 11
shown = demonstrate(LEVEL, SEED)
print(f"task: {shown.task!r}; solved: {shown.success}, in {len(shown.steps)} steps")

# %% One sequence teaches two things: with learned actions it is a policy, with learned frames a world model.
sample = shown.to_sample(learn_actions=True, learn_frames=True)
for part in sample.parts[:6]:
    match part:
        case Text(text=text):
            print(f"  text   weight {part.weight:.0f}  {text!r}")
        case Image(pixels=pixels):
            print(f"  frame  weight {part.weight:.0f}  {pixels.shape[0]}x{pixels.shape[1]} pixels")
        case Action(values=values):
            print(f"  action weight {part.weight:.0f}  {ACTIONS[int(values[0, 0])]}")

# %% An action stands between the frame it was chosen from and the frame that it led to.
parts = sample.parts[1:]
assert all(isinstance(p, Image) for p in parts[::2]) and all(isinstance(p, Action) for p in parts[1::2])
assert len(parts) == 2 * len(shown.steps) + 1

# %% The actions that the sample holds, taken again in the same world, lead through the same frames.
actions = [part for part in sample.parts if isinstance(part, Action)]
again = play(Room(LEVEL), Replay(actions), SEED, max_steps=64)
frames = [part.pixels for part in sample.parts if isinstance(part, Image)]
lived = [step.observation[0].pixels for step in again.steps] + [again.last[0].pixels]
same = all(np.array_equal(a, b) for a, b in zip(frames, lived, strict=True))
print(f"replayed: solved {again.success}, every frame the same: {same}")
assert same and again.success

# %% What a policy must beat: the same worlds, uniformly random actions.
room = Room(LEVEL)
tries = [play(room, RandomAgent(len(ACTIONS), seed), seed, max_steps=64).success for seed in range(20)]
print(f"random actions solve {sum(tries)} of {len(tries)} worlds")
