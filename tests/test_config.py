"""Configuration comes back as it was written, and what is misspelt is refused with the mend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litchi.config import BadInput, from_json, override, to_json


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(Enum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True, slots=True)
class Circle:
    radius: float = 1.0


@dataclass(frozen=True, slots=True)
class Square:
    side: int
    corners: tuple[float, ...] = ()


Shape = Circle | Square


@dataclass(frozen=True, slots=True)
class Leaf:
    lr: float = 0.1
    steps: int = 3
    loud: bool = False
    name: str = ""
    colour: Colour = Colour.RED
    level: Level | None = None
    kind: Literal["a", "b", 3] = "a"
    pair: tuple[int, str] = (1, "x")
    folder: Path = Path("runs")
    number: int | float = 1
    word: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise BadInput("steps must not be negative")


@dataclass(frozen=True, slots=True)
class Tree:
    leaf: Leaf = Leaf()
    shape: Shape = Circle()
    spare: Shape | None = None
    only: Circle | None = None
    shapes: tuple[Shape, ...] = ()
    named: dict[str, Shape] = field(default_factory=dict)
    scale: dict[Colour, float] = field(default_factory=dict)
    counts: dict[int, list[int]] = field(default_factory=dict)
    many: tuple[Shape, ...] | None = None


finite = st.floats(allow_nan=False)
words = st.text(max_size=8)
shapes = st.builds(Circle, finite) | st.builds(Square, st.integers(), st.lists(finite, max_size=3).map(tuple))
leaves = st.builds(
    Leaf,
    lr=finite,
    steps=st.integers(min_value=0),
    loud=st.booleans(),
    name=words,
    colour=st.sampled_from(Colour),
    level=st.none() | st.sampled_from(Level),
    kind=st.sampled_from(["a", "b", 3]),
    pair=st.tuples(st.integers(), words),
    folder=words.map(Path),
    number=st.integers() | finite,
    word=st.none() | words,
)
trees = st.builds(
    Tree,
    leaf=leaves,
    shape=shapes,
    spare=st.none() | shapes,
    only=st.none() | st.builds(Circle, finite),
    shapes=st.lists(shapes, max_size=3).map(tuple),
    named=st.dictionaries(words, shapes, max_size=3),
    scale=st.dictionaries(st.sampled_from(Colour), finite),
    counts=st.dictionaries(st.integers(), st.lists(st.integers(), max_size=3), max_size=3),
    many=st.none() | st.lists(shapes, max_size=3).map(tuple),
)


@given(trees)
def test_json_round_trips(tree):
    again = from_json(Tree, to_json(tree))
    assert again == tree
    assert to_json(again) == to_json(tree)
    assert type(again.leaf.number) is type(tree.leaf.number)


def test_a_union_carries_the_name_of_its_class():
    assert '"type": "Square"' in to_json(Tree(shape=Square(2)))
    with pytest.raises(
        BadInput, match=r"Tree.shape.type: expected Circle or Square, found 'Sqare': did you mean 'Square'"
    ):
        from_json(Tree, '{"shape": {"type": "Sqare", "side": 2}}')


def test_an_unknown_key_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match=r"unknown key 'stepz' in Tree.leaf: did you mean 'steps'\?; it has: lr, steps"):
        from_json(Tree, '{"leaf": {"stepz": 3}}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "Tree: expected an object of Tree"),
        ('{"leaf": {"lr": "x"}}', "Tree.leaf.lr: expected float, found 'x'"),
        ('{"leaf": {"steps": 1.5}}', "Tree.leaf.steps: expected int"),
        ('{"leaf": {"steps": true}}', "Tree.leaf.steps: expected int"),
        ('{"leaf": {"steps": -1}}', "Tree.leaf: steps must not be negative"),
        ('{"leaf": {"loud": 1}}', "Tree.leaf.loud: expected bool"),
        ('{"leaf": {"colour": "green"}}', "Tree.leaf.colour: expected 'red' or 'blue'"),
        ('{"leaf": {"colour": ["red"]}}', "Tree.leaf.colour: expected 'red' or 'blue'"),
        ('{"leaf": {"kind": "c"}}', "Tree.leaf.kind"),
        ('{"leaf": {"pair": [1]}}', "Tree.leaf.pair: expected a list of 2"),
        ('{"shape": {"type": "Square"}}', "Tree.shape: side must be given"),
        ('{"counts": {"x": []}}', "Tree.counts: expected int, found 'x'"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(text, said):
    with pytest.raises(BadInput) as error:
        from_json(Tree, text)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "leaf"),
    [
        ("leaf.lr=1e-3", Leaf(lr=1e-3)),
        ("leaf.lr=2", Leaf(lr=2.0)),
        ("leaf.steps=1e3", Leaf(steps=1000)),
        ("leaf.loud=true", Leaf(loud=True)),
        ("leaf.loud=True", Leaf(loud=True)),
        ("leaf.name=12", Leaf(name="12")),
        ("leaf.name=a=b,c", Leaf(name="a=b,c")),
        ("leaf.name=true", Leaf(name="true")),
        ("leaf.colour=blue", Leaf(colour=Colour.BLUE)),
        ("leaf.level=2", Leaf(level=Level.HIGH)),
        ("leaf.level=none", Leaf(level=None)),
        ("leaf.kind=3", Leaf(kind=3)),
        ("leaf.pair=4,y", Leaf(pair=(4, "y"))),
        ("leaf.pair.0=4", Leaf(pair=(4, "x"))),
        ("leaf.folder=a/b", Leaf(folder=Path("a/b"))),
        ("leaf.number=0.5", Leaf(number=0.5)),
        ("leaf.word=hi", Leaf(word="hi")),
        ("leaf.word=null", Leaf(word=None)),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(setting, leaf):
    changed = override(Tree(), setting)
    assert changed == Tree(leaf=leaf)
    assert type(changed.leaf.number) is type(leaf.number)


def test_an_override_reaches_through_unions_lists_and_dicts():
    tree = Tree(shape=Square(2), shapes=(Circle(), Square(1)), named={"a": Circle()})
    assert override(tree, "shape.corners=1,2") == replace(tree, shape=Square(2, (1.0, 2.0)))
    assert override(tree, "shape.corners=") == tree
    assert override(tree, "shape=Circle") == replace(tree, shape=Circle())
    assert override(tree, 'shape={"type": "Square", "side": 7}') == replace(tree, shape=Square(7))
    assert override(tree, "spare=Circle") == replace(tree, spare=Circle())
    assert override(tree, "spare=none") == tree
    assert override(tree, "shapes.1.side=5") == replace(tree, shapes=(Circle(), Square(5)))
    assert override(tree, "named.a.radius=3") == replace(tree, named={"a": Circle(3.0)})
    assert override(tree, "scale.red=0.5") == replace(tree, scale={Colour.RED: 0.5})
    assert override(tree, "counts.3=1,2") == replace(tree, counts={3: [1, 2]})


@given(trees, st.integers(min_value=0))
def test_an_override_changes_nothing_else(tree, steps):
    assert override(tree, f"leaf.steps={steps}") == replace(tree, leaf=replace(tree.leaf, steps=steps))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("leaf.lr", "expected key=value"),
        ("=3", "expected key=value"),
        ("lr=3", "did you mean leaf.lr?"),
        ("leaf.stepz=3", "did you mean leaf.steps?"),
        ("leef.steps=3", "did you mean leaf.steps?"),
        ("leaf.steps.more=3", "leaf.steps is 3 and has no key 'more'"),
        ("leaf.steps=few", "leaf.steps: expected int, found 'few'"),
        ("leaf.steps=-1", "leaf: steps must not be negative"),
        ("shape=Square", "shape: side must be given"),
        ("shape=Cirle", "shape: expected Circle or Square, found 'Cirle'"),
        ("spare.radius=2", "spare is None and has no key 'radius'"),
        ("shapes.0.side=2", "shapes has 0 items and none at '0'"),
        ("named.b.radius=2", "unknown key 'b' at named"),
        ('leaf={"stepz": 1}', "did you mean 'steps'"),
    ],
)
def test_an_override_that_does_not_fit_names_the_mend(setting, said):
    with pytest.raises(BadInput) as error:
        override(Tree(), setting)
    assert said in str(error.value) and "\n" not in str(error.value)
