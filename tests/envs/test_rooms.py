"""Names of rooms are known before there is a simulator, and are those that the simulator answers to."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium
import minigrid  # noqa: F401 (it registers its levels)
import pytest

from litchi.config import BadInput
from litchi.envs.minigrid import Room
from litchi.envs.rooms import ROOMS, check_rooms
from litchi.serve.run import ServeConfig


def makes(name: str) -> bool:
    try:
        Room(name).reset(0)
    except BadInput:
        return False
    return True


def test_the_names_are_all_that_the_simulator_answers_to():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # levels that have a newer version
        levels = [name for name in gymnasium.registry if name.startswith(("BabyAI-", "MiniGrid-"))]
        assert {name for name in levels if makes(name)} == set(ROOMS)
    assert len(levels) > len(ROOMS) and set(ServeConfig().envs) <= set(ROOMS)


def test_a_name_is_known_without_importing_a_simulator():
    program = """
import sys
from litchi.envs.rooms import ROOMS, check_rooms
check_rooms("serve.envs", ROOMS)
try:
    check_rooms("serve.envs", ["BabyAI-GoTo-v0"])
except ValueError as error:
    print(error)
print(sorted({"minigrid", "gymnasium", "pygame", "torch", "numpy"} & set(sys.modules)))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    first, second = told.splitlines()
    assert first.startswith(
        "serve.envs holds 'BabyAI-GoTo-v0', which is no room of 8x8 tiles: did you mean 'BabyAI-GoTo"
    )
    assert second == "[]"


def test_a_name_that_is_like_none_is_told_all():
    with pytest.raises(BadInput, match=r"choose among BabyAI-GoToLocal-v0, .*MiniGrid-PutNear-8x8-N3-v0"):
        check_rooms("serve.envs", ["?"])


def test_a_level_of_somebodys_own_is_tried(tmp_path, monkeypatch):
    (tmp_path / "mylevels.py").write_text(
        "import gymnasium\n"
        "from minigrid.envs.babyai import GoToLocal\n"
        "gymnasium.register('Mine-v0', GoToLocal, kwargs={'room_size': 8})\n"
        "gymnasium.register('Wide-v0', GoToLocal, kwargs={'room_size': 9})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gymnasium.envs.registration, "registry", dict(gymnasium.registry))
    check_rooms("serve.envs", ["mylevels:Mine-v0"])
    with pytest.raises(BadInput, match="mylevels:Wide-v0 is 9x9 tiles, not 8x8: choose another level"):
        check_rooms("serve.envs", ["mylevels:Wide-v0"])
    with pytest.raises(BadInput, match="no room 'notthere:Mine-v0'"):
        check_rooms("serve.envs", ["notthere:Mine-v0"])
    with pytest.raises(BadInput, match="CartPole-v1 is 0x0 tiles"):
        check_rooms("serve.envs", ["gymnasium:CartPole-v1"])
