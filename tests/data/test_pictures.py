"""Questions about pictures are true, their splits share nothing, answers are balanced, and a seed decides it all."""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter, defaultdict
from io import BytesIO
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from litchi.config import BadInput
from litchi.data.boxes import OFFSETS, SIDE, Item, draw_boxes, random_loose, random_towers
from litchi.data.claims import claims
from litchi.data.emoji import (
    FORMS,
    OPTIONS,
    Emoji,
    colours,
    distances,
    emoji_samples,
    main_colour,
    read_emoji,
    split_of,
)
from litchi.data.nlvr import nlvr_samples
from litchi.data.questions import question_only_baseline
from litchi.data.ticket import Ticket
from litchi.eval.tasks.talk import talk
from litchi.schema.sample import Image, Role, Sample, Text
from tests.data.sentences import truth

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_emoji = pytest.mark.skipif(not (DATA / "emoji_google").exists(), reason="the emoji are not beside the checkout")
needs_nlvr = pytest.mark.skipif(not (DATA / "nlvr").exists(), reason="NLVR is not beside the checkout")

NUM_CLAIMS = 400


def is_one_turn(sample: Sample) -> bool:
    """Picture and question of the user, answer of the assistant, and only the answer is learned."""
    image, question, answer = sample.parts
    [turn] = sample.meta["turns"]
    assert isinstance(image, Image) and image.role is Role.USER and image.weight == 0
    assert image.pixels.dtype == np.uint8 and image.pixels.shape[2] == 3
    assert question == Text(text=turn["question"], role=Role.USER)
    assert answer == Text(text=turn["answer"], role=Role.ASSISTANT, weight=1.0)
    return True


def facts(samples: list[Sample]) -> list[tuple]:
    return [(s.key, s.parts[0].pixels.tobytes(), s.parts[1:], str(s.meta)) for s in samples]


# ---- emoji --------------------------------------------------------------------------------------------------------


def png(rgba: np.ndarray) -> bytes:
    buffer = BytesIO()
    Picture.fromarray(rgba).save(buffer, "PNG")
    return buffer.getvalue()


def entry(number: int, name: str, *, category: str = "Objects", subcategory: str = "tool", code: str = "") -> dict:
    code = code or f"1F{number:03X}"
    fields = {"name": name.upper(), "unified": code, "image": f"{number}.png", "short_names": [name]}
    return fields | {"short_name": name, "category": category, "subcategory": subcategory}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """120 emoji of noise in two categories, and some that are the same as another in one way each."""
    root, rng = tmp_path_factory.mktemp("emoji"), np.random.default_rng(0)
    kinds = ("Objects", "Food & Drink")
    words = ["".join(letters) for letters in list(permutations("abcde"))]
    entries = [entry(i, word, category=kinds[i % 2]) for i, word in enumerate(words)]
    entries += [entry(200, "mirrored"), entry(201, "abcde2"), entry(202, "man-plain", code="1F468-200D-1F001")]
    entries += [entry(203, "flag-xx", category="Flags"), entry(204, "one", subcategory="keycap")]
    shown = {e["image"]: rng.integers(0, 256, (8, 8, 4), dtype=np.uint8) for e in entries}
    shown["200.png"] = shown["0.png"][:, ::-1]
    (root / "emoji.json").write_text(json.dumps(entries))
    with zipfile.ZipFile(root / "images64.zip", "w") as archive:
        for name, rgba in shown.items():
            whole = rgba.repeat(8, 0).repeat(8, 1)
            whole[..., 3] = 255
            archive.writestr(f"64/{name}", png(whole))
    return root


@pytest.fixture(scope="module")
def emoji(folder: Path) -> list[Emoji]:
    return read_emoji(folder)


@pytest.fixture(scope="module")
def noto() -> list[Emoji]:
    return read_emoji(DATA / "emoji_google")


def test_what_is_trivially_the_same_shares_a_group(emoji: list[Emoji]) -> None:
    """By sight in a mirror, by name without its number, by code points without who is shown."""
    groups = {e.key: e.group for e in emoji}
    assert groups["mirrored"] == groups["abcde"] == groups["abcde2"]
    assert groups["man-plain"] == emoji[1].group == emoji[1].key
    assert len(set(groups.values())) == 120 and {"flag-xx", "one"}.isdisjoint(groups)
    assert {e.name for e in emoji if e.key == "abcde2"} == {"abcde"}


def test_a_choice_offers_the_truth_once_among_its_own_kind(emoji: list[Emoji]) -> None:
    by_name, by_key = {e.name: e for e in emoji}, {e.key: e for e in emoji}
    for split in ("train", "test"):
        samples = emoji_samples(emoji, "choice", split, rounds=3)
        for sample in samples:
            assert is_one_turn(sample)
            options, [turn] = sample.meta["options"], sample.meta["turns"]
            shown = by_key[sample.key.split("-0-", 1)[1].rpartition("-")[0]]
            assert shown.name == turn["answer"] and np.array_equal(sample.parts[0].pixels, shown.pixels)
            assert options.count(turn["answer"]) == 1 and all(name in turn["question"] for name in options)
            offered = [by_name[name] for name in options]
            assert len({e.group for e in offered}) == OPTIONS and len({e.category for e in offered}) == 1
            assert {split_of(e) for e in offered} == {split}
        places = Counter(s.meta["options"].index(s.meta["turns"][0]["answer"]) for s in samples)
        assert max(places.values()) - min(places.values()) <= 3  # one for each round


def test_emoji_of_one_seed_are_the_same_and_of_another_are_not(emoji: list[Emoji]) -> None:
    for form in FORMS:
        assert facts(emoji_samples(emoji, form, "train")) == facts(emoji_samples(emoji, form, "train"))
    assert {split_of(e, 0) == split_of(e, 1) for e in emoji} == {True, False}
    first, second = emoji_samples(emoji, "choice", "train", rounds=2)[:: len(emoji_samples(emoji, "choice", "train"))]
    assert first.meta["group"] == second.meta["group"] and first.meta["options"] != second.meta["options"]


@needs_emoji
def test_no_test_emoji_is_in_train(noto: list[Emoji]) -> None:
    """Neither its name nor its picture, nor one that is near it or its mirror image."""
    sides = {split: [e for e in noto if split_of(e) == split] for split in ("train", "test")}
    assert (len(noto), len(sides["train"]), len(sides["test"])) == COUNTS
    assert {e.name for e in sides["train"]}.isdisjoint(e.name for e in sides["test"])
    assert {e.group for e in sides["train"]}.isdisjoint(e.group for e in sides["test"])
    apart = distances([e.pixels for e in noto])
    is_test = np.array([split_of(e) == "test" for e in noto])
    assert apart[is_test][:, ~is_test].min() >= 10


COUNTS = (1584, 1303, 281)
MAJORITY = {"category": 0.256, "colour": 0.22}
"""What a guesser scores on the test who always says what was most often right in train."""


@needs_emoji
def test_the_majority_of_each_question_is_as_stated(noto: list[Emoji]) -> None:
    for form, stated in MAJORITY.items():
        train, test = (emoji_samples(noto, form, split) for split in ("train", "test"))
        commonest = Counter(s.meta["turns"][0]["answer"] for s in train).most_common(1)[0][0]
        right = [s.meta["turns"][0]["answer"] == commonest for s in test]
        assert np.mean(right) == pytest.approx(stated, abs=0.001)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((255, 0, 0), "red"),
        ((255, 140, 0), "orange"),
        ((120, 70, 20), "brown"),
        ((255, 230, 0), "yellow"),
        ((0, 160, 0), "green"),
        ((0, 90, 255), "blue"),
        ((140, 0, 220), "purple"),
        ((255, 150, 200), "pink"),
        ((0, 0, 0), "black"),
        ((128, 128, 128), "grey"),
        ((255, 255, 255), "white"),
    ],
)
def test_a_colour_is_called_as_people_call_it(rgb: tuple[int, int, int], name: str) -> None:
    assert colours(np.array([rgb], np.uint8)).tolist() == [name]
    picture = np.zeros((10, 10, 4), np.uint8)
    picture[:, :4] = (*rgb, 255)
    assert main_colour(picture) == name, "what is transparent has no colour"
    picture[:, 4:] = np.array([(255, 0, 0, 255), (0, 160, 0, 255), (0, 90, 255, 255)] * 2, np.uint8)
    assert main_colour(picture) is None or name in ("red", "green", "blue")


def test_emoji_that_cannot_be_read_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(BadInput, match=r"emoji\.json is missing"):
        read_emoji(tmp_path)
    (tmp_path / "emoji.json").write_text("{")
    with pytest.raises(BadInput, match="is no JSON"):
        read_emoji(tmp_path)
    (tmp_path / "emoji.json").write_bytes((folder / "emoji.json").read_bytes())
    (tmp_path / "images64.zip").write_text("no zip")
    with pytest.raises(BadInput, match=r"images64\.zip cannot be read"):
        read_emoji(tmp_path)
    few = [e for e in read_emoji(folder) if split_of(e) == "train"][:4]
    with pytest.raises(BadInput, match="fewer than 4 groups"):
        emoji_samples(few, "choice", "train")


# ---- sentences about boxes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said() -> list[Sample]:
    return [claims(Ticket("claims", "train", index)) for index in range(NUM_CLAIMS)]


def boxes_of(sample: Sample) -> tuple[tuple[Item, ...], ...]:
    return tuple(tuple(Item(*item) for item in box) for box in sample.meta["boxes"])


def test_every_sentence_is_as_true_as_it_says(said: list[Sample]) -> None:
    """Truth by a reader of the words that shares nothing with the generator."""
    for sample in said:
        assert is_one_turn(sample)
        [turn] = sample.meta["turns"]
        assert turn["question"] == f"{sample.meta['sentence']} True or false?"
        assert turn["answer"] == str(truth(sample.meta["sentence"], boxes_of(sample))).lower(), sample.meta


def test_a_sentence_says_nothing_about_its_truth(said: list[Sample]) -> None:
    """Four standard errors around one half, for all and for each kind; all eleven kinds are there."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for sample in said:
        [turn] = sample.meta["turns"]
        by_kind[turn["kind"]].append(turn["answer"] == "true")
    assert len(by_kind) == 11
    for kind, answers in [*by_kind.items(), ("all", sum(by_kind.values(), []))]:
        assert abs(np.mean(answers) - 0.5) < 2 / np.sqrt(len(answers)), kind
    guesses = question_only_baseline(said[200:], said[:200])
    assert np.mean(list(guesses.values())) < 0.5 + 2 / np.sqrt(200)


def test_the_picture_shows_the_boxes(said: list[Sample]) -> None:
    """Colours are read back in the middle of every item, and grey where nothing is."""
    rgb = {"yellow": (255, 255, 0), "black": (0, 0, 0), "blue": (0, 153, 255)}
    for sample in said[:100]:
        pixels = sample.parts[0].pixels
        assert pixels.shape == (100, 400, 3) and (pixels[:, 100:150] == 128).all() and (pixels[:, 250:300] == 128).all()
        for left, box in zip(OFFSETS, boxes_of(sample), strict=True):
            for item in box:
                middle = pixels[item.y + item.size // 2, left + item.x + item.size // 2]
                assert tuple(middle) == rgb[item.colour]
            area = sum(item.size**2 * {"square": 1, "circle": np.pi / 4, "triangle": 0.5}[item.shape] for item in box)
            plain = (pixels[:, left : left + SIDE] == 211).all(2).sum()
            assert SIDE**2 - area * 1.5 - 60 <= plain <= SIDE**2 - area * 0.8


def test_no_scene_of_the_test_is_in_train(said: list[Sample]) -> None:
    """Whatever the order of its boxes."""
    tests = [claims(Ticket("claims", "test", index)) for index in range(30)]
    scenes = [{str(sorted(s.meta["boxes"])) for s in samples} for samples in (said, tests)]
    assert scenes[0].isdisjoint(scenes[1])


def test_a_ticket_decides_the_sentence_and_the_picture() -> None:
    twice = [[claims(Ticket("claims", "train", index, seed)) for index in range(5)] for seed in (0, 0, 1)]
    assert facts(twice[0]) == facts(twice[1]) != facts(twice[2])


@pytest.mark.parametrize("random_scene", [random_towers, random_loose])
def test_items_stay_in_their_box_and_off_each_other(random_scene) -> None:
    rng = np.random.default_rng(0)
    for box in (box for _ in range(40) for box in random_scene(rng)):
        taken = np.zeros((SIDE, SIDE), int)
        for i in box:
            assert min(i.x, i.y) >= 0 and max(i.x, i.y) + i.size <= SIDE
            assert all(gap == 0 or gap >= 3 for gap in (i.x, SIDE - i.x - i.size)) or i.x == 40
            taken[i.y : i.y + i.size, i.x : i.x + i.size] += 1
        assert taken.max() <= 1 and 1 <= len(box) <= 7


# ---- NLVR ---------------------------------------------------------------------------------------------------------


def nlvr_folder(root: Path) -> Path:
    """One example that we draw ourselves, in NLVR's form."""
    item = {"x_loc": 5, "y_loc": 10, "size": 20, "type": "circle", "color": "#0099ff"}
    example = {"sentence": "There is a blue circle", "identifier": "7-2", "directory": "3", "label": "true"}
    (root / "dev.json").write_text(json.dumps(example | {"structured_rep": [[item], [], [item]]}) + "\n")
    circle = Item(5, 10, 20, "circle", "blue")
    with zipfile.ZipFile(root / "dev_images.zip", "w") as archive:
        for order, boxes in enumerate(permutations(((circle,), (), (circle,)))):
            rgb = draw_boxes(boxes)
            archive.writestr(
                f"dev/images/3/dev-7-2-{order}.png", png(np.dstack([rgb, np.full((100, 400), 255, np.uint8)]))
            )
    return root


def test_an_example_of_nlvr_is_read_with_the_orders_asked_for(tmp_path: Path) -> None:
    samples = list(nlvr_samples(nlvr_folder(tmp_path), "dev", (0, 3)))
    assert [s.key for s in samples] == ["nlvr-dev-7-2-0", "nlvr-dev-7-2-3"]
    assert all(map(is_one_turn, samples))
    assert samples[0].parts[1].text == "There is a blue circle. True or false?" and samples[0].parts[2].text == "true"
    assert np.array_equal(samples[0].parts[0].pixels, draw_boxes(boxes_of(samples[0])))
    assert samples[0].meta["directory"] == "3" and not np.array_equal(*(s.parts[0].pixels for s in samples))


def test_nlvr_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"dev\.json cannot be read"):
        list(nlvr_samples(tmp_path, "dev"))
    with pytest.raises(BadInput, match="orders 0 to 5"):
        list(nlvr_samples(nlvr_folder(tmp_path), "dev", (6,)))
    (tmp_path / "dev_images.zip").unlink()
    with pytest.raises(BadInput, match=r"dev_images\.zip cannot be read"):
        list(nlvr_samples(tmp_path, "dev"))
    (tmp_path / "dev.json").write_text('{"sentence": "x"}\n')
    with pytest.raises(BadInput, match="lacks one of directory, identifier"):
        list(nlvr_samples(tmp_path, "dev"))


@pytest.fixture(scope="module")
def dev() -> list[Sample]:
    return list(nlvr_samples(DATA / "nlvr", "dev"))


@needs_nlvr
def test_pictures_of_nlvr_are_drawn_as_ours(dev: list[Sample]) -> None:
    """From `structured_rep` alone: a pixel in a hundred at smooth edges may differ."""
    for sample in dev[:40]:
        apart = np.abs(draw_boxes(boxes_of(sample)).astype(int) - sample.parts[0].pixels)
        assert apart.max() <= 40 and (apart.max(2) > 8).mean() <= 0.01


@needs_nlvr
def test_sentences_of_nlvr_are_as_true_as_labelled(dev: list[Sample]) -> None:
    """Those that the reader of our sentences understands, with the words put as ours; people err now and then."""
    right = []
    for sample in dev:
        verdict = truth(as_ours(sample.meta["sentence"]), boxes_of(sample))
        if verdict is not None:
            right.append(str(verdict).lower() == sample.meta["turns"][0]["answer"])
    assert len(right) >= 60 and np.mean(right) >= 0.95, (len(right), np.mean(right))


def as_ours(sentence: str) -> str:
    """What NLVR's writers say in other words."""
    text = re.sub(r"\s+", " ", sentence.strip().rstrip(".").casefold())
    text = re.sub(r"there is (?:at ?least one|at ?least a|one) (tower|box)", r"there is a \1", text)
    text = re.sub(r"closely touching|touching", "touching", text).replace("touching the edge", "touching a wall")
    text = re.sub(r"not touching (?:any|the) edge", "not touching any wall", text).replace("color", "colour")
    text = re.sub(r"\b([1-7])\b", lambda m: "no one two three four five six seven".split()[int(m[1])], text)
    text = re.sub(r"\ban? (\w+ block) as the (top|base) of a tower", r"a tower with a \1 at the \2", text)
    return f"{text}."


@needs_nlvr
@pytest.mark.parametrize(("part", "number", "true"), [("dev", 989, 547), ("test", 990, 556)])
def test_the_majority_of_nlvr_is_as_stated(part: str, number: int, true: int) -> None:
    lines = (DATA / "nlvr" / f"{part}.json").read_text().splitlines()
    assert (len(lines), sum(json.loads(line)["label"] == "true" for line in lines)) == (number, true)


# ---- all ----------------------------------------------------------------------------------------------------------


def test_the_task_of_talk_asks_them_as_they_are(emoji: list[Emoji], said: list[Sample]) -> None:
    for samples in (emoji_samples(emoji, "choice", "test"), said[:20]):
        items = list(talk(samples, free_dialogues=0).items())
        assert [item.truth["answer"] for item in items] == [s.meta["turns"][0]["answer"] for s in samples]
