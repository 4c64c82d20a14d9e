"""No guess, right or wrong, changes a bit of any answer; those that are right save steps, those that are wrong stop."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Literal

import httpx
import pytest
import torch

from litchi.cli import find_checkpoint
from litchi.config import BadInput
from litchi.model import exact
from litchi.model.compiled import compiler
from litchi.model.generate import Generator, whole
from litchi.model.network import Model
from litchi.model.packing import Format
from litchi.model.program import Read
from litchi.model.weights import load
from litchi.schema.processor import Builder, Processor
from litchi.schema.request import Completion, Request, SamplingParams
from litchi.schema.sample import Image, Role, Text
from litchi.serve.draft import Draft, OwnPages, SharedPages
from litchi.serve.engine import Engine, runner_of
from litchi.serve.guess import Ask, Clock, Foreseen, Guess, Guesser, Luck, NGram, longer
from litchi.serve.loading import load_engine
from litchi.serve.run import ServeConfig
from litchi.serve.runner import Piece
from litchi.serve.scheduler import EngineConfig, Track
from tests.laws.documents import WORDS, model, processor
from tests.serve.test_engine import Alone, Answer, network, picture, play, same
from tests.serve.test_metrics import values

SCHEDULES = 15
needs_compiler = pytest.mark.skipif(not compiler(), reason="needs a C++ compiler")


class Prophet:
    """Knows the answers, and lies about a share of the tokens."""

    def __init__(self, told: dict[str, Completion], lies: float = 0.2, seed: int = 0) -> None:
        self.told, self.lies, self.rng = told, lies, random.Random(seed)
        self.asked: list[int] = []

    def guess(self, asks: Sequence[Ask]) -> list[list[Guess]]:
        self.asked += [ask.most for ask in asks]
        return [self.foretell(ask) for ask in asks]

    def foretell(self, ask: Ask) -> list[Guess]:
        program = ask.track.program
        said = len(ask.builder.tokens) - program.prompt_tokens - (program.request.want == "chat")
        tokens = self.told[key(program.request)].tokens[said : said + self.rng.randint(1, ask.most)]
        return [Guess(t if self.rng.random() >= self.lies else self.rng.randrange(300), 8) for t in tokens]

    def forget(self, track: Track) -> None: ...


def key(asked: Request) -> str:
    return repr(replace(asked, parts=())) + repr([str(x) for x in asked.parts])


def request(rng: random.Random) -> Request:
    """Words, with all that bends how they are chosen; beginnings are often shared."""
    words = " ".join(random.Random(rng.randrange(3)).choices(WORDS, k=rng.choice((3, 20, 50))))
    parts: list = [Text(text=words, role=Role.USER)]
    params = SamplingParams(
        max_tokens=rng.choice((1, 12, 40)),
        min_tokens=rng.choice((0, 0, 6)),
        temperature=rng.choice((0.0, 0.0, 1.0)),
        top_p=rng.choice((1.0, 0.9)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.3)),
        stop=rng.choice(((), (), ("e",))),
        ignore_eos=rng.random() < 0.5,
        seed=rng.randrange(5),
        logprobs=True,
        top_logprobs=3,
    )
    want: Literal["chat", "text"] = rng.choice(("chat", "text"))
    return Request(parts=tuple(parts), want=want, params=params)


def mixed(rng: random.Random) -> Request:
    """Some are about a picture, and some draw one."""
    asked = request(rng)
    if rng.random() < 0.4:
        asked = replace(asked, parts=(Image(pixels=picture(rng), role=Role.USER), *asked.parts), want="chat")
    return replace(asked, want="image", height=8, width=16) if rng.random() < 0.2 else asked


@lru_cache
def wide() -> tuple[Processor, Model]:
    p = processor()
    return p, model(p, wide=True)


class Free(Clock):
    """Takes no time, so that schedules come again."""

    def stop(self) -> None: ...


def guessing(engine: Engine, guesser: Guesser) -> Engine:
    engine.ahead.guesser = guesser
    if isinstance(guesser, Draft):
        guesser.step, guesser.share = Free(), 0.0
    return engine


def ask(engine: Engine, asked: Request) -> Completion:
    answer = Answer()
    engine.submit(asked, answer.take)
    while engine.step():
        pass
    assert answer.error is None
    return whole(answer.deltas)


def config_of(rng: random.Random, pages: Sequence[int], **more: object) -> EngineConfig:
    return EngineConfig(
        max_running=rng.choice((1, 6, 16, 16)),
        step_tokens=rng.choice((1, 5, 17, 64, 512)),
        page=rng.choice(pages),
        cache_tokens=rng.choice((192, 192, 192, 2048)),
        remember=rng.random() < 0.8,
        guess_tokens=rng.choice((1, 3, 8)),
        guess_rows=rng.choice((8, 32, 1000)),
        **more,
    )


class Tally:
    """What must have happened over all schedules, or the law has held over nothing."""

    def __init__(self) -> None:
        self.accepted: dict[str, int] = {}
        self.wrong: dict[str, int] = {}
        self.gave_way = self.recalled = 0

    def add(self, engine: Engine, name: str) -> None:
        load = engine.load()
        self.accepted[name] = self.accepted.get(name, 0) + load.accepted
        self.wrong[name] = self.wrong.get(name, 0) + load.guesses - load.accepted
        self.gave_way, self.recalled = self.gave_way + load.preempted, self.recalled + load.tokens_cached
        assert engine.pages.num_free == len(engine.pages.readers) - 1, "pages were lost"
        assert not engine.ahead.luck and not engine.ahead.kinds
        if isinstance(engine.ahead.guesser, OwnPages):
            pages = engine.ahead.guesser.pages
            assert not engine.ahead.guesser.lanes and pages.num_free == len(pages.readers) - 1

    def check(self) -> None:
        assert all(self.accepted.values()) and self.wrong["prophet"], (self.accepted, self.wrong)
        assert self.gave_way and self.recalled


def check_answers(engine: Engine, requests: list[Request], rng: random.Random, told: dict, hint: object) -> None:
    for asked, answer in zip(requests, play(engine, requests, rng), strict=True):
        assert answer.error is None, answer.error
        if answer.deltas and answer.deltas[-1].finish:
            done, expected = whole(answer.deltas), told[key(asked)]
            assert same(done, expected) and done.scored == expected.scored, (hint, engine.config, asked)


@needs_compiler
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_no_guess_changes_an_answer_of_the_native_path(weights: Format) -> None:
    """Over random schedules every answer equals, to the last bit of every log-probability, that of an oracle which
    never guesses, and reads each document alone and whole for every token."""
    p, net = wide()
    oracle, tally = Alone(net, p, weights), Tally()
    pool = [mixed(random.Random(f"{weights}{i}")) for i in range(24)]
    told = {key(asked): oracle.complete(asked) for asked in pool}
    names = ("prophet", "liar", "ngram", "other") + (("draft",) if weights != "int8" else ())
    for seed in range(SCHEDULES):
        rng = random.Random(f"{weights}{seed}")
        name = names[seed % len(names)]
        guess = "draft" if name == "draft" else "ngram"
        config = config_of(rng, (32, 64), path="native", weights=weights, guess=guess)
        engine = Engine(net, p, config)
        if name in ("prophet", "liar"):
            guessing(engine, Prophet(told, lies=0.2 if name == "prophet" else 0.7, seed=seed))
        if name == "other":
            guessing(engine, other(engine, seed=0 if seed % 2 else 1))
        if name == "draft":
            guessing(engine, engine.ahead.guesser)
        check_answers(engine, [rng.choice(pool) for _ in range(rng.randrange(8, 16))], rng, told, (seed, name))
        tally.add(engine, name)
    tally.check()


def other(engine: Engine, *, seed: int) -> OwnPages:
    """A draft with pages of its own, in a format of its own; with seed 0 it has the weights of the network."""
    net = model(wide()[0], wide=True, seed=seed)
    return OwnPages(runner_of(net, EngineConfig(path="native", weights="int8")), 0.0, engine.config, 12)


@pytest.mark.parametrize(("kind", "dtype"), [("mask", "bfloat16"), ("tower", "float32")])
def test_no_guess_changes_an_answer_of_the_torch_path(kind: str, dtype: Literal["float32", "bfloat16"]) -> None:
    p, net = network(kind)
    oracle = Generator(deepcopy(net), p, cached=False, dtype=getattr(torch, dtype))
    exact.apply(oracle.model)
    pool = [mixed(random.Random(f"{kind}{i}")) for i in range(10)]
    told = {key(asked): oracle.complete(asked) for asked in pool}
    tally = Tally()
    for seed in range(SCHEDULES // 2):
        rng = random.Random(f"{kind}{seed}")
        name = "ngram" if seed % 3 == 2 else "prophet"
        engine = Engine(net, p, config_of(rng, (8, 16, 64), path="torch", weights=dtype, guess="ngram"))
        if name == "prophet":
            guessing(engine, Prophet(told, seed=seed))
        check_answers(engine, [rng.choice(pool) for _ in range(rng.randrange(8, 16))], rng, told, (seed, name))
        tally.add(engine, name)
    tally.check()


ASKED = Request(
    parts=(Text(text=" ".join(WORDS * 2), role=Role.USER),),
    params=SamplingParams(max_tokens=60, temperature=1.0, seed=3, ignore_eos=True, logprobs=True),
)


def test_what_is_known_is_read_in_few_steps() -> None:
    """Sampled text too: a guess is right if it is what the program draws."""
    p, net = network("mask")
    plain = Engine(net, p, EngineConfig(path="torch", weights="float32", guess="none"))
    expected = ask(plain, ASKED)
    engine = Engine(net, p, EngineConfig(path="torch", weights="float32"))
    done = ask(guessing(engine, Prophet({key(ASKED): expected}, lies=0)), ASKED)
    load = engine.load()
    assert done == expected and load.accepted == load.guesses > 40
    assert load.steps == plain.num_steps - load.accepted


def test_what_keeps_being_wrong_is_given_up_and_changes_nothing() -> None:
    p, net = network("mask")
    expected = ask(Engine(net, p, EngineConfig(path="torch", guess="none")), ASKED)
    engine = Engine(net, p, EngineConfig(path="torch", page=8))
    lies = {key(ASKED): replace(expected, tokens=tuple(t + 1 if t < 300 else 40 for t in expected.tokens))}
    assert ask(guessing(engine, Prophet(lies, lies=0)), ASKED) == expected
    load = engine.load()
    assert load.guesses and not load.accepted
    ask(engine, ASKED)
    assert engine.load().guesses - load.guesses < load.guesses < 20


def test_only_what_was_said_is_remembered() -> None:
    """After wrong guesses a conversation goes on from remembered pages, answer included, to the same bits."""
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", page=8))
    expected = ask(Engine(net, p, EngineConfig(path="torch", guess="none", page=8)), ASKED)
    guessing(engine, Prophet({key(ASKED): expected}, lies=0.5))
    assert ask(engine, ASKED) == expected and engine.load().accepted and engine.load().guesses > engine.load().accepted
    engine.ahead.guesser = None
    for params in (ASKED.params, replace(ASKED.params, max_tokens=70)):
        again, before = replace(ASKED, params=params), engine.tokens_cached
        assert ask(engine, again) == ask(Engine(net, p, EngineConfig(path="torch", page=8, guess="none")), again)
        assert engine.tokens_cached > before
    built = p.prompt(ASKED.parts)
    p.open(built, ASKED.parts)
    longer_prompt = Request(parts=(), want="text", tokens=(*built.tokens, *expected.tokens), params=ASKED.params)
    before = engine.tokens_cached
    assert ask(engine, longer_prompt) == ask(
        Engine(net, p, EngineConfig(path="torch", page=8, guess="none")), longer_prompt
    )
    assert engine.tokens_cached - before > len(built.tokens) + len(expected.tokens) // 2, "the answer was remembered"


def test_nothing_is_guessed_where_many_run() -> None:
    p, net = network("mask")
    expected = ask(Engine(net, p, EngineConfig(path="torch", guess="none")), ASKED)
    for count, guessed in ((1, True), (6, False)):
        engine = Engine(net, p, EngineConfig(path="torch", guess_rows=6))
        guessing(engine, Prophet({key(ASKED): expected}, lies=0))
        most, run = [], engine.runner.run

        def watched(pieces, pages, run=run, most=most):
            if all(piece.scores for piece in pieces):
                most.append(sum(piece.stop - piece.start for piece in pieces))
            return run(pieces, pages)

        engine.runner.run = watched
        answers = [Answer() for _ in range(count)]
        for answer in answers:
            engine.submit(ASKED, answer.take)
        while engine.step():
            pass
        assert all(whole(answer.deltas) == expected for answer in answers)
        assert bool(engine.load().guesses) == guessed and max(n for n in most[1:]) <= 6


def test_no_guess_reaches_beyond_the_network_the_pages_or_the_answer() -> None:
    p, net = network("mask")
    expected = ask(Engine(net, p, EngineConfig(path="torch", guess="none")), ASKED)
    engine = Engine(net, p, EngineConfig(path="torch", page=8, guess_tokens=8))
    prophet = Prophet({key(ASKED): expected}, lies=0)
    ends, run = [], engine.runner.run
    engine.runner.run = lambda pieces, pages: ends.extend(piece.stop for piece in pieces) or run(pieces, pages)
    prompt = expected.prompt_tokens + 1
    short = replace(ASKED, params=replace(ASKED.params, max_tokens=20))
    prophet.told[key(short)] = expected
    ask(guessing(engine, prophet), short)
    assert max(ends) <= prompt + 19 and engine.load().accepted, "the last token of an answer is never read"
    bounded = deepcopy(net)
    bounded.config = replace(net.config, max_length=prompt + 30)
    engine = Engine(bounded, p, EngineConfig(path="torch", page=8))
    ends.clear()
    bounded_run = engine.runner.run
    engine.runner.run = lambda pieces, pages: ends.extend(piece.stop for piece in pieces) or bounded_run(pieces, pages)
    done = ask(guessing(engine, prophet), ASKED)
    assert done.finish == "length" and done.tokens == expected.tokens[: len(done.tokens)]
    assert max(ends) <= prompt + 30 and engine.load().accepted


def test_a_guesser_that_fails_is_left_and_nobody_is_hurt(caplog: pytest.LogCaptureFixture) -> None:
    p, net = network("mask")
    expected = ask(Engine(net, p, EngineConfig(path="torch", guess="none")), ASKED)
    engine = Engine(net, p, EngineConfig(path="torch", guess="ngram"))
    engine.ahead.guesser.guess = lambda asks: 1 / 0
    assert ask(engine, ASKED) == expected
    assert engine.ahead.guesser is None and "goes on without" in caplog.text


# ---- guessers -----------------------------------------------------------------------------------------------------


def asks_of(tokens: Sequence[int], most: int = 6) -> tuple[Ask, Builder]:
    builder = Builder()
    for token in tokens:
        builder.token(token)
    track = Track(None, None, None, None, wish=Read(builder, scores=True))
    luck = Luck()
    for _ in range(50):
        for kind in range(9):
            luck.learn(kind, right=True)
    return Ask(track, most, luck, 0.05, 1, 0.0), builder


def test_the_document_tells_what_followed_last_time() -> None:
    def guess(tokens: Sequence[int], most: int = 6) -> list[int]:
        ask, _ = asks_of(tokens, most)
        return [g.token for g in NGram().guess([ask])[0]]

    assert guess([1, 2, 3, 4, 5, 9, 1, 2, 3]) == [4, 5, 9, 1, 2, 3]
    assert guess([1, 2, 3, 4, 8, 1, 2, 3, 5, 8, 1, 2, 3], most=1) == [5], "the last time counts"
    assert guess([7, 2, 3, 4, 1, 2, 3], most=1) == [4], "two tokens are enough where three are new"
    assert guess([6, 6, 6]) == [6] * 6, "it goes on into itself"
    assert guess([1, 2, 1, 3, 4]) == [] and guess([1]) == [] and guess([5, 5]) == []


def test_an_index_that_grows_equals_one_that_is_new() -> None:
    rng = random.Random(0)
    tokens = [rng.randrange(3) for _ in range(200)]
    grown = NGram()
    ask, builder = asks_of(tokens[:1])
    for token in tokens[1:]:
        builder.token(token)
        fresh, _ = asks_of(builder.tokens)
        assert grown.guess([ask]) == NGram().guess([fresh])


def test_luck_is_learned_and_fades() -> None:
    every = Luck()
    luck = Luck(every)
    for _ in range(30):
        luck.learn(1, right=True)
        luck.learn(2, right=False)
    assert luck.chance(1) > 0.9 and luck.chance(2) < 0.1 and luck.chance(3) == 0.5
    assert Luck(every).chance(1) > 0.9, "the next document begins with what others taught"
    for _ in range(300):
        luck.rest(2)
    assert luck.chance(2) > 0.4, "what was given up is tried again"


def test_what_took_long_once_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = Clock(), [0.0]
    monkeypatch.setattr("litchi.serve.guess.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def take(seconds: float) -> float:
        clock.start()
        now[0] += seconds
        clock.stop()
        return clock.seconds

    assert take(50.0) == 0, "the first is cold"
    assert take(2.0) == 2.0 and take(40.0) == pytest.approx(2.1) and take(1.0) == 1.0
    for _ in range(400):
        clock.fade()
    assert clock.seconds < 0.5


def test_only_the_token_that_was_guessed_is_answered() -> None:
    document = Builder()
    for token in (5, 6, 7):
        document.token(token)
    piece = longer(Piece(document, 2, 3, [1], scores=1), [Guess(8, 0), Guess(9, 0), Guess(10, 0)])
    assert (piece.start, piece.stop, piece.scores) == (2, 6, 4) and document.tokens == [5, 6, 7]
    scores = torch.arange(8.0).view(4, 2)
    seen = Foreseen(document, piece.builder, scores)
    document.token(8)
    assert seen.next(Read(document, scores=True)).equal(scores[1]) and seen.right == 1
    stale = Foreseen(document.fork(), piece.builder, scores, right=1)
    assert stale.next(Read(document, scores=True)) is None, "another document"
    document.time += 1
    document.token(9)
    assert seen.next(Read(document, scores=True)) is None and seen.wrong, "the same token at another place"
    document.token(10)
    assert seen.next(Read(document, scores=True)) is None and seen.right == 1, "what is wrong once stays so"


@needs_compiler
def test_the_same_weights_in_fewer_bits_guess_well_and_leave_no_trace() -> None:
    """They write to the pages of the network, where it then writes itself: what is remembered is its own."""
    p, net = wide()
    asked = replace(ASKED, params=replace(ASKED.params, temperature=0.0))
    plain = Engine(net, p, EngineConfig(path="native", guess="none"))
    expected = ask(plain, asked)
    engine = Engine(net, p, EngineConfig(path="native", page=32, guess="draft", guess_rows=1000))
    assert isinstance(engine.ahead.guesser, SharedPages)
    guessing(engine, engine.ahead.guesser)
    assert ask(engine, asked) == expected and engine.load().accepted > engine.load().guesses / 2 > 5
    before = engine.tokens_cached
    assert ask(engine, asked) == expected and engine.tokens_cached > before


@needs_compiler
def test_a_draft_with_pages_of_its_own_catches_up_and_remembers() -> None:
    p, net = wide()
    asked = replace(ASKED, params=replace(ASKED.params, temperature=0.0, max_tokens=40))
    plain = Engine(net, p, EngineConfig(path="native", guess="none"))
    expected = ask(plain, asked)
    engine = Engine(net, p, EngineConfig(path="native", page=32, step_tokens=16, guess_rows=1000))
    draft = OwnPages(plain.runner, 0.0, engine.config, 12)
    read, run = [], draft.runner.run
    draft.runner.run = lambda pieces, pages: read.append(max(p.stop - p.start for p in pieces)) or run(pieces, pages)
    guessing(engine, draft)
    assert ask(engine, asked) == expected
    load = engine.load()
    assert load.accepted == load.guesses > 20, "it is the network itself"
    assert max(read) == 16, "it catches up in pieces"
    read.clear()
    assert ask(engine, asked) == expected and max(read) < 16, "and has remembered what begins alike"


@needs_compiler
def test_a_draft_forgets_what_it_guessed_wrongly() -> None:
    """One that is the network itself guesses the likeliest token, whatever it guessed before."""
    p, net = wide()
    asked = replace(ASKED, params=replace(ASKED.params, top_logprobs=1, top_k=4))
    plain = Engine(net, p, EngineConfig(path="native", guess="none"))
    expected = ask(plain, asked)
    engine = Engine(net, p, EngineConfig(path="native", page=32, guess_rows=1000))
    draft = OwnPages(plain.runner, 0.0, engine.config, 12)
    made: dict[int, int] = {}
    guess = draft.guess

    def watched(asks: Sequence[Ask]) -> list[list[Guess]]:
        found = guess(asks)
        made.update(
            {len(a.builder.tokens): guesses[0].token for a, guesses in zip(asks, found, strict=True) if guesses}
        )
        return found

    draft.guess = watched
    assert ask(guessing(engine, draft), asked) == expected and engine.load().accepted < engine.load().guesses
    start = expected.prompt_tokens + 1
    assert len(made) > 10
    assert made == {at: expected.scored[at - start].top[0].token for at in made}


@needs_compiler
@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"path": "torch"}, "cannot guess here"),
        ({"path": "native", "weights": "int4"}, "cannot guess here"),
        ({"path": "native", "draft": "int5"}, "no format"),
    ],
)
def test_a_draft_that_cannot_guess_is_refused(settings: dict, fault: str) -> None:
    p, net = wide()
    with pytest.raises(BadInput, match=fault):
        Engine(net, p, EngineConfig(guess="draft", **settings))


def test_the_door_tells_how_many_guesses_came_true(served_by) -> None:
    p, net = network("mask")
    engine = Engine(net, p, EngineConfig(path="torch", guess="ngram"))
    said = {"messages": [{"role": "user", "content": "one two three"}], "max_tokens": 40, "ignore_eos": True}
    with served_by(engine, side=8) as served, httpx.Client(base_url=served.url, timeout=20) as client:
        assert client.post("/v1/chat/completions", json=said).status_code == 200
        # A step is counted after its last word is told, and before the next step, here of one that needs no guesses.
        assert client.post("/v1/chat/completions", json=said | {"max_tokens": 1}).status_code == 200
        told = values(client.get("/metrics").text)
    assert told["litchi_engine_guesses"] >= told["litchi_engine_accepted"] > 0
    assert told["litchi_engine_accepted"] == engine.load().accepted


def test_a_checkpoint_drafts_for_another() -> None:
    """The tiny checkpoint for itself, and none with another tokenizer."""
    config = EngineConfig(guess="draft", draft=str(find_checkpoint("tiny")), path="torch", guess_rows=1000)
    engine = load_engine(find_checkpoint("tiny"), ServeConfig(engine=config))
    guessing(engine, engine.ahead.guesser)
    params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=True)
    asked = Request(parts=(Text(text="where is the red ball", role=Role.NONE),), want="text", params=params)
    plain = load_engine(find_checkpoint("tiny"), ServeConfig(engine=replace(config, guess="none")))
    assert ask(engine, asked) == ask(plain, asked) and engine.load().accepted > 5
    p, net = network("mask")
    with pytest.raises(BadInput, match="another tokenizer"):
        Engine(net, p, config, draft=load(find_checkpoint("tiny")))
