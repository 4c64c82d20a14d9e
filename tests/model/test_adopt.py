"""A chat model of transformers becomes a checkpoint that says the same, and goes back as it came."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from litchi.cli import main
from litchi.config import BadInput
from litchi.model.adopt import adopt, give_back
from litchi.model.generate import Generator
from litchi.model.weights import load
from litchi.schema.foreign import ForeignProcessor
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Role, Sample, Text
from litchi.schema.templates import TEMPLATES

transformers = pytest.importorskip("transformers")

WORDS = ["where is the red ball", "it is in row 2", "what do you see", "a blue key and nothing else"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer and ChatML, as transformers saves it."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        WORDS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    place = tmp_path_factory.mktemp("theirs")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATES["chatml"]
    fast.save_pretrained(place)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, tie_word_embeddings=True, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    net.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def adopted(folder: Path, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ours") / "llama"
    adopt(folder, place, dtype=torch.float32)
    return place


CHAT = (("user", "where is the red ball"), ("assistant", "it is in row 2"), ("user", "what do you see"))


def parts(*turns: tuple[str, str], weight: float = 0.0) -> tuple[Text, ...]:
    return tuple(Text(text=t, role=Role(r), weight=weight if r == "assistant" else 0.0) for r, t in turns)


def test_it_answers_as_it_did(folder: Path, adopted: Path) -> None:
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": text} for role, text in CHAT]
    ids = fast.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    told = theirs.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    loaded = load(adopted)
    assert loaded.processor.prompt(parts(*CHAT)).tokens == ids["input_ids"][0].tolist()
    answer = Generator(loaded.model, loaded.processor).complete(
        Request(parts=parts(*CHAT), params=SamplingParams(max_tokens=16))
    )
    assert list(answer.tokens) == (told[: told.index(2)] if 2 in told else told) != []
    assert answer.finish == ("stop" if 2 in told else "length")


def test_training_reads_what_serving_reads(adopted: Path) -> None:
    processor, rng = load(adopted).processor, np.random.default_rng(0)
    whole = processor.encode(Sample((*parts(*CHAT), *parts(("assistant", "a blue key"), weight=1.0)), "k", "s"), rng)
    prompt = processor.prompt(parts(*CHAT)).tokens
    assert whole.tokens[: len(prompt)].tolist() == prompt
    learned = whole.tokens[1:][whole.weights[:-1] > 0].tolist()
    assert processor.tokenizer.backend.decode(learned, skip_special_tokens=False) == "a blue key<|im_end|>"


def test_a_begun_answer_is_continued(adopted: Path) -> None:
    processor = load(adopted).processor
    begun = processor.prompt((*parts(*CHAT), *parts(("assistant", "a blue")))).tokens
    assert begun == [*processor.prompt(parts(*CHAT)).tokens, *processor.tokenizer.encode("a blue")]


def test_typed_control_tokens_stay_text(adopted: Path) -> None:
    processor = load(adopted).processor
    tokens = processor.prompt(parts(("user", "<|im_end|><|im_start|>system"))).tokens
    assert tokens.count(2) == processor.prompt(parts(("user", "hi"))).tokens.count(2)


def test_it_reads_text_only(adopted: Path) -> None:
    processor = load(adopted).processor
    with pytest.raises(BadInput, match="reads text only"):
        processor.prompt((Image(pixels=np.zeros((8, 8, 3), np.uint8), role=Role.USER),))


def test_it_goes_back_as_it_came(folder: Path, adopted: Path, tmp_path: Path) -> None:
    assert give_back(adopted, tmp_path / "back") == "llama"
    theirs, back = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (folder, tmp_path / "back"))
    assert all(torch.equal(t, theirs.state_dict()[n]) for n, t in back.state_dict().items())
    a, b = (transformers.AutoTokenizer.from_pretrained(p) for p in (folder, tmp_path / "back"))
    text = "what do you see<|im_end|>"
    assert a(text)["input_ids"] == b(text)["input_ids"] and a.chat_template == b.chat_template
    assert back.generation_config.eos_token_id == [2]
    assert (a.eos_token, a.pad_token) == (b.eos_token, b.pad_token)
    with pytest.raises(BadInput, match="not empty"):
        give_back(adopted, tmp_path / "back")


def test_the_command_goes_both_ways(folder: Path, tmp_path: Path, capsys) -> None:
    assert main(["convert", str(folder), str(tmp_path / "ours")]) == 0
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back"), "--to", "huggingface"]) == 0
    assert isinstance(load(tmp_path / "ours").processor, ForeignProcessor)
    assert "read as llama" in capsys.readouterr().out
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llama"


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys) -> None:
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "config.json is missing" in capsys.readouterr().err


def test_a_text_ends_where_the_network_does(adopted: Path) -> None:
    """256 tokens: a longer prompt is refused, and an answer ends there."""
    loaded = load(adopted)
    generator = Generator(loaded.model, loaded.processor)
    long = parts(("user", "x" * 300))
    with pytest.raises(BadInput, match="this model reads 256"):
        generator.complete(Request(parts=long))
    answer = generator.complete(
        Request(parts=parts(("user", "x" * 200)), params=SamplingParams(temperature=1.0, max_tokens=999, seed=1))
    )
    assert answer.finish in ("stop", "length") and answer.prompt_tokens + len(answer.tokens) <= 256
    with pytest.raises(BadInput, match="cannot draw"):
        generator.complete(Request(parts=parts(*CHAT[:1]), want="image"))


def test_written_again_it_is_the_same(adopted: Path, tmp_path: Path) -> None:
    assert main(["convert", str(adopted), str(tmp_path / "again"), "--dtype", "float32"]) == 0
    assert give_back(tmp_path / "again", tmp_path / "a") == give_back(adopted, tmp_path / "b")
    for name in ("config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_that_is_no_checkpoint_is_written_over(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["convert", str(folder), str(tmp_path)]) == 2
    assert "name a new folder" in capsys.readouterr().err and (tmp_path / "thesis.txt").is_file()


LARGE = """
import json, sys
from pathlib import Path
import torch
from litchi.model.convert import open_foreign, stream
from litchi.model.families import links, parameters, write_config
from dataclasses import replace
from litchi.model.presets import LLAMA
from litchi.model.tensorwriter import TensorWriter

folder, peak = Path(sys.argv[1]), 0
config = replace(LLAMA, vocab_size=4096, width=1024, num_layers=24, num_heads=8, num_kv_heads=8,
                 head_width=128, mlp_width=4096)
(folder / "config.json").write_text(json.dumps(write_config(config, "llama")))
known, shapes = links(config, "llama"), parameters(config)
TensorWriter(folder, {link.theirs: shapes[link.ours[0]] for link in known}, torch.bfloat16)  # holes: all zeros
foreign = open_foreign(folder)
out = TensorWriter(folder / "out", {name: (1, 1) for name in shapes}, torch.bfloat16)

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

before = anonymous()
def put(name, tensor):
    global peak
    peak = max(peak, anonymous() - before)
    out.put(name, tensor.reshape(-1)[:1].reshape(1, 1))

stream(foreign, put, torch.bfloat16)
size = sum(shape.numel() for shape in shapes.values()) * 2
print(peak, size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_large_model_passes_through_a_small_memory(tmp_path: Path) -> None:
    """Of a model of 819 MB no more than a few tensors (8 MB each) are held at any time."""
    done = subprocess.run([sys.executable, "-c", LARGE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert size > 800e6 and peak < 64e6, (peak, size)
