"""Every model that sees equals transformers on a small random one: ids, logits, words, and weights written back."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from litchi.config import BadInput
from litchi.model.adopt import adopt, give_back
from litchi.model.convert import load_foreign
from litchi.model.families import Stacked, parameters
from litchi.model.generate import Generator
from litchi.model.presets import preset
from litchi.model.tensorfile import open_tensors
from litchi.model.vlm import read_config, spellings
from litchi.model.weights import load
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Image, Part, Role, Sample, Text
from litchi.schema.sequence import Modality, pack
from litchi.schema.sight import Sight, SightConfig, read_sight
from tests.model.table import digit, record

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
"""Of logits, fp32: the same sums in another order."""

SIDE, PATCH = 24, 4
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION |= {"image_size": SIDE, "patch_size": PATCH}
TEXT = {"model_type": "llama", "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 1024}
SHAPES = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
CLIP, SIGLIP = VISION | {"model_type": "clip_vision_model"}, VISION | {"model_type": "siglip_vision_model"}
QWEN_EYE = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": PATCH}
QWEN_EYE |= {"out_hidden_size": 48, "num_position_embeddings": 49, "deepstack_visual_indexes": [0, 2]}
QWEN_TEXT = TEXT | {"model_type": "qwen3_vl_text", "head_dim": 16}
QWEN_TEXT |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]}}

QWEN_EXPERTS = QWEN_TEXT | {"model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 20, "num_experts": 6}
QWEN_EXPERTS |= {"num_experts_per_tok": 2}
QWEN_SEES = {"vision_config": QWEN_EYE, "vision_start_token_id": 31, "vision_end_token_id": 32}

MODELS = {
    "LLaVA-1.5": ("Llava", {"vision_config": CLIP}),
    "LLaVA with SigLIP": (
        "Llava",
        {"vision_config": SIGLIP | {"vision_use_head": False}, "vision_feature_select_strategy": "full"},
    ),
    "LLaVA-NeXT": ("LlavaNext", {"vision_config": CLIP, "image_grid_pinpoints": SHAPES}),
    "SmolVLM": ("SmolVLM", {"vision_config": VISION, "scale_factor": 2}),
    "Idefics3": ("Idefics3", {"vision_config": VISION, "scale_factor": 3}),
    "Qwen3-VL": ("Qwen3VL", QWEN_SEES),
    "Qwen3-VL MoE": ("Qwen3VLMoe", QWEN_SEES),
}

LLAVA_CHAT = (
    "{% for m in messages %}{{ m.role | upper }}: "
    "{% for c in m.content if c.type == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}"
    "{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As llava-hf has it: pictures first, and no plain text."""
SMOL_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{% if m.content is string %}{{ ': ' + m.content }}"
    "{% else %}{{ ':' if m.content[0].type == 'image' else ': ' }}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% elif c.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>"]
SPECIAL += ["<global-img>", *(f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5))]
SPECIAL += ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|im_end|>"]
SMOLS, QWENS = ("SmolVLM", "Idefics3"), ("Qwen3VL", "Qwen3VLMoe")


def tokenizer(family: str):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["what is in the picture", "a red ball\n\nand a blue key", "USER: ASSISTANT:"], trainer)
    kinds = dict.fromkeys(QWENS, (QWEN_CHAT, "<|im_end|>", "<|image_pad|>")) | {
        smol: (SMOL_CHAT, "<end_of_utterance>", "<image>") for smol in SMOLS
    }
    template, end, picture = kinds.get(family, (LLAVA_CHAT, "</s>", "<image>"))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=end, extra_special_tokens={"image_token": picture}
    )
    fast.chat_template = template
    return fast


def build(name: str, folder: Path):
    """A random model of transformers and its processor, as they save them."""
    family, sizes = MODELS[name]
    fast = tokenizer(family)
    text = {"Qwen3VL": QWEN_TEXT, "Qwen3VLMoe": QWEN_EXPERTS}.get(family, TEXT)
    text |= {"vocab_size": len(fast), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    key = "image_token_index" if family.startswith("Llava") else "image_token_id"
    config = getattr(transformers, f"{family}Config")(
        text_config=text, **{key: fast.convert_tokens_to_ids(fast.image_token)}, **sizes
    )
    torch.manual_seed(0)
    net = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    net.save_pretrained(folder)
    if family in QWENS:
        size = {"shortest_edge": 16 * 64, "longest_edge": 48 * 64}
        looks = transformers.Qwen2VLImageProcessorPil(size=size, patch_size=PATCH, merge_size=2)
        processor = SimpleNamespace(image_processor=looks, tokenizer=fast)
    elif family in SMOLS:
        looks = getattr(transformers, f"{family}ImageProcessorPil")(
            size={"longest_edge": 3 * SIDE}, max_image_size={"longest_edge": SIDE}
        )
        count = (SIDE // PATCH // sizes["scale_factor"]) ** 2
        processor = SimpleNamespace(image_processor=looks, tokenizer=fast, image_seq_len=count)
    else:
        pixels = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
        if family == "LlavaNext":
            looks = transformers.LlavaNextImageProcessorPil(image_grid_pinpoints=SHAPES, **pixels)
        else:
            looks = transformers.CLIPImageProcessorPil(**pixels)
        extra = int(sizes.get("vision_feature_select_strategy") is None)
        processor = getattr(transformers, f"{family}Processor")(
            image_processor=looks, tokenizer=fast, patch_size=PATCH, num_additional_image_tokens=extra,
            vision_feature_select_strategy="default" if extra else "full", chat_template=fast.chat_template,
        )  # fmt: skip
    fast.save_pretrained(folder)
    looks.save_pretrained(folder)
    return net, processor


def pictures(count: int) -> list[np.ndarray]:
    """Wide, tall and square ones, of smooth noise."""
    rng = np.random.default_rng(0)
    shapes = [(31, 64), (70, 33), (48, 48)]
    return [
        np.kron(rng.integers(0, 256, (h // 3 + 1, w // 3 + 1, 3), dtype=np.uint8), np.ones((3, 3, 1), np.uint8))[:h, :w]
        for h, w in shapes[:count]
    ]


def conversation(shown: list[np.ndarray]) -> tuple[list[dict], tuple[Part, ...]]:
    """The same dialogue in their words and in ours; the last picture comes in the second question."""
    *first, last = shown
    theirs = [
        {"role": "user", "content": [*({"type": "image"} for _ in first), {"type": "text", "text": "what is in it"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a red ball"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and here"}]},
    ]
    ours = (
        *(Image(pixels=p, role=Role.USER) for p in first),
        Text(text="what is in it", role=Role.USER),
        Text(text="a red ball", role=Role.ASSISTANT),
        Image(pixels=last, role=Role.USER),
        Text(text="and here", role=Role.USER),
    )
    return theirs, ours


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_sees_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    theirs, processor = build(name, tmp_path / "in")
    adopt(tmp_path / "in", tmp_path / "ours", dtype=torch.float32)
    ours = load(tmp_path / "ours")
    told, said = conversation(pictures(3))
    inputs = their_inputs(name, processor, told, pictures(3))
    builder = ours.processor.prompt(said)
    assert builder.tokens == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        expected = theirs(**inputs).logits[0]
        found = ours.model.logits(ours.model(pack([builder.build()])))
        words = theirs.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
    gap = float((found - expected).abs().max())
    assert gap <= TOLERANCE
    continued = words[0, len(builder.tokens) :].tolist()
    for index in continued:
        sequence = pack([builder.build()])
        with torch.no_grad():
            assert int(ours.model.logits(ours.model(sequence))[-1].argmax()) == index
        builder.token(index)

    give_back(tmp_path / "ours", tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out", dtype=torch.float32)
    state = theirs.state_dict()
    assert set(state) == set(back.state_dict())
    assert all(torch.equal(tensor, state[n]) for n, tensor in back.state_dict().items())
    kind = type(theirs).__name__
    record("model that sees", name, f"`{kind}`", digit(gap), f"{len(continued)} of 16 tokens", "bit for bit")


def test_stacked_experts_are_read_as_the_hub_has_them_and_as_transformers_saves_them(tmp_path: Path) -> None:
    """Published folders hold them turned, and so do ours; transformers 5 saves a model that it built unturned."""
    build("Qwen3-VL MoE", tmp_path / "in")
    adopt(tmp_path / "in", tmp_path / "ours", dtype=torch.float32)
    give_back(tmp_path / "ours", tmp_path / "out")
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    shapes = [open_tensors(tmp_path / place).entries[name].shape for place in ("in", "out")]
    assert sorted(shapes) == [(6, 40, 48), (6, 48, 40)] and shapes[1] == (6, 48, 40)
    one, two = (load_foreign(tmp_path / place).state_dict() for place in ("in", "out"))
    assert one.keys() == two.keys() and all(torch.equal(tensor, two[n]) for n, tensor in one.items())
    form = Stacked(6, 40, turned=True)
    assert [form.found(shape).turned for shape in ((6, 40, 48), (6, 48, 40), (6, 40, 40), (240, 48))] == [0, 1, 0, 0]


def their_inputs(name: str, processor, told: list[dict], shown: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """What their processor makes of a dialogue. Two of them need torchvision for films: their parts are called here."""
    fast, looks = processor.tokenizer, processor.image_processor
    text = fast.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    if name.startswith("Qwen3-VL"):
        seen = looks(images=shown, return_tensors="pt")
        first, *rest = text.split("<|image_pad|>")
        counts = (seen["image_grid_thw"].prod(1) // 4).tolist()
        text = first + "".join("<|image_pad|>" * n + t for n, t in zip(counts, rest, strict=True))
        ids = fast(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        kinds = (ids == fast.convert_tokens_to_ids("<|image_pad|>")).int()
        return {"input_ids": ids, "mm_token_type_ids": kinds, **seen}
    if name not in SMOLS:
        return dict(processor(text=text, images=shown, return_tensors="pt"))
    from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

    seen = looks(images=[shown], return_row_col_info=True, return_tensors="pt")
    count = processor.image_seq_len
    strings = [
        get_image_prompt_string(r, c, count, "<fake_token_around_image>", "<image>", "<global-img>")
        for r, c in zip(seen["rows"][0], seen["cols"][0], strict=True)
    ]
    first, *rest = text.split("<image>")
    text = first + "".join(s + t for s, t in zip(strings, rest, strict=True))
    ids = fast(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    return {
        "input_ids": ids,
        "pixel_values": seen["pixel_values"],
        "pixel_attention_mask": seen["pixel_attention_mask"],
    }


@pytest.fixture(scope="module", params=["LLaVA-NeXT", "SmolVLM", "Qwen3-VL"])
def adopted(request, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("vlm")
    build(request.param, place / "in")
    adopt(place / "in", place / "ours", dtype=torch.float32)
    return place / "ours"


def test_decoding_with_a_cache_says_what_the_whole_document_says(adopted: Path) -> None:
    loaded = load(adopted)
    _, said = conversation(pictures(2))
    request = Request(parts=said, params=SamplingParams(max_tokens=8))
    cached, whole = (Generator(loaded.model, loaded.processor, cached=c).complete(request) for c in (True, False))
    assert cached.tokens == whole.tokens != ()


def test_training_reads_what_serving_reads(adopted: Path) -> None:
    processor, rng = load(adopted).processor, np.random.default_rng(0)
    _, said = conversation(pictures(2))
    whole = processor.encode(Sample((*said, Text(text="a key", role=Role.ASSISTANT, weight=1.0)), "k", "s"), rng)
    prompt = processor.prompt(said).build()
    assert torch.equal(whole.tokens[: len(prompt)], prompt.tokens)
    for name in ("index", "place", "value"):
        a, b = (getattr(s.vectors[Modality.VISION], name) for s in (whole, prompt))
        assert torch.equal(a, b)
    assert float(whole.weights.sum()) > 0


def test_documents_with_pictures_do_not_meet(adopted: Path) -> None:
    loaded = load(adopted)
    documents = [loaded.processor.prompt(conversation(pictures(n))[1]).build() for n in (1, 3, 2)]
    with torch.no_grad():
        apart = torch.cat([loaded.model(pack([d])) for d in documents])
        torch.testing.assert_close(loaded.model(pack(documents)), apart, rtol=1e-4, atol=1e-4)


def test_a_typed_picture_stays_text(adopted: Path) -> None:
    processor = load(adopted).processor
    builder = processor.prompt((Text(text="<image> <|image_pad|> <fake_token_around_image>", role=Role.USER),))
    assert processor.shown not in builder.tokens and not builder.rows
    with pytest.raises(BadInput, match="draws no pictures"):
        processor.prompt((Text(text="hi", role=Role.USER), Image(pixels=pictures(1)[0], role=Role.ASSISTANT)))


def test_how_a_model_looks_survives_its_file(adopted: Path) -> None:
    eye = load(adopted).processor.eye
    assert eye is not None and isinstance(eye.config, SightConfig) and eye.config.patch == PATCH


BASE = {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 48}, "vision_config": CLIP}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_feature_layer": [-2, -5]}, "one layer"),
        ({"vision_feature_layer": 9}, "one layer"),
        ({"vision_feature_select_strategy": "full"}, "class token"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        ({"vision_config": {"model_type": "swin"}}, "'swin'"),
        ({"model_type": "smolvlm", "scale_factor": 4}, "6 patches a side do not divide"),
        ({"model_type": "kosmos"}, "llava, llava_next, smolvlm"),
        ({"model_type": "qwen3_vl", "vision_config": QWEN_EYE | {"num_position_embeddings": 50}}, "is no square"),
        (
            {"model_type": "qwen3_vl", "vision_config": QWEN_EYE | {"deepstack_visual_indexes": [7]}},
            "layers of the tower",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        read_config(BASE | change)


@pytest.mark.parametrize(
    "said",
    [{"size": "x"}, {"image_mean": [1, "a", 2]}, {"image_mean": 0.5}, {"resample": [3]}, {"size": {"height": None}}],
)
def test_a_broken_way_of_looking_is_refused_in_one_line(said: dict) -> None:
    with pytest.raises(BadInput, match=r"^[^\n]*preprocessor_config.json[^\n]*download it again$"):
        read_sight(BASE, said, "<image>")
    with pytest.raises(BadInput, match="llava: config.json holds what cannot be read"):
        read_config(BASE | {"text_config": "x"})


def test_a_size_may_be_one_number_as_in_old_files() -> None:
    assert read_sight(BASE, {"size": SIDE, "crop_size": SIDE}, "<image>").side == SIDE


def test_a_line_of_pixels_is_refused_before_it_fills_the_memory() -> None:
    looks = Sight(read_sight(BASE, {}, "<image>"))
    with pytest.raises(BadInput, match="1x4800 pixels is too narrow"):
        looks.look(np.zeros((1, 4800, 3), np.uint8))


def test_a_silent_configuration_is_a_llama_of_7b() -> None:
    """llava-1.5-7b-hf gives its language model no sizes."""
    c = read_config(BASE | {"text_config": {"vocab_size": 32_064}})
    assert (c.width, c.num_layers, c.mlp_width, c.vocab_size) == (4096, 32, 11_008, 32_064)


def test_weights_are_found_under_every_name_that_was_ever_written() -> None:
    names = set(spellings("vision_tower.vision_model.post_layernorm.bias"))
    assert {"vision_tower.post_layernorm.bias", "model.vision_tower.vision_model.post_layernorm.bias"} <= names
    assert "lm_head.weight" in set(spellings("language_model.lm_head.weight"))
    assert "model.language_model.norm.weight" in set(spellings("language_model.model.norm.weight"))


def test_the_34b_model_that_sees_has_exactly_as_many_parameters() -> None:
    """Yi-34B with a longer table and head, CLIP-L/336 whole, two matrices between, and a row that ends lines."""
    sizes = {name: shape.numel() for name, shape in parameters(preset("llava-1.6-34b")).items()}
    tower = sum(n for name, n in sizes.items() if name.startswith("readers.vision.tower.encoder."))
    joins = sum(n for name, n in sizes.items() if name.startswith("readers.vision.tower.project."))
    assert tower == 303_507_456 and joins == 1024 * 7168 + 7168 + 7168 * 7168 + 7168
    assert sum(sizes.values()) == 34_388_917_248 + 2 * 64 * 7168 + tower + joins + 7168


def test_an_odd_file_is_named(tmp_path: Path) -> None:
    build("LLaVA-1.5", tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config | {"size": {"shortest_edge": 30}}))
    with pytest.raises(BadInput, match="pictures of 30 pixels for a tower of 24"):
        adopt(tmp_path, tmp_path / "ours")
