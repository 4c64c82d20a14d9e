"""Every sample tells the truth about its picture, the balance is as published, and a ticket decides everything."""

import re
from collections import Counter

import numpy as np
import pytest

from litchi.data.describe import caption
from litchi.data.jobs import JOBS
from litchi.data.questions import question_only_baseline
from litchi.data.ticket import Ticket
from litchi.envs.minigrid import HELD_OUT, SPACE, Room
from litchi.envs.scene import Scene, Thing, read, satisfies
from litchi.eval.tasks.talk import concluded
from litchi.schema.sample import Action, Image, Role, Sample, Text, Video
from tests.data.truths import answer

NUM_TALKS = 700
TOLD = r"(the [a-z ]+) is at row (\d), column (\d)(?:, (\d) \+ (\d) = (\d+) steps)?"


def samples(source: str, number: int, split="train") -> list[Sample]:
    return [JOBS[source](Ticket(source, split, index)) for index in range(number)]


@pytest.fixture(scope="module")
def talks() -> list[Sample]:
    return samples("talk", NUM_TALKS)


def scene_of(sample: Sample) -> Scene:
    scene = read(next(part for part in sample.parts if isinstance(part, Image)).pixels)
    assert scene is not None
    return scene


def test_answers_are_right(talks: list[Sample]):
    for sample in talks:
        scene, before = scene_of(sample), []
        for turn in sample.meta["turns"]:
            assert turn["answer"] == answer(scene, turn["question"], before), (sample.key, turn, scene)
            before.append((turn["question"], turn["answer"]))


def test_a_dialogue_is_a_picture_and_turns_of_which_answers_are_learned(talks: list[Sample]):
    for sample in talks[:100]:
        image, *turns = sample.parts
        assert isinstance(image, Image) and image.role is Role.USER and image.weight == 0
        assert 5 <= len(turns) // 2 <= 7
        for question, reply, truth in zip(turns[::2], turns[1::2], sample.meta["turns"], strict=True):
            assert question == Text(text=truth["question"], role=Role.USER)
            assert (reply.role, reply.weight) == (Role.ASSISTANT, 1.0) and concluded(reply.text) == truth["answer"]


def test_replies_that_compare_think_aloud_and_think_right(talks: list[Sample]):
    """Every place, every number of steps and every side in a reply is true, and of the things that were asked about."""
    seen = 0
    for sample in talks:
        scene = scene_of(sample)
        cells = {f"the {t.name}": (t.row, t.column) for t in scene.things} | {"the agent": scene.agent[:2]}
        for part, turn in zip(sample.parts[2::2], sample.meta["turns"], strict=True):
            if part.text == turn["answer"]:
                continue
            told = re.findall(TOLD, part.text.lower())
            things = re.findall(r"the \w+ (?:ball|key|box)", turn["question"].lower())
            assert [name for name, *_ in told if name != "the agent"] == things
            for name, row, column, *sums in told:
                assert cells[name] == (int(row), int(column))
                if sums[0]:
                    rows, columns, total = map(int, sums)
                    assert (rows, columns) == tuple(abs(a - b) for a, b in zip(cells[name], scene.agent, strict=False))
                    assert total == rows + columns
            if turn["kind"] == "relation":
                assert re.search(r"It is (.*?)\.", part.text)[1] == sides(*(cells[name] for name in things))
            seen += 1
    assert seen > NUM_TALKS / 2


def sides(x: tuple[int, int], y: tuple[int, int]) -> str:
    """How the cell x lies from the cell y, said without the generator's words."""
    said = []
    if x[0] != y[0]:
        said.append("above" if x[0] < y[0] else "below")
    if x[1] != y[1]:
        said.append("to the left" if x[1] < y[1] else "to the right")
    return " and ".join(said)


def test_a_question_says_little_about_its_answer(talks: list[Sample]):
    """Chance and four standard errors of a few hundred questions; "nothing" is one answer among nineteen or more."""
    ceilings = {"relation": 0.6, "exists": 0.6, "nearest": 0.6, "facing": 0.34, "count": 0.3, "colour": 0.32}
    ceilings |= {"front": 0.36, "adjacent": 0.28, "where": 0.1}
    guesses = question_only_baseline(talks[200:], talks[:200])
    assert set(guesses) == {*ceilings, "follow-up"}
    for kind, ceiling in ceilings.items():
        assert guesses[kind] < ceiling, (kind, guesses[kind])


def test_the_guesser_answers_with_the_majority():
    def talk(*pairs):
        turns = [{"kind": "colour", "question": question, "answer": reply} for question, reply in pairs]
        return Sample((), key="", source="talk", meta={"turns": turns})

    train = [talk(("Key?", "red"), ("Key?", "red"), ("Key?", "blue"), ("Box?", "blue"), ("Box?", "blue"))]
    assert question_only_baseline(train, [talk(("Key?", "red"), ("Box?", "red"))]) == {"colour": 0.5}
    assert question_only_baseline(train, [talk(("Ball?", "blue"))]) == {"colour": 1.0}


def test_a_caption_lists_everything_in_reading_order():
    things = (Thing("ball", "red", 4, 2), Thing("key", "grey", 1, 6))
    scene = Scene(things, (3, 2, "up"), Thing("box", "blue", 0, 0))
    assert caption(scene) == (
        "The agent is at row 3, column 2, facing up. The agent carries a blue box. "
        "There is a grey key at row 1, column 6. There is a red ball at row 4, column 2."
    )


def test_captions_and_facts_rebuild_the_scene():
    for sample in samples("describe", 200):
        text = sample.parts[-1].text
        found = re.findall(r"a (\w+) (\w+) at row (\d), column (\d)", text)
        things = tuple(Thing(kind, colour, int(row), int(column)) for colour, kind, row, column in found)
        row, column, direction = re.match(r"The agent is at row (\d), column (\d), facing (\w+)\.", text).groups()
        hand = re.search(r"carries a (\w+) (\w+)\.", text)
        carried = Thing(hand[2], hand[1], 0, 0) if hand else None
        assert Scene(things, (int(row), int(column), direction), carried) == scene_of(sample)
        assert [[t.colour, t.kind, t.row, t.column] for t in scene_of(sample).things] == sample.meta["facts"]


def test_drawings_grant_their_wish_and_no_other_wish():
    drawn = samples("draw", 400)
    for sample, other in zip(drawn, drawn[1:], strict=False):
        assert satisfies(scene_of(sample), sample.meta["wanted"])
        if sample.meta["category"] == "layout":
            assert not satisfies(scene_of(other), sample.meta["wanted"])
    categories = Counter(sample.meta["category"] for sample in drawn)
    assert set(categories) == {"single", "two", "count", "colour", "position", "binding", "layout"}
    assert min(categories.values()) > 20


def test_a_plan_tells_the_picture_that_follows():
    for sample in samples("draw", 50):
        plan, picture = sample.parts[1:]
        assert plan == Text(text=caption(read(picture.pixels)), role=Role.ASSISTANT, weight=1.0)


def test_drawn_positions_follow_the_words():
    """Rows and columns of a layout, and the direction of a relation, are read back out of the prompt."""
    for sample in samples("draw", 300):
        text, scene = sample.parts[0].text, scene_of(sample)
        for colour, kind, row, column in re.findall(r"a (\w+) (\w+) at row (\d), column (\d)", text):
            assert scene.at(int(row), int(column)) == Thing(kind, colour, int(row), int(column))
        if found := re.search(r"a (\w+ \w+) (?:to the )?(left|right|above|below)(?: of)? a (\w+ \w+)", text):
            first, second = (next(t for t in scene.things if t.name == found[i]) for i in (1, 3))
            holds = {"left": first.column < second.column, "right": first.column > second.column}
            holds |= {"above": first.row < second.row, "below": first.row > second.row}
            assert holds[found[2]]


def test_a_rollout_is_what_the_simulator_does():
    """From an untouched level the actions alone give every frame again."""
    room = Room()
    for sample in samples("foresee", 8, "test"):
        seen = room.reset(sample.meta["world"])
        frames, actions = sample.parts[0::2], sample.parts[1::2]
        assert len(actions) == 20 and sample.meta["world"] >= HELD_OUT
        for frame, action in zip(frames, actions, strict=False):
            assert np.array_equal(frame.pixels, seen[0].pixels)
            seen = room.step(action)[0]
        assert np.array_equal(frames[-1].pixels, seen[0].pixels)


def test_what_is_learned_of_each_source():
    weights = {
        source: {(type(p).__name__, p.weight) for p in JOBS[source](Ticket(source, "train", 3)).parts}
        for source in ("foresee", "play", "act", "draw", "watch")
    }
    assert weights == {
        "foresee": {("Image", 0.0), ("Image", 1.0), ("Action", 0.0)},
        "play": {("Text", 0.0), ("Image", 0.0), ("Image", 1.0), ("Action", 1.0)},
        "act": {("Text", 0.0), ("Image", 0.0), ("Action", 1.0)},
        "draw": {("Text", 0.0), ("Text", 1.0), ("Image", 1.0)},
        "watch": {("Video", 0.0), ("Text", 0.0), ("Text", 1.0)},
    }


def test_demonstrations_succeed_and_end_with_their_action():
    for sample in samples("act", 20):
        assert sample.meta["success"] and isinstance(sample.parts[-1], Action)
        assert re.fullmatch("go to (a|the) red ball", sample.parts[0].text)
    assert all(sample.meta["success"] for sample in samples("play", 20))


def test_rollouts_touch_things():
    """Carrying, picking up and opening happen in a good share of the rollouts to learn from."""
    changes = Counter()
    for sample in samples("foresee", 120):
        scenes = [read(frame.pixels) for frame in sample.parts[0::2]]
        for before, after in zip(scenes, scenes[1:], strict=False):
            changes["touched"] += (before.things, before.carried) != (after.things, after.carried)
    assert changes["touched"] > 90


def test_a_clip_is_told_as_its_frames_show_it():
    turn = {("right", "down"), ("down", "left"), ("left", "up"), ("up", "right")}
    told = Counter()
    for sample in samples("watch", 150):
        video, _, reply = sample.parts
        assert isinstance(video, Video) and len(video.frames) == 8 and reply.text == ", ".join(sample.meta["answer"])
        scenes = [read(frame) for frame in video.frames]
        for before, after, phrase in zip(scenes[:-1], scenes[1:], reply.text.split(", "), strict=True):
            told[phrase] += 1
            moved, seen = before.agent[:2] != after.agent[:2], len(after.things) - len(before.things)
            match phrase:
                case "wait":
                    assert before == after
                case "move forward":
                    assert moved
                case "turn right" | "turn left":
                    assert ((before.agent[2], after.agent[2]) in turn) == (phrase == "turn right") and not moved
                case "pick up" | "drop":
                    assert seen == (1 if phrase == "drop" else -1) and before.carried != after.carried
                case "open":
                    assert seen == -1 and before.carried == after.carried
    assert set(told) == {"turn left", "turn right", "move forward", "pick up", "drop", "open", "wait"}
    assert min(told.values()) / told.total() > 0.025 and max(told.values()) / told.total() < 0.3


def test_the_splits_share_no_picture_and_no_world():
    for source in ("talk", "describe", "draw"):
        train, test = ({scene_of(s) for s in samples(source, 40, split)} for split in ("train", "test"))
        assert not train & test
    worlds = {split: {Ticket(s, split, i).world for s in JOBS for i in (0, 60_000)} for split in ("train", "test")}
    assert max(worlds["train"]) < HELD_OUT <= min(worlds["test"])


@pytest.mark.parametrize("source", JOBS)
def test_a_ticket_decides_everything(source: str):
    def said(sample: Sample) -> list:
        return [getattr(p, "text", None) or getattr(p, "pixels", getattr(p, "frames", None)) for p in sample.parts]

    ticket = Ticket(source, "train", 5)
    first = JOBS[source](ticket)
    JOBS[source](Ticket(source, "train", 6))
    again, other = JOBS[source](ticket), JOBS[source](Ticket(source, "train", 6))
    assert all(np.array_equal(a, b) for a, b in zip(said(first), said(again), strict=True))
    assert first.meta == again.meta and first.key == again.key != other.key
    assert all(part.space == SPACE for part in first.parts if isinstance(part, Action))
