"""A step is judged before it is taken: what is not finite and what spikes is caught, what is merely hard is not."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from litchi.config import BadInput, from_json, to_json
from litchi.train.guard import GuardConfig, History, Judgement, check, judge

CONFIG = GuardConfig(warmup=20, window=50)


def lived(steps: int, config: GuardConfig = CONFIG, seed: int = 0) -> History:
    """The history of a run whose loss falls and whose figures are as noisy as those of small batches."""
    rng, history = np.random.default_rng(seed), History()
    for step in range(steps):
        loss, norm = 4 * math.exp(-step / 200) * rng.lognormal(0, 0.15), rng.lognormal(0, 0.4)
        judgement = judge(config, history, {"text": loss, "image": 2 * loss}, norm)
        assert judgement.sound, judgement.reason
        history = judgement.history
    return history


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_run_that_learns_is_left_alone(seed: int) -> None:
    lived(1000, seed=seed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_caught_from_the_first_step(value: float) -> None:
    assert "loss/text is" in judge(CONFIG, History(), {"text": value}, 1.0).reason
    assert "gradient norm is" in judge(CONFIG, History(), {"text": 1.0}, value).reason


def test_a_spike_of_one_modality_is_caught_and_named() -> None:
    history = lived(100)
    reason = judge(CONFIG, history, {"text": 4.0, "image": 300.0}, 1.0).reason
    assert reason.startswith("loss/image 300 is") and "text" not in reason
    assert judge(CONFIG, history, {"text": 4.0, "image": 8.0}, 1000.0).reason.startswith("gradient norm 1000 is")


def test_a_modality_seen_for_the_first_time_is_no_spike() -> None:
    assert judge(CONFIG, lived(100), {"action": 50.0}, 1.0).sound


def test_before_the_warm_up_nothing_is_a_spike() -> None:
    assert judge(CONFIG, lived(10), {"text": 300.0, "image": 300.0}, 1e6).sound


def test_bad_steps_do_not_make_bad_steps_usual() -> None:
    history = lived(100)
    for _ in range(60):
        judgement = judge(CONFIG, history, {"text": 300.0, "image": 300.0}, 1.0)
        assert not judgement.sound
        history = judgement.history
    assert history.values == lived(100).values and history.skipped == 60
    assert judge(CONFIG, history, {"text": 3.0, "image": 6.0}, 1.0).history.skipped == 0


def test_what_is_nearly_learned_may_jump() -> None:
    """From a run of ours: pictures at a loss of 0.002, and now and then a step at 0.022."""
    history = History()
    for _ in range(50):
        history = judge(CONFIG, history, {"image": 0.002}, 1.0).history
    assert judge(CONFIG, history, {"image": 0.022}, 1.0).sound
    assert judge(CONFIG, history, {"image": 0.0}, 0.0).sound
    assert judge(CONFIG, history, {"image": 1.0}, 1.0).reason == "loss/image 1 is 24 spreads above its usual 0.002"


def test_off_judges_nothing() -> None:
    assert judge(replace(CONFIG, policy="off"), History(), {"text": math.nan}, math.nan) == Judgement("", History())


def test_stop_ends_the_run_and_skip_goes_on_for_a_while() -> None:
    bad = judge(CONFIG, History(), {"text": math.nan}, 1.0)
    check(CONFIG, bad, 7)
    with pytest.raises(BadInput, match=r"step 7: loss/text is nan: replay it with .*--replay 7"):
        check(replace(CONFIG, policy="stop"), bad, 7)
    with pytest.raises(BadInput, match="and 10 steps before it were skipped"):
        check(CONFIG, Judgement("loss/text is nan", History(skipped=11)), 7)
    check(replace(CONFIG, policy="stop"), Judgement("", History()), 7)


@given(st.dictionaries(st.text(max_size=5), st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=5)))
def test_a_checkpoint_keeps_the_history_to_the_bit(values: dict[str, list[float]]) -> None:
    history = History(values, skipped=3)
    assert from_json(History, to_json(history)) == history
