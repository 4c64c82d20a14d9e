"""`litchi serve` and `litchi chat` on a model of others that sees: pictures keep their size, drawing is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from litchi.cli import main
from litchi.model.adopt import adopt
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Role, Text
from litchi.schema.sight import Sight
from tests.model.test_vlm import build, pictures

openai = pytest.importorskip("openai")
LENGTH = 8


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    """A random Qwen3-VL of transformers, adopted."""
    place = tmp_path_factory.mktemp("seeing")
    build("Qwen3-VL", place / "theirs")
    adopt(place / "theirs", place / "qwen", dtype=torch.float32)
    return place / "qwen"


@pytest.fixture(scope="module")
def served(seeing: Path, served_folder) -> Iterator[object]:
    with served_folder(seeing) as served:
        yield served


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def shown() -> dict:
    out = io.BytesIO()
    Pillow.fromarray(pictures(1)[0]).save(out, "PNG")
    url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_question_about_a_picture_reaches_the_model_as_it_was_sent(client, served) -> None:
    content = [{"type": "text", "text": "what is in"}, shown(), {"type": "text", "text": " it"}]
    answer = client.chat.completions.create(
        model="qwen", messages=[{"role": "user", "content": content}], max_tokens=LENGTH, temperature=0
    )
    parts = (
        Text(text="what is in", role=Role.USER),
        Image(pixels=pictures(1)[0], role=Role.USER),
        Text(text=" it", role=Role.USER),
    )
    expected = served.sampler.complete(Request(parts=parts, params=SamplingParams(max_tokens=LENGTH)))
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == len(served.sampler.processor.prompt(parts).tokens)


def test_it_is_listed_as_one_that_sees_and_drawing_is_refused(client) -> None:
    [model] = client.models.list()
    assert model.abilities == ["talk", "see"]
    with pytest.raises(openai.BadRequestError, match="draw"):
        client.images.generate(model="qwen", prompt="a red ball")


def test_chat_shows_a_picture_in_its_own_size(seeing: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    picture = tmp_path / "wide.png"
    Pillow.fromarray(pictures(1)[0]).save(picture)
    questions = iter(["what is it", ""] * 2)
    monkeypatch.setattr("litchi.cli.ask", lambda prompt: next(questions))
    clear = tmp_path / "clear.png"
    Pillow.new("RGBA", (40, 40), (0, 0, 0, 0)).save(clear)
    look, sizes, seen = Sight.look, [], []

    def watched(self: Sight, pixels: np.ndarray) -> list:
        sizes.append(pixels.shape)
        seen.append(pixels)
        return look(self, pixels)

    monkeypatch.setattr(Sight, "look", watched)
    assert main(["chat", str(seeing), "--image", str(picture)]) == 0
    assert sizes[0] == pictures(1)[0].shape
    assert main(["chat", str(seeing), "--image", str(clear)]) == 0
    assert sizes[-1] == (40, 40, 3) and seen[-1].min() == 255, "what is transparent is white"
    assert "Ask about the picture" in capsys.readouterr().out
