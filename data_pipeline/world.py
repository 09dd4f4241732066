"""The demo's rendered world, without its pixels: what is in every clip, who sees it, and what is said of it.

A rendered world is a synthetic test of the software, not a benchmark. A clip is one object (in a fifth of
the clips two) of 6 shapes, 8 colours and 2 sizes with one of 12 motions: 1152 combinations. Training never
shows about a third of them, though it shows every value and every pair (shape, motion) and (colour, shape).
At least half of the validation and of the test clips are such unseen combinations, and no two clips of
either split mean the same. Everything is a pure function of (seed, split, index): nothing here reads a clock,
a file, or a random state. Lengths are in units of 1/64 of the canvas's short side; y points down.
"""

import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from pydantic import Field

from configs.loader import Frozen
from data_pipeline.world_captions import (
    BACKGROUND_WORDS,
    MOTION_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    Combination,
    clip_captions,
    pick,
    picture_caption,
    shuffled,
)

WORLD_VERSION = "1"  # every number measured in this world names it: raise it with any change to what is rendered
DISCLAIMER = "This is a rendered world: a synthetic test of the software, not a benchmark."

Split = Literal["train", "val", "test", "images"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "images")

SHAPES = tuple(SHAPE_WORDS)
COLOURS = {
    "red": (214, 32, 36),
    "yellow": (246, 222, 40),
    "green": (30, 160, 48),
    "cyan": (40, 214, 226),
    "blue": (32, 64, 226),
    "purple": (150, 44, 190),
    "white": (246, 246, 246),
    "black": (14, 14, 16),
}
SIZES = {"small": 7.5, "large": 13.0}  # mean radius over the clip
MOTIONS = tuple(MOTION_WORDS)
COMBINATIONS = tuple(Combination(*values) for values in itertools.product(SHAPES, COLOURS, SIZE_WORDS, MOTIONS))
HELD_OUT_SHARE = 0.3
CAPTIONS_A_CLIP: dict[Split, int] = {"train": 3, "val": 1, "test": 1, "images": 1}
FRAMES = (16, 32)  # fewest and most in a clip
# (width, height, frames a second): clips of one camera can share one ffmpeg process
CAMERAS = tuple(
    (width, height, Fraction(rate))
    for width, height, rate in (
        (64, 64, "8"), (64, 64, "25"), (80, 64, "10"), (80, 64, "30"), (64, 64, "12.5"), (96, 64, "24"),
        (64, 80, "15"), (64, 96, "25"), (64, 80, "12.5"), (96, 72, "30"), (72, 96, "24"), (112, 84, "25"),
    )
)  # fmt: skip


class WorldConfig(Frozen):
    """How much of which world: with WORLD_VERSION, all that its clips depend on."""

    seed: int = 0
    train: int = Field(6000, ge=0)
    val: int = Field(400, ge=0)
    test: int = Field(400, ge=0)
    images: int = Field(1500, ge=0)
    two_objects: float = Field(0.2, ge=0, le=1)

    def count(self, split: Split) -> int:
        """How many clips (or pictures) a split holds."""
        return {"train": self.train, "val": self.val, "test": self.test, "images": self.images}[split]


@dataclass(frozen=True, slots=True)
class ObjectSpec:
    """One object and its way through the clip; `travel`, `phase` and `turns` mean what its motion makes of them."""

    what: Combination
    rgb: tuple[int, int, int]
    radius: float  # mean, in units
    angle: float  # radians at the start
    x: float  # start, or centre of the circle, in units from the left of the central square
    y: float  # likewise from the top; for bouncing the lowest point
    travel: float  # units for translations, circles and bounces; share of the radius for growing and shrinking
    phase: float  # of a cycle, in [0, 1)
    turns: float  # cycles over the clip, signed for spinning


@dataclass(frozen=True, slots=True)
class BackgroundSpec:
    """A texture of two muted colours."""

    kind: str
    dark: tuple[int, int, int]
    light: tuple[int, int, int]
    angle: float  # radians
    period: float  # units
    phase: float  # of a period
    noise: tuple[float, ...]  # 5 x 5 lattice of values in [0, 1)


@dataclass(frozen=True, slots=True)
class ClipSpec:
    """All that a clip shows and all that is said of it; `objects` lie one over the other, the last on top."""

    split: Split
    index: int
    width: int
    height: int
    rate: Fraction  # frames a second
    frames: int
    background: BackgroundSpec
    objects: tuple[ObjectSpec, ...]
    captions: tuple[str, ...]
    seen: bool  # every object's combination was shown in training

    @property
    def name(self) -> str:
        """The media file's name."""
        return f"{self.split}-{self.index:06d}.{'png' if self.split == 'images' else 'mp4'}"


@functools.lru_cache(maxsize=16)
def held_out(seed: int) -> frozenset[Combination]:
    """The combinations that training never shows: 30 %, at most half of any (shape, motion) or (colour, shape)."""
    kept_out: set[Combination] = set()
    counts: dict[tuple[str, str, str], int] = {}
    limits = {"motion": len(COLOURS) * len(SIZES) // 2, "colour": len(SIZES) * len(MOTIONS) // 2}
    for candidate in shuffled(_draws(seed, "held out"), COMBINATIONS):
        groups = {("motion", candidate.shape, candidate.motion), ("colour", candidate.shape, candidate.colour)}
        if all(counts.get(group, 0) < limits[group[0]] for group in groups):
            kept_out.add(candidate)
            counts |= {group: counts.get(group, 0) + 1 for group in groups}
        if len(kept_out) >= HELD_OUT_SHARE * len(COMBINATIONS):
            break
    return frozenset(kept_out)


def clip_specs(config: WorldConfig, split: Split) -> list[ClipSpec]:
    """Every clip of a split in order; a longer split begins with the clips of a shorter one."""
    shown = frozenset(itertools.chain.from_iterable(_train_meanings(config))) if split in ("val", "test") else None
    specs = []
    for index, meaning in enumerate(_meanings(config, split)):
        seen = shown is None or all(what in shown for what in meaning)
        specs.append(_clip(config.seed, split, index, meaning, seen))
    return specs


Meaning = tuple[Combination, ...]


def _draws(*parts: object) -> random.Random:
    """A stream of its own for every purpose, equal on every machine."""
    return random.Random("/".join(str(part) for part in ("world", WORLD_VERSION, *parts)))


def _meanings(config: WorldConfig, split: Split) -> Iterator[Meaning]:
    if split == "train":
        return _train_meanings(config)
    if split == "images":
        return _picture_meanings(config)
    return _unique_meanings(config, split)


def _has_two(config: WorldConfig, index: int) -> bool:
    """Two-object clips come evenly among the others."""
    return math.floor((index + 1) * config.two_objects) > math.floor(index * config.two_objects)


def _train_meanings(config: WorldConfig) -> Iterator[Meaning]:
    """The allowed combinations in shuffled rounds, so that each is shown about equally often."""
    allowed = [what for what in COMBINATIONS if what not in held_out(config.seed)]
    yield from _rounds(config, "train", allowed)


def _picture_meanings(config: WorldConfig) -> Iterator[Meaning]:
    yield from _rounds(config, "images", [what for what in COMBINATIONS if what.motion == "still"])


def _rounds(config: WorldConfig, split: Split, pool: list[Combination]) -> Iterator[Meaning]:
    deck: list[Combination] = []
    for index in range(config.count(split)):
        turn, place = divmod(index, len(pool))
        if place == 0:
            deck = shuffled(_draws(config.seed, split, "round", turn), pool)
        if _has_two(config, index):
            yield deck[place], _second(_draws(config.seed, split, index, "second"), deck[place], pool)
        else:
            yield (deck[place],)


def _second(draws: random.Random, first: Combination, pool: list[Combination]) -> Combination:
    """An object that cannot be mistaken for the first, and not large beside a large one."""
    while True:
        other = pick(draws, pool)
        differs = other.shape != first.shape and other.colour != first.colour
        if differs and not other.size == first.size == "large":
            return other


def _unique_meanings(config: WorldConfig, split: Split) -> Iterator[Meaning]:
    """Unseen and seen combinations in turn, no meaning twice; validation draws from the other end of both pools.

    Where one-object combinations run out, two-object clips take their place.
    """
    hidden = held_out(config.seed)
    order = shuffled(_draws(config.seed, "evaluation"), COMBINATIONS)
    order = order if split == "test" else order[::-1]
    unseen, known = [what for what in order if what in hidden], [what for what in order if what not in hidden]
    waiting = {True: iter(unseen), False: iter(known)}
    used: set[frozenset[Combination]] = set()
    for index in range(config.count(split)):
        is_unseen = index % 2 == 0
        alone = None if _has_two(config, index) else next(waiting[is_unseen], None)
        if alone is not None:
            yield (alone,)
            continue
        draws = _draws(config.seed, split, index, "pair")
        while True:
            first = pick(draws, unseen if is_unseen else known)
            pair = (first, _second(draws, first, order if is_unseen else known))
            if frozenset(pair) not in used:
                break
        used.add(frozenset(pair))
        yield pair


def _clip(seed: int, split: Split, index: int, meaning: Meaning, seen: bool) -> ClipSpec:
    draws = _draws(seed, split, index)
    width, height, rate = pick(draws, CAMERAS)
    frames = 1 if split == "images" else FRAMES[0] + int(draws.random() * (FRAMES[1] - FRAMES[0] + 1))
    background = _background(draws)
    objects = _apart(draws, meaning)
    words = _draws(seed, split, index, "captions")
    if split == "images":
        captions: tuple[str, ...] = (picture_caption(words, meaning, background.kind),)
    else:
        captions = clip_captions(words, meaning, CAPTIONS_A_CLIP[split])
    return ClipSpec(split, index, width, height, rate, frames, background, objects, captions, seen)


def _between(draws: random.Random, low: float, high: float) -> float:
    return low + (high - low) * draws.random()


def _background(draws: random.Random) -> BackgroundSpec:
    kind = pick(draws, tuple(BACKGROUND_WORDS))
    tint = [_between(draws, -10, 10) for _ in range(3)]
    middle, contrast = _between(draws, 105, 150), _between(draws, 7, 16)
    dark, light = ([round(middle + sign * contrast + t) for t in tint] for sign in (-1, 1))
    angle, period, phase = _between(draws, 0, math.pi), _between(draws, 12, 24), draws.random()
    lattice = tuple(draws.random() for _ in range(25))
    return BackgroundSpec(
        kind, (dark[0], dark[1], dark[2]), (light[0], light[1], light[2]), angle, period, phase, lattice
    )


def _apart(draws: random.Random, meaning: Meaning) -> tuple[ObjectSpec, ...]:
    """The objects of a clip; two of them take, of eight drawn ways, the one on which they overlap least."""
    if len(meaning) == 1:
        return (_object(draws, meaning[0]),)
    ways = [tuple(_object(draws, what) for what in meaning) for _ in range(8)]
    return min(ways, key=lambda pair: _overlap(*pair))


def _overlap(one: ObjectSpec, other: ObjectSpec) -> float:
    """Mean depth, in units, by which two objects reach into one another over the clip."""
    moments = [moment / 8 for moment in range(9)]
    depths = []
    for (x, y, r, _, _), (x2, y2, r2, _, _) in ((pose(one, u), pose(other, u)) for u in moments):
        depths.append(max(0.0, r + r2 + 1 - math.hypot(x - x2, y - y2)))
    return sum(depths) / len(depths)


def _object(draws: random.Random, what: Combination) -> ObjectSpec:
    """Where and how an object moves: always visible over eight even frames, never out of the central square by much."""
    radius = SIZES[what.size] * _between(draws, 0.92, 1.08)
    rgb = tuple(min(255, max(0, round(level + _between(draws, -10, 10)))) for level in COLOURS[what.colour])
    angle, phase = _between(draws, 0, 2 * math.pi), draws.random()
    span = 64 - 2 * radius  # room for the object's centre
    travel = turns = 0.0
    low = [radius, radius]  # the least x and y of the anchor, and the greatest
    high = [64 - radius, 64 - radius]
    match what.motion:
        case "left" | "right" | "up" | "down":
            travel = span * _between(draws, 0.65, 0.95)
            axis = 0 if what.motion in ("left", "right") else 1
            if what.motion in ("left", "up"):
                low[axis] += travel
            else:
                high[axis] -= travel
        case "clockwise" | "anticlockwise":
            travel, turns = _between(draws, 12, 17), _between(draws, 0.9, 1.2)
            low, high = [v + travel for v in low], [v - travel for v in high]
        case "growing" | "shrinking":
            travel = _between(draws, 0.36, 0.42)
            low, high = [v + radius * travel for v in low], [v - radius * travel for v in high]
        case "spinning":
            turns = _between(draws, 0.55, 0.8) * pick(draws, (-1, 1))
        case "blinking":
            turns = _between(draws, 2.0, 2.7)
        case "bouncing":
            travel, turns = span * _between(draws, 0.6, 0.85), _between(draws, 1.7, 2.3)
            low[1] += travel
    x, y = (_between(draws, low[axis], high[axis]) for axis in (0, 1))
    return ObjectSpec(what, (rgb[0], rgb[1], rgb[2]), radius, angle, x, y, travel, phase, turns)


def pose(thing: ObjectSpec, moment: float) -> tuple[float, float, float, float, float]:
    """(x, y, radius, angle, visibility) at `moment` in [0, 1], the clip's whole length; y and angles clockwise."""
    x, y, radius, angle, visible = thing.x, thing.y, thing.radius, thing.angle, 1.0
    cycle = thing.phase + thing.turns * moment
    match thing.what.motion:
        case "left":
            x -= thing.travel * moment
        case "right":
            x += thing.travel * moment
        case "up":
            y -= thing.travel * moment
        case "down":
            y += thing.travel * moment
        case "clockwise" | "anticlockwise":
            turn = 2 * math.pi * (cycle if thing.what.motion == "clockwise" else -cycle)
            x, y = x + thing.travel * math.cos(turn), y + thing.travel * math.sin(turn)
        case "growing":
            radius *= 1 + thing.travel * (2 * moment - 1)
        case "shrinking":
            radius *= 1 - thing.travel * (2 * moment - 1)
        case "spinning":
            angle += 2 * math.pi * thing.turns * moment
        case "blinking":
            visible = 1.0 if cycle % 1.0 < 0.55 else 0.0
        case "bouncing":
            y -= thing.travel * abs(math.sin(math.pi * cycle))
    return x, y, radius, angle, visible
