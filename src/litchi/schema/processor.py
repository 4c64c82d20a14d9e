"""The one place where modality is dispatched on the way in: samples to token sequences, by one walk over the parts.

A turn is `<|role|>` parts `<|end|>`; parts without a role stand bare. A picture is `<|image|>` and one span of
placeholders with codec rows over them. A picture to learn is two spans at the same positions: a noised copy that
nothing later reads, and then the clean copy, so that training sees exactly the context that serving has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from litchi.config import BadInput
from litchi.schema.arrays import IGNORE
from litchi.schema.protocol import Codec
from litchi.schema.sample import Action, Image, Part, Role, Sample, Text, Video
from litchi.schema.sequence import Modality, TokenSequence, Vectors, seen_from
from litchi.schema.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Discrete:
    """A space of named actions, each one control token."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Continuous:
    """A space of real vectors, normalised by the mean and deviation of the training data, padded to `channels`."""

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    channels: int
    chunk: int = 1
    """Actions in one chunk."""

    def normalise(self, values: np.ndarray) -> Tensor:
        scaled = (values - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return torch.from_numpy(np.pad(scaled, ((0, 0), (0, self.channels - scaled.shape[1]))).astype(np.float32))

    def restore(self, rows: Tensor) -> np.ndarray:
        scaled = rows[:, : len(self.mean)].float().numpy()
        return (scaled * np.array(self.deviation, np.float32) + np.array(self.mean, np.float32)).astype(np.float32)


Space = Discrete | Continuous


def action_token(space: str, index: int) -> str:
    return f"<|{space}:{index}|>"


@dataclass(slots=True)
class Builder:
    """A document that grows token by token and span by span."""

    tokens: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    spans: list[int] = field(default_factory=list)
    readable: list[bool] = field(default_factory=list)
    rows: dict[Modality, list[Vectors]] = field(default_factory=dict)
    time: int = 0
    span: int = 0

    def token(self, index: int, weight: float = 0.0) -> None:
        """Append one id; with `weight` the token before it learns to predict it."""
        if weight > 0 and self.labels:
            self.labels[-1], self.weights[-1] = index, weight
        self.place([index], [(self.time,) * 3], readable=True)
        self.time += 1

    def vectors(
        self, modality: Modality, rows: Tensor, times: Tensor, weight: float, places: Sequence, patch: int
    ) -> None:
        """Append one span of rows (n, C), readable if it is clean. Does not advance time: a clean copy may follow."""
        blocks = self.rows.setdefault(modality, [])
        place = torch.tensor([(sum(block.num_pictures for block in blocks), h, w) for h, w in places])
        index = torch.arange(len(self.tokens), len(self.tokens) + len(rows))
        blocks.append(Vectors(index, place, rows, times, torch.full((len(rows),), weight)))
        positions = [(self.time, self.time + h, self.time + w) for h, w in places]
        self.place([patch] * len(rows), positions, readable=weight == 0)

    def patches(self, rows: Tensor, place: Tensor, index: Tensor, steps: Tensor, patch: int) -> None:
        """Append patches (R, C) that are read one after another, like words; `index` says which token shows each.

        `place` numbers the tiles of this picture from 0, as `Vectors` has it; -1 ends a line. `steps` (n, 3) is how far
        each token's position is from where the picture begins; what follows stands beyond all of them.
        """
        blocks = self.rows.setdefault(Modality.VISION, [])
        pictures = sum(block.num_pictures for block in blocks)
        ones, start = torch.ones(len(rows)), len(self.tokens)
        blocks.append(Vectors(index, place, rows, ones, 0 * ones).shifted(start, pictures))
        for t, h, w in (steps + self.time).tolist():
            self.place([patch], [(t, h, w)], readable=True)
        self.time += int(steps.max()) + 1

    def place(self, tokens: list[int], positions: list[tuple[int, int, int]], *, readable: bool) -> None:
        count = len(tokens)
        self.tokens += tokens
        self.labels += [IGNORE] * count
        self.weights += [0.0] * count
        self.positions += positions
        self.spans += [self.span] * count
        self.readable += [readable] * count
        self.span += 1

    def fork(self) -> Builder:
        """A copy that may grow without the original."""
        columns = {
            name: list(getattr(self, name))
            for name in ("tokens", "labels", "weights", "positions", "spans", "readable")
        }
        rows = {modality: list(blocks) for modality, blocks in self.rows.items()}
        return Builder(**columns, rows=rows, time=self.time, span=self.span)

    def build(self) -> TokenSequence:
        return TokenSequence(
            tokens=torch.tensor(self.tokens),
            labels=torch.tensor(self.labels),
            weights=torch.tensor(self.weights),
            positions=torch.tensor(self.positions).view(-1, 3),
            spans=torch.tensor(self.spans),
            readable=torch.tensor(self.readable, dtype=torch.bool),
            vectors={modality: Vectors.join(blocks) for modality, blocks in self.rows.items()},
        )

    def vectors_in(self, start: int, stop: int) -> dict[Modality, Vectors]:
        """The rows that stand in [start, stop), and others of their pictures, which then stand nowhere."""
        found = {}
        for modality, blocks in self.rows.items():
            near = [v for v in blocks if int(v.index.max()) >= start and int(v.index[v.index >= 0].min()) < stop]
            v = Vectors.join(near) if near else None
            if v is not None and bool((inside := (v.index >= start) & (v.index < stop)).any()):
                v = seen_from(v, inside) if modality is Modality.VISION else v[inside]
                found[modality] = v.shifted(0, -v.first_picture)
        return found


@dataclass(frozen=True, slots=True)
class Noising:
    """How clean the noised copies are.

    The times of a share of them are 0 (nothing shown); of the rest uniform in [0, 1).
    Frames that an action determines are foreseen in one step, so most see nothing; pictures drawn from words are
    revealed digit by digit, so most see something.
    """

    blank_frames: float = 0.9
    blank_pictures: float = 0.1
    blank_actions: float = 0.0
    late: float = 0.0
    """How much more a digit of a picture weighs the fewer are hidden: the weight is divided by (1 - t) ** late.

    0 counts all hidden digits alike, so that an almost finished picture counts little; 1 counts all pictures alike, so
    that the last steps of drawing are learned as well as the first (the bound of MDLM, Sahoo et al. 2024).
    """

    def weight(self, time: float) -> float:
        """The factor of a digit's loss at a time; bounded, since a few digits that weigh very much are noise."""
        return max(1 - time, 0.05) ** -self.late


class Processor:
    """Samples to sequences and back. It travels with the weights: what training did, serving does."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        codec: Codec | None,
        spaces: dict[str, Space],
        noising: Noising,
        *,
        film: Codec | None = None,
        sight: Codec | None = None,
    ) -> None:
        """With `film`, frames of worlds and clips are coded by it, coarser than pictures in a conversation.

        With `sight`, pictures that a user shows are read through a vision tower as patches of it, not as codes.
        """
        self.tokenizer, self.codec, self.spaces, self.noising = tokenizer, codec, spaces, noising
        self.film, self.sight = film, sight

    # ---- the walk ----

    def encode(self, sample: Sample, rng: np.random.Generator) -> TokenSequence:
        """The document that training reads; `rng` draws how clean the noised copies are."""
        builder = Builder()
        self.extend(builder, sample.parts, rng, whole=True)
        return builder.build()

    def prompt(self, parts: Sequence[Part], tools: Sequence[str] = ()) -> Builder:
        """Everything clean, nothing learned: what serving continues. A last assistant turn is left open.

        `tools` are JSON objects for a chat template to show; raises BadInput where none does.
        """
        if tools:
            raise BadInput("this model was trained without tools: leave them out")
        builder = Builder()
        self.extend(builder, parts, None, whole=False)
        return builder

    def extend(self, builder: Builder, parts: Sequence[Part], rng: np.random.Generator | None, *, whole: bool) -> None:
        """Append parts. With an `rng` they are learned by their weights, otherwise only read."""
        learn = rng is not None
        for i, part in enumerate(parts):
            opens = i == 0 or parts[i - 1].role != part.role
            last = i + 1 == len(parts)
            closes = part.role is not Role.NONE and (last or parts[i + 1].role != part.role)
            if last and whole and drawn(part):
                closes = False  # a picture ends the turn by itself, and its noised copy is all that is needed
            if opens and part.role is not Role.NONE:
                builder.token(self.tokenizer.roles[part.role])
            self.part(builder, part, rng, followed=closes or not (last and whole))
            if closes and not (last and not whole and part.role is Role.ASSISTANT):
                builder.token(self.tokenizer.end, part.weight if learn and part.role is Role.ASSISTANT else 0.0)

    def open(self, builder: Builder, parts: Sequence[Part]) -> None:
        """Open an assistant's turn after the prompt of `parts`, unless they already stand in one."""
        if not parts or parts[-1].role is not Role.ASSISTANT:
            builder.token(self.tokenizer.roles[Role.ASSISTANT])

    def part(self, builder: Builder, part: Part, rng: np.random.Generator | None, *, followed: bool) -> None:
        weight = part.weight if rng is not None else 0.0
        match part:
            case Text():
                for index in self.tokenizer.encode(part.text):
                    builder.token(index, weight)
            case Image():
                frame = part.role in (Role.NONE, Role.WORLD)
                self.picture(builder, part.pixels, part.role, weight, rng, followed=followed, frame=frame)
            case Video():
                for i, frame in enumerate(part.frames):
                    keep = followed or i + 1 < len(part.frames)
                    self.picture(builder, frame, part.role, weight, rng, followed=keep, frame=True)
            case Action():
                self.action(builder, part, weight, rng, followed=followed)

    def picture(self, builder, pixels, role, weight: float, rng, *, followed: bool, frame: bool) -> None:
        modality, codec = self.codec_for(frame=frame, shown=role is Role.USER and weight == 0)
        if codec is None:
            raise BadInput("the sample has a picture, but the processor has no codec: give ProcessorConfig a codec")
        rows = codec.encode(pixels)
        blank = self.noising.blank_pictures if role is Role.ASSISTANT else self.noising.blank_frames
        builder.token(self.tokenizer.picture, weight if role is Role.ASSISTANT else 0.0)
        places = grid_places(pixels.shape[0] // codec.patch, pixels.shape[1] // codec.patch)
        time = draw_time(rng, blank)
        self.copies(builder, modality, rows, weight * self.noising.weight(time), time, places, followed=followed)

    def codec_for(self, *, frame: bool, shown: bool = False) -> tuple[Modality, Codec | None]:
        """How a picture is coded: a frame of a world, one that a user shows, or any other in a conversation."""
        if frame:
            return (Modality.VIDEO, self.film) if self.film is not None else (Modality.IMAGE, self.codec)
        return (Modality.VISION, self.sight) if shown and self.sight is not None else (Modality.IMAGE, self.codec)

    def action(self, builder: Builder, part: Action, weight: float, rng, *, followed: bool) -> None:
        match self.space(part.space):
            case Discrete():
                builder.token(self.action_id(part.space, int(part.values[0, 0])), weight)
            case Continuous() as space:
                rows = space.normalise(part.values)
                places = [(i, i) for i in range(len(rows))]
                time = draw_time(rng, self.noising.blank_actions)
                self.copies(builder, Modality.ACTION, rows, weight, time, places, followed=followed)

    def copies(self, builder, modality, rows: Tensor, weight: float, time: float, places, *, followed: bool) -> None:
        """The noised copy if there is something to learn, then the clean copy if anything may read it."""
        patch = self.tokenizer.patch
        if weight > 0:
            builder.vectors(modality, rows, torch.full((len(rows),), time), weight, places, patch)
        if weight == 0 or followed:
            builder.vectors(modality, rows, torch.ones(len(rows)), 0.0, places, patch)
        builder.time += len(rows) if modality is Modality.ACTION else 1

    # ---- and back ----

    def decode(self, sequence: TokenSequence) -> tuple[Part, ...]:
        """The parts that a sequence tells, in order; neighbouring texts of one role are joined, videos come as frames.

        A noised copy is skipped where its clean copy follows.
        """
        spans = {int(v.index[i]): (m, i) for m, v in sequence.vectors.items() for i in range(len(v.index))}
        tokens, actions = sequence.tokens.tolist(), self.actions_by_token()
        roles = {index: role for role, index in self.tokenizer.roles.items()}
        parts: list[Part] = []
        text: list[int] = []
        role, at = Role.NONE, 0
        while at < len(tokens):
            stop = at + 1
            found: Part | None = None
            if at in spans:
                while stop in spans and sequence.spans[stop] == sequence.spans[at]:
                    stop += 1
                found = self.span_part(sequence, spans[at][0], at, stop, role)
            elif tokens[at] in actions:
                space, index = actions[tokens[at]]
                found = replace(Action.discrete(index, space), role=role)
            plain = at not in spans and not self.is_control(tokens[at])
            if text and not plain:
                parts.append(Text(text=self.tokenizer.decode(text), role=role))
                text = []
            if plain:
                text.append(tokens[at])
            if found is not None:
                parts.append(found)
            role = Role.NONE if tokens[at] == self.tokenizer.end else roles.get(tokens[at], role)
            at = stop
        return (*parts, Text(text=self.tokenizer.decode(text), role=role)) if text else tuple(parts)

    def span_part(self, sequence: TokenSequence, modality: Modality, start: int, stop: int, role: Role) -> Part | None:
        """The picture or chunk in [start, stop); None for a noised copy whose clean copy comes next."""
        where = sequence.positions[start:stop]
        doubled = not bool(sequence.readable[start]) and torch.equal(sequence.positions[stop : 2 * stop - start], where)
        if doubled:
            return None
        v = sequence.vectors[modality]
        rows = v.value[(v.index >= start) & (v.index < stop)]
        if modality is Modality.ACTION:
            name, space = next((n, s) for n, s in self.spaces.items() if isinstance(s, Continuous))
            return Action(values=space.restore(rows), space=name, role=role)
        codec = {Modality.VISION: self.sight, Modality.VIDEO: self.film}.get(modality, self.codec)
        assert codec is not None
        height, width = (int(where[:, axis].max() - where[:, axis].min()) + 1 for axis in (1, 2))
        pixels = codec.decode(rows, height * codec.patch, width * codec.patch)
        return Image(pixels=pixels, role=role)

    @property
    def sees(self) -> bool:
        """Whether a user may show pictures."""
        return self.codec is not None or self.sight is not None

    @property
    def draws(self) -> bool:
        """Whether pictures can stand in an answer."""
        return self.codec is not None

    def is_control(self, index: int) -> bool:
        """Whether an id stands for no text: a role, an end, a picture, padding or an action."""
        return index in self.controls

    @cached_property
    def controls(self) -> frozenset[int]:
        t = self.tokenizer
        return frozenset({t.pad, t.end, t.picture, t.patch, *t.roles.values(), *self.actions_by_token()})

    @cached_property
    def unspeakable(self) -> Tensor:
        """Ids that no turn of words holds: controls, but for ends and for what opens a picture."""
        return torch.tensor(sorted(self.silent), dtype=torch.long)

    @cached_property
    def silent(self) -> frozenset[int]:
        """The same ids as a set."""
        return self.controls - self.tokenizer.ends - {self.tokenizer.picture}

    def actions_by_token(self) -> dict[int, tuple[str, int]]:
        """Which action of which space each action token is."""
        discrete = [name for name, space in self.spaces.items() if isinstance(space, Discrete)]
        return {token: (name, i) for name in discrete for i, token in enumerate(self.action_ids(name))}

    # ---- names ----

    def space(self, name: str) -> Space:
        if name not in self.spaces:
            known = ", ".join(self.spaces) or "none"
            raise BadInput(f"unknown action space {name!r}; this processor knows: {known}")
        return self.spaces[name]

    def action_id(self, space: str, index: int) -> int:
        return self.tokenizer.control(action_token(space, index))

    def action_ids(self, space: str) -> list[int]:
        """The control tokens of a discrete space, in order."""
        match self.space(space):
            case Discrete(names):
                return [self.action_id(space, i) for i in range(len(names))]
            case _:
                raise BadInput(f"the actions of {space!r} are continuous; they have no tokens")


def drawn(part: Part) -> bool:
    """Whether a part is a picture that the assistant learns to draw."""
    return isinstance(part, Image) and part.weight > 0 and part.role is Role.ASSISTANT


def draw_time(rng: np.random.Generator | None, blank: float) -> float:
    """The time of a noised copy: 0 with probability `blank`, otherwise uniform. Two draws whatever the outcome."""
    if rng is None:
        return 1.0
    shown, time = rng.random(2)
    return 0.0 if shown < blank else float(time)


def grid_places(rows: int, columns: int) -> list[tuple[int, int]]:
    """(h, w) of each patch in reading order, counted from the middle."""
    return [(i - rows // 2, j - columns // 2) for i in range(rows) for j in range(columns)]
