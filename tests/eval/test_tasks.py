"""Each ability scores what is known beforehand: the oracle 1, the copier exactly its baseline, silence 0."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest

from litchi.envs.minigrid import HELD_OUT, demonstrate
from litchi.envs.scene import read
from litchi.eval.item import Estimate, Row, Task, figures, measure, scored
from litchi.eval.tasks.act import act
from litchi.eval.tasks.describe import claims, describe, facts_of
from litchi.eval.tasks.describe import score as score_caption
from litchi.eval.tasks.draw import draw
from litchi.eval.tasks.foresee import foresee
from litchi.eval.tasks.name import name as name_task
from litchi.eval.tasks.talk import Majority, concluded, talk
from litchi.eval.tasks.watch import score as score_film
from litchi.eval.tasks.watch import watch
from litchi.schema.digest import digest, picture_pixels, picture_text
from litchi.schema.episode import Episode
from litchi.schema.protocol import Sampler
from litchi.schema.request import Request, SamplingParams
from litchi.schema.sample import Action, Role, Sample, Text
from tests.eval.samplers import Copier, Oracle, Quiet, samples

COUNTS = {"talk": 6, "describe": 8, "draw": 40, "foresee": 3, "watch": 8}
MAKE = {"talk": talk, "describe": describe, "draw": draw, "foresee": foresee, "watch": watch}


@cache
def test_samples(name: str) -> Sequence[Sample]:
    return samples(name, COUNTS[name])


test_samples.__test__ = False  # type: ignore[attr-defined]


def asked(task: Task, sampler: Sampler) -> list[Row]:
    """The rows of a task, through JSON as a file has them."""
    rows = [scored(task, item, item.ask(sampler)) for item in task.items()]
    return [Row(**json.loads(json.dumps(asdict(row)))) for row in rows]


def headline(task: Task, rows: Sequence[Row]) -> tuple[Estimate, Estimate]:
    [score], [baseline] = measure(task.headline.figure, rows), measure(task.headline.baseline, rows)
    return score, baseline


def named(task: Task, rows: Sequence[Row]) -> dict[str, float]:
    return {estimate.name: estimate.value for estimate in figures(task, rows)}


@pytest.mark.parametrize("name", MAKE)
def test_the_oracle_scores_one(name: str) -> None:
    task = MAKE[name](test_samples(name))
    score, baseline = headline(task, asked(task, Oracle(test_samples(name))))
    assert score.value == score.high == 1.0
    assert 0 < score.low < 1, "being right so far is no certainty"
    assert baseline.value < 1


@pytest.mark.parametrize("name", MAKE)
def test_silence_scores_nothing(name: str) -> None:
    task = MAKE[name](test_samples(name))
    assert headline(task, asked(task, Quiet()))[0].value == 0


@pytest.mark.parametrize("name", MAKE)
def test_questions_hold_no_answers(name: str) -> None:
    """What is asked does not depend on the last part, the one to be answered; and no two items share a key."""
    [sample, *_] = test_samples(name)
    last = sample.parts[-1]
    other = (
        replace(last, text="nothing") if isinstance(last, Text) else replace(last, pixels=np.zeros_like(last.pixels))
    )
    plain, changed = (MAKE[name]([s]).items() for s in (sample, replace(sample, parts=(*sample.parts[:-1], other))))
    pairs = [(a, b) for a, b in zip(plain, changed, strict=True) if a.part not in ("free", "drift")]
    assert all(a.digest == b.digest for a, b in pairs)
    assert len({a.key for a, _ in pairs}) == len(pairs)


# ---- talk ----


def test_talk_counts_questions_and_asks_after_the_true_history() -> None:
    heard: list[Request] = []

    class Listener(Quiet):
        def complete(self, request: Request):
            heard.append(request)
            return super().complete(request)

    found = test_samples("talk")
    task = talk(found, free_dialogues=0)
    rows = asked(task, Listener())
    assert headline(task, rows)[0].n == sum(len(sample.meta["turns"]) for sample in found)
    said = heard[len(found[0].meta["turns"]) - 1].parts
    assert [p.text for p in said[1:]] == [p.text for p in found[0].parts[1:-1]]


@pytest.mark.parametrize(
    ("reply", "comes_to"),
    [
        ("A red ball.", "a red ball"),
        ("The red ball is at row 1, column 2. The key is at row 3, column 2. So no.", "no"),
        ("So it seems", "so it seems"),
        ("Row 1. So yes. So no", "no"),
        ("", ""),
    ],
)
def test_what_counts_of_a_reply_is_what_it_comes_to(reply: str, comes_to: str) -> None:
    assert concluded(reply) == comes_to


def test_free_running_talk_goes_on_from_what_was_said() -> None:
    """One who answers all but the first question right, but only after the true history, loses every later turn."""
    found = test_samples("talk")[:1]
    oracle = Oracle(found)

    class Stumbler(Quiet):
        def complete(self, request: Request):
            try:
                answer = oracle.complete(request)
            except KeyError:
                return super().complete(request)
            first = sum(isinstance(part, Text) for part in request.parts) == 1
            return super().complete(request) if first else answer

    task = talk(found)
    rows = asked(task, Stumbler())
    turns = len(found[0].meta["turns"])
    assert headline(task, rows)[0].value == pytest.approx((turns - 1) / turns)
    assert named(task, rows)["free-running answers right"] == 0


def test_the_majority_falls_back_from_question_to_kind() -> None:
    turns = [{"kind": "colour", "question": "a?", "answer": "red"}] * 2 + [
        {"kind": "colour", "question": "b?", "answer": "blue"}
    ]
    majority = Majority.fit([Sample((), "k", "talk", {"turns": turns})])
    assert [majority.guess("colour", q) for q in ("a?", "b?", "c?")] == ["red", "blue", "red"]
    assert majority.guess("count", "c?") == "red"


# ---- describe ----


def test_captions_are_parsed_without_their_writer() -> None:
    for sample in samples("describe", 30):
        caption = sample.parts[-1]
        assert isinstance(caption, Text)
        assert sorted(filter(None, claims(caption.text))) == sorted(facts_of(sample))


def test_a_claim_made_twice_costs() -> None:
    truth = {"facts": ["thing red ball 1 2"], "other": []}
    once, twice = "There is a red ball at row 1, column 2.", " ".join(["There is a red ball at row 1, column 2."] * 2)
    assert score_caption("", truth, once)["overlap"] / score_caption("", truth, once)["size"] == 1
    assert score_caption("", truth, twice)["overlap"] / score_caption("", truth, twice)["size"] == 2 / 3


@pytest.mark.parametrize(
    "caption",
    ["", "red ball 1 2", "There is no red ball at row 1, column 2.", "There is a red ball at row 1, column 3."],
)
def test_what_is_not_claimed_does_not_count(caption: str) -> None:
    assert score_caption("", {"facts": ["thing red ball 1 2"], "other": []}, caption)["matched"] == 0


# ---- draw ----


def test_draw_averages_over_six_categories_and_keeps_layouts_apart() -> None:
    task = draw(test_samples("draw"))
    rows = asked(task, Oracle(test_samples("draw")))
    assert {row.kind for row in rows if row.part == ""} == {"single", "two", "count", "colour", "position", "binding"}
    for found in rows:
        if found.part == "" and found.kind != "count":
            found.score["right"] = 0.0
    assert headline(task, rows)[0].value == pytest.approx(1 / 6)
    assert named(task, rows)["layout"] == 1
    assert named(task, rows)["true pictures that satisfy their prompt"] == 1


def test_pictures_survive_the_record() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    again = picture_pixels(picture_text(pixels))
    assert np.array_equal(again, pixels) and again.flags.writeable, "torch warns of arrays it may not write to"


# ---- foresee ----


def test_copying_scores_exactly_the_copy_baseline() -> None:
    task = foresee(test_samples("foresee"))
    rows = asked(task, Copier())
    score, baseline = headline(task, rows)
    assert (score.value, score.n) == (baseline.value, 60)
    assert 0 < score.value < 1
    assert named(task, rows)["changed tiles right"] == 0
    # In a dream that copies, step k is right as long as the room looks as it did at the start.
    assert named(task, rows)["drift: exact up to step 20"] == 0


def test_the_simulator_never_drifts_and_feels_every_action() -> None:
    task = foresee(test_samples("foresee"))
    found = named(task, asked(task, Oracle([])))
    assert {value for name, value in found.items() if name.startswith("drift: step ")} == {1.0}
    assert found["drift: steps before divergence"] == 20
    assert found["action sensitivity"] == found["frames equal in every pixel"] == 1


def test_a_model_that_is_one_action_late_is_found_out() -> None:
    """It foresees what the action before would have done: right only where that makes no difference."""

    class Late(Oracle):
        def complete(self, request: Request):
            frame, _ = request.parts[-2:]
            return super().complete(Request(parts=(frame, Action.discrete(6, "minigrid")), want="frame"))

    task = foresee(test_samples("foresee"))
    rows = asked(task, Late([]))
    assert named(task, rows)["frames where something changed exact"] == 0


def test_a_dream_is_made_of_its_own_frames() -> None:
    """A copier's whole dream is the first frame."""
    task = foresee(test_samples("foresee")[:1])
    *_, dream = asked(task, Copier())
    assert dream.part == "drift"
    first = picture_text(next(part.pixels for part in test_samples("foresee")[0].parts))  # type: ignore[union-attr]
    assert dream.answer == [first] * 20


def test_context_frames_bound_what_is_shown() -> None:
    sizes = {}
    for frames in (1, 3, 0):
        heard: list[int] = []

        class Listener(Copier):
            def complete(self, request: Request, heard=heard):
                heard.append(len(request.parts))
                return super().complete(request)

        asked(foresee(test_samples("foresee")[:1], 0, frames), Listener())
        sizes[frames] = max(heard)
    assert sizes == {1: 2, 3: 6, 0: 40}


# ---- watch ----


def test_watch_scores_phrase_by_phrase() -> None:
    truth = {"answer": ["wait", "drop", "open"], "majority": "wait", "copy": ["wait", "wait", "open"]}
    found = score_film("", truth, " Wait, drop,  pick up.")
    assert (found["right"], found["hits"], found["majority_hits"], found["copy_hits"]) == (0, 2, 1, 2)
    assert score_film("", truth, "wait, drop, open")["right"] == 1
    assert score_film("", truth, "wait, drop, open, wait")["right"] == 0


# ---- act ----


def test_act_counts_what_the_environment_calls_success() -> None:
    def expert(seed: int) -> Episode:
        return demonstrate("BabyAI-GoToRedBall-v0", seed, "agent")

    def nothing(seed: int) -> Episode:
        return Episode((), task="", key=f"seed-{seed}")

    task = act(range(HELD_OUT, HELD_OUT + 4), expert, nothing)
    score, baseline = headline(task, asked(task, Quiet()))
    assert (score.value, score.n, baseline.value) == (1, 4, 0)
    [steps, idle, _] = figures(task, asked(task, Quiet()))
    assert steps.low <= steps.value <= steps.high and steps.value > 1
    assert (idle.low, idle.high) == (0, 0), "no share: Wilson would give it an end below 1"


# ---- receipts ----


def test_a_digest_knows_every_field_and_pixel() -> None:
    [sample, *_] = test_samples("foresee")
    request = Request(parts=sample.parts[:2], want="frame")
    changed = sample.parts[0].pixels.copy()  # type: ignore[union-attr]
    changed[0, 0, 0] ^= 1
    others = [
        Request(parts=sample.parts[:3], want="frame"),
        Request(parts=sample.parts[:2], want="frame", height=72),
        Request(parts=(type(sample.parts[0])(pixels=changed), sample.parts[1]), want="frame"),
    ]
    assert digest(request) == digest(Request(parts=sample.parts[:2], want="frame"))
    assert len({digest(request), *(digest(other) for other in others)}) == 4
    assert read(changed) == read(sample.parts[0].pixels)  # type: ignore[union-attr]


def test_a_name_counts_whole_and_a_guesser_is_scored_beside_it() -> None:
    sample = Sample((), "k", "s", {"turns": [{"kind": "category", "question": "?", "answer": "Food and drink"}]})
    task = name_task("emoji", [sample], lambda _: "objects", "always objects")
    [item] = task.items()
    assert item.truth == {"answer": "Food and drink", "guess": "objects"} and item.kind == "category"
    assert task.score("", item.truth, " food  and drink.") == {"n": 1.0, "right": 1.0, "guess_right": 0.0}
    assert task.score("", item.truth, "food")["right"] == 0.0


def test_a_digest_outlives_fields_that_came_later_until_they_say_something() -> None:
    """The value was computed before penalties, ids and tools could be asked for."""
    request = Request(parts=(Text(text="hi", role=Role.USER),), params=SamplingParams(seed=3, stop=("a",)))
    assert digest(request) == "bace6cf3a05619a3adafd9fb17769fb364e12f8bac7f5fd0b3ed6a3a7b938172"
    others = [replace(request, tokens=(1,)), replace(request, params=replace(request.params, min_p=0.1))]
    assert len({digest(request), *map(digest, others)}) == 3
