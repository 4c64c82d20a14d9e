"""What llama.cpp's converter writes, and folders with a sentencepiece model alone, say what transformers says.

The GGUF files are written by ggml's own package: its map of names, its keys, and rows of heads turned as it turns them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from litchi.config import BadInput
from litchi.model.adopt import adopt, give_back
from litchi.model.convert import load_foreign
from litchi.model.generate import Generator
from litchi.model.weights import load
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Role, Text
from litchi.schema.templates import TEMPLATES
from tests.model.test_families import TOLERANCE, scores
from tests.schema.test_sentencepiece import model_bytes, pieces_of, tables

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen cuts a text into words, as its tokenizer.json has it."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPOKEN = ["where is the red ball", "it is in row 2", "what do you see", "a blue key and nothing else", "isn't it 42?"]
TYPED = [
    "where is it?",
    "  two  spaces\n\n\tand a tab ",
    "12345 isn't",
    "荔枝 \U0001f600 é",
    "<|im_end|>\n<|im_start|>system",
    "",
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 96, "rms_norm_eps": 1e-5}
FAMILIES = {
    "qwen2": (
        "Qwen2",
        SIZES | {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 16}),
    "llama": ("Llama", SIZES),
}


@pytest.fixture(scope="module")
def byte_level():
    """A small tokenizer that cuts as Qwen's does, as transformers holds it."""
    backend = Backend(models.BPE())
    cut = pre_tokenizers.Split(Regex(QWEN), "isolated", invert=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SPOKEN, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATES["chatml"]
    return fast


def network(family: str, vocab_size: int):
    name, sizes = FAMILIES[family]
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": None}
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab_size, **sizes, **ends)
    torch.manual_seed(0)
    net = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return net


def write(path: Path, family: str, net, tokenizer: dict[str, object]) -> Path:
    """The file that llama.cpp's convert_hf_to_gguf.py writes, in fp32."""
    c = net.config
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    for key, value in tokenizer.items():
        add = {list: writer.add_array, str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32}
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), c.num_hidden_layers)
    for name, tensor in net.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if family == "llama" and heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_tables(fast) -> dict[str, object]:
    """The tables of a GGUF that hold the tokenizer."""
    vocab = fast.backend_tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    state = fast.backend_tokenizer.to_str()
    merges = [" ".join(pair) for pair in json.loads(state)["model"]["merges"]]
    named: dict[str, object] = {"model": "gpt2", "pre": "qwen2", "tokens": tokens, "merges": merges}
    named |= {"token_type": [3 if token in SPECIAL else 1 for token in tokens]}
    named |= {"eos_token_id": vocab["<|im_end|>"], "padding_token_id": vocab["<|endoftext|>"], "add_bos_token": False}
    return {f"tokenizer.ggml.{key}": value for key, value in named.items()} | {
        "tokenizer.chat_template": fast.chat_template
    }


CHAT = (("user", "where is the red ball"), ("assistant", "it is in row 2"), ("user", "what do you see"))


def parts(*turns: tuple[str, str]) -> tuple[Text, ...]:
    return tuple(Text(text=text, role=Role(role)) for role, text in turns)


def told(net, ids: list[int], count: int, end: int) -> list[int]:
    made = net.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=end)
    answer = made[0, len(ids) :].tolist()
    return answer[: answer.index(end)] if end in answer else answer


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_gguf_of_qwen_says_what_transformers_says(family: str, byte_level, tmp_path: Path) -> None:
    """Logits to 1e-4, ids of text and of a conversation, and a greedy answer."""
    net = network(family, len(byte_level))
    file = write(tmp_path / "model.gguf", family, net, byte_level_tables(byte_level))
    ids = torch.randint(len(byte_level), (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        gap = (scores(load_foreign(file), ids) - net(torch.tensor([ids])).logits[0]).abs().max()
    assert gap <= TOLERANCE

    adopt(file, tmp_path / "ours", dtype=torch.float32)
    loaded = load(tmp_path / "ours")
    for text in TYPED:
        expected = byte_level.backend_tokenizer
        expected.encode_special_tokens = True
        assert loaded.processor.tokenizer.encode(text) == expected.encode(text, add_special_tokens=False).ids
        expected.encode_special_tokens = False
    messages = [{"role": role, "content": text} for role, text in CHAT]
    prompt = byte_level.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert loaded.processor.prompt(parts(*CHAT)).tokens == prompt
    request = Request(parts=parts(*CHAT), params=SamplingParams(max_tokens=16))
    end = loaded.processor.tokenizer.control("<|im_end|>")
    answer = Generator(loaded.model, loaded.processor).complete(request)
    assert list(answer.tokens) == told(net, prompt, 16, end) != []


PIECES = pieces_of(own=("☃☃",))


def test_a_gguf_with_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    """Rows of heads are turned as llama.cpp does for llamas; plain text begins with the token that begins one."""
    net = network("llama", len(PIECES))
    file = write(tmp_path / "model.gguf", "llama", net, tables(PIECES, bos_token_id=1, eos_token_id=2))
    adopt(file, tmp_path / "ours", dtype=torch.float32)
    loaded = load(tmp_path / "ours")
    prompt = loaded.processor.prompt(parts(("", "the sands</s> 荔枝 in"))).tokens
    texts = [PIECES[index][0] for index in prompt]
    assert "".join(texts) == "<s>▁the▁sands<0x3C>/s<0x3E>▁荔枝▁in" and "▁the" in texts and 2 not in prompt
    with torch.no_grad():
        gap = (scores(loaded.model, prompt) - net(torch.tensor([prompt])).logits[0]).abs().max()
    assert gap <= TOLERANCE
    request = Request(parts=parts(("", "the sands</s> 荔枝 in")), params=SamplingParams(max_tokens=12))
    assert list(Generator(loaded.model, loaded.processor).complete(request).tokens) == told(net, prompt, 12, 2)


CONFIG = """{"added_tokens_decoder": {"%d": {"content": "<|im_start|>", "special": true},
 "%d": {"content": "<|im_end|>", "special": true}}, "bos_token": "<s>", "eos_token": "<|im_end|>",
 "add_bos_token": false, "tokenizer_class": "LlamaTokenizer"}"""


def folder_of(place: Path, data: bytes, count: int) -> None:
    """A Llama as Hugging Face had them at first: with tokenizer.model, and two tokens more for ChatML."""
    network("llama", count + 2).save_pretrained(place)
    (place / "tokenizer.model").write_bytes(data)
    (place / "tokenizer_config.json").write_text(CONFIG % (count, count + 1))
    (place / "chat_template.jinja").write_text(TEMPLATES["chatml"])


def test_a_folder_with_a_sentencepiece_model_alone_is_adopted(tmp_path: Path) -> None:
    count = len(PIECES)
    folder_of(tmp_path / "in", model_bytes(PIECES), count)
    adopt(tmp_path / "in", tmp_path / "ours", dtype=torch.float32)
    processor = load(tmp_path / "ours").processor
    prompt = processor.prompt(parts(("user", "<|im_end|> the<s>"))).tokens
    assert prompt[0] == count and prompt.count(count + 1) == 1 and 1 not in prompt  # the template's own
    assert processor.tokenizer.ends == {count + 1, 2}
    plain = processor.prompt(parts(("", " the"))).tokens
    assert [PIECES[index][0] for index in plain] == ["▁", "▁the"]

    give_back(tmp_path / "ours", tmp_path / "back")
    back = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    messages = [{"role": "user", "content": "in the sand"}]
    ids = back.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert processor.prompt(parts(("user", "in the sand"))).tokens == ids


def test_a_folder_whose_sentencepiece_model_is_no_bpe_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path / "in", model_bytes(PIECES, spec={3: 1}), len(PIECES))
    with pytest.raises(BadInput, match="is a unigram model of sentencepiece"):
        adopt(tmp_path / "in", tmp_path / "ours")
    (tmp_path / "in" / "tokenizer.model").unlink()
    with pytest.raises(BadInput, match="tokenizer.json is missing, and so is tokenizer.model"):
        adopt(tmp_path / "in", tmp_path / "ours")
