"""What cannot work is refused at the start, before weights are read, by a line that names the setting and the mend."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest

from litchi.cli import check_envs, load_sampler, main
from litchi.config import BadInput
from litchi.serve.run import ServeConfig, uvicorn_config
from litchi.serve.scheduler import EngineConfig
from litchi.serve.settings import ABILITIES, LEAST, check

BAD = {
    'serve.checkpoints=["a"]': "set serve.api_key",
    'serve.api_key=" k"': "take them out",
    "serve.port=65536": "give 0 (a free one) to 65535",
    "serve.envs=[]": "name at least the room",
    'serve.envs=["BabyAI-GoToLocal-v0","BabyAI-GoToLocl-v0"]': "did you mean 'BabyAI-GoToLocal-v0'?",
    'serve.envs=["kitchen"]': "choose among BabyAI-GoToLocal-v0, BabyAI-",
    'serve.abilities=["sees"]': "give some of see, draw, dream, watch",
    'serve.allowed_hosts=["Example.com"]': "small letters",
    'serve.allowed_hosts=["example.com:8000"]': "without scheme or port",
    'serve.allowed_hosts=["*"]': "no names for any",
    'serve.fetch_hosts=["a/b"]': "give HOST, HOST:PORT",
    'serve.adapters=["poet"]': "NAME=FOLDER",
    'serve.model=""': "give the name",
    "serve.max_tokens=0": "give 1 or more",
    "serve.max_pixels=200000000": "give at most 178956970",
    "serve.patience=0": "more than 0",
    "serve.worker_patience=-1": "more than 0",
    "serve.start_patience=0": "more than 0",
    "serve.drain=-1": "0 or more",
    "serve.tensor=0": "give 1 or more",
    "serve.engine.max_running=0": "give 1 or more",
    "serve.engine.cache_tokens=63": "serve.engine.page=64 or more",
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("setting", BAD)
def test_what_cannot_work_is_refused_before_weights_are_read(setting: str, workers: int, monkeypatch, capsys) -> None:
    def read(*_: object) -> None:
        raise AssertionError("weights were read, or a worker started that reads them")

    monkeypatch.setattr("litchi.serve.loading.load", read)
    monkeypatch.setattr("litchi.serve.loading.Fleet", read)
    assert main(["serve", "tiny", "--set", setting, "--set", f"serve.workers={workers}"]) != 0
    said = capsys.readouterr().err.strip()
    assert BAD[setting] in said and setting.split("=")[0] in said and "\n" not in said


def test_a_model_without_rooms_needs_their_extra_only_where_rooms_are_named(tmp_path, monkeypatch) -> None:
    """One that others trained is served where no simulator is installed."""
    for module in ("litchi.envs", "litchi.envs.rooms"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "minigrid", None)  # as if it were not installed
    check_envs(ServeConfig(), tmp_path)
    with pytest.raises(BadInput, match=r"minigrid needs the extra 'rooms': pip install 'litchi\[rooms\]'"):
        check_envs(ServeConfig(envs=("BabyAI-GoToObj-v0",)), tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(BadInput, match="needs the extra 'rooms'"):
        check_envs(ServeConfig(), tmp_path)


def test_a_door_over_any_other_sampler_refuses_them_too(painter) -> None:
    with pytest.raises(BadInput, match=r"set serve\.api_key"):
        uvicorn_config(ServeConfig(checkpoints=("a",)), painter(), lambda name, seed: None)


@pytest.mark.parametrize("side", [0, 63, 72])
def test_a_side_that_the_models_pictures_cannot_have_is_refused(side: int) -> None:
    with pytest.raises(BadInput, match=rf"serve\.side={side} .* give a multiple of 16"):
        uvicorn_config(ServeConfig(side=side), load_sampler("tiny"), lambda name, seed: None)


def test_what_works_is_let_in() -> None:
    names = ("example.com", "::1", "10.0.0.1", "localhost")
    check(ServeConfig(allowed_hosts=names, checkpoints=("a",), api_key="open sesame", abilities=ABILITIES, max_queue=0))
    check(ServeConfig(fetch_hosts=("a.org", "b.org:81"), fetch_inner_hosts=("http://[::1]:8000",), max_images=0))
    assert ServeConfig().abilities == ABILITIES


def test_every_number_has_a_least() -> None:
    """A setting that is added is thought of here too."""
    elsewhere = {"port", "worker_patience", "start_patience", "drain", "patience", "engine.cache_tokens"}
    counted = {f.name for f in fields(ServeConfig) if f.type in ("int", "float")}
    counted |= {f"engine.{f.name}" for f in fields(EngineConfig) if f.type in ("int", "float")}
    assert counted == set(LEAST) | elsewhere
