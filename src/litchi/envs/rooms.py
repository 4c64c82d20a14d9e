"""The rooms that can be named, known before any simulator is imported, which takes half a second."""

from __future__ import annotations

from collections.abc import Sequence

from litchi.config import BadInput, nearest

ROOMS = (
    "BabyAI-GoToLocal-v0",
    "BabyAI-GoToLocalS8N2-v0",
    "BabyAI-GoToLocalS8N3-v0",
    "BabyAI-GoToLocalS8N4-v0",
    "BabyAI-GoToLocalS8N5-v0",
    "BabyAI-GoToLocalS8N6-v0",
    "BabyAI-GoToLocalS8N7-v0",
    "BabyAI-GoToObj-v0",
    "BabyAI-GoToRedBall-v0",
    "BabyAI-GoToRedBallGrey-v0",
    "BabyAI-GoToRedBallNoDists-v0",
    "BabyAI-GoToRedBlueBall-v0",
    "BabyAI-OneRoomS8-v0",
    "BabyAI-PickupLoc-v0",
    "BabyAI-PutNextLocal-v0",
    "MiniGrid-DoorKey-8x8-v0",
    "MiniGrid-Dynamic-Obstacles-8x8-v0",
    "MiniGrid-Empty-8x8-v0",
    "MiniGrid-Fetch-8x8-N3-v0",
    "MiniGrid-GoToDoor-8x8-v0",
    "MiniGrid-GoToObject-8x8-N2-v0",
    "MiniGrid-PutNear-8x8-N3-v0",
)
"""Every level of MiniGrid that is one room of 8x8 tiles; `tests/envs` asks its registry."""


def check_rooms(setting: str, names: Sequence[str]) -> None:
    """Raises BadInput for a name in a setting that no simulator answers to.

    Only a name of somebody else's, MODULE:LEVEL, has that module imported and is tried.
    """
    for name in names:
        if ":" in name:
            from litchi.envs.minigrid import Room

            Room(name)
        elif name not in ROOMS:
            mend = nearest(name, ROOMS) or f": choose among {', '.join(ROOMS)}, or MODULE:LEVEL of your own"
            raise BadInput(f"{setting} holds {name[:80]!r}, which is no room of 8x8 tiles{mend}")
