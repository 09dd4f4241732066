"""The words of the rendered world: short captions from templates and synonyms, told apart by what happens.

Every attribute value has a few names. A caption names each object's size, colour, shape and motion and
nothing else, so clips with equal looks have captions that differ in the motion's words alone. Pure: the
same draws give the same text.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Combination(NamedTuple):
    """What a caption says of one object."""

    shape: str
    colour: str
    size: str
    motion: str

    @property
    def look(self) -> str:
        """What one frame can show for sure: colour and shape."""
        return f"{self.colour} {self.shape}"


SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
    "moon": ("moon", "crescent"),
}
# each motion: pairs of (it "moves up", it is "moving up")
MOTION_WORDS: dict[str, tuple[tuple[str, str], ...]] = {
    "left": (
        ("moves to the left", "moving to the left"),
        ("slides left", "sliding left"),
        ("drifts leftwards", "drifting leftwards"),
    ),
    "right": (
        ("moves to the right", "moving to the right"),
        ("slides right", "sliding right"),
        ("drifts rightwards", "drifting rightwards"),
    ),
    "up": (("moves up", "moving up"), ("rises", "rising"), ("climbs upwards", "climbing upwards")),
    "down": (("moves down", "moving down"), ("falls", "falling"), ("sinks downwards", "sinking downwards")),
    "clockwise": (
        ("circles clockwise", "circling clockwise"),
        ("moves clockwise along a circle", "moving clockwise along a circle"),
        ("goes around clockwise", "going around clockwise"),
    ),
    "anticlockwise": (
        ("circles anticlockwise", "circling anticlockwise"),
        ("moves counterclockwise along a circle", "moving counterclockwise along a circle"),
        ("goes around anticlockwise", "going around anticlockwise"),
    ),
    "growing": (("grows", "growing"), ("gets bigger", "getting bigger"), ("expands", "expanding")),
    "shrinking": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("contracts", "contracting")),
    "spinning": (
        ("spins", "spinning"),
        ("rotates in place", "rotating in place"),
        ("turns on the spot", "turning on the spot"),
    ),
    "blinking": (
        ("blinks", "blinking"),
        ("flashes on and off", "flashing on and off"),
        ("appears and disappears", "appearing and disappearing"),
    ),
    "bouncing": (
        ("bounces", "bouncing"),
        ("hops up and down", "hopping up and down"),
        ("jumps again and again", "jumping again and again"),
    ),
    "still": (
        ("stays still", "staying still"),
        ("does not move", "not moving"),
        ("rests in place", "resting in place"),
    ),
}
BACKGROUND_WORDS = {
    "noise": ("cloudy", "noisy"),
    "gradient": ("smooth", "shaded"),
    "checks": ("checkered", "checked"),
    "stripes": ("striped", "lined"),
}
ARTICLES = ("a", "the", "one")
ONE_OBJECT = (
    "{object} {does}",
    "{object} is {doing}",
    "there is {object} that {does}",
    "we see {object} {doing}",
    "a video of {object} {doing}",
    "in this clip {object} {does}",
)
TWO_OBJECTS = (
    "{object} {does} and {object2} {does2}",
    "{object} {does} while {object2} {does2}",
    "we see {object} {doing} and {object2} {doing2}",
    "there is {object} that {does} and {object2} that {does2}",
)
PICTURES = ("{objects} on a {ground} background", "a picture of {objects} on a {ground} background", "we see {objects}")


def pick(draws: random.Random, items: Sequence[Item]) -> Item:
    """One of `items`, by `random()` alone: the one method whose numbers Python promises to keep."""
    return items[int(draws.random() * len(items))]


def shuffled(draws: random.Random, items: Sequence[Item]) -> list[Item]:
    """`items` in a drawn order, by `random()` alone."""
    keys = [draws.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def clip_captions(draws: random.Random, objects: Sequence[Combination], count: int) -> tuple[str, ...]:
    """`count` different captions of a clip, each from a template of its own (at most 4)."""
    templates = ONE_OBJECT if len(objects) == 1 else TWO_OBJECTS
    return tuple(_fill(draws, template, objects) for template in shuffled(draws, templates)[:count])


def picture_caption(draws: random.Random, objects: Sequence[Combination], ground: str) -> str:
    """One caption of a picture: the looks and perhaps the background, no motion."""
    names = " and ".join(_name(draws, shown) for shown in objects)
    return pick(draws, PICTURES).format(objects=names, ground=pick(draws, BACKGROUND_WORDS[ground]))


def _fill(draws: random.Random, template: str, objects: Sequence[Combination]) -> str:
    words: dict[str, str] = {}
    for suffix, shown in zip(("", "2"), objects, strict=False):
        does, doing = pick(draws, MOTION_WORDS[shown.motion])
        words |= {f"object{suffix}": _name(draws, shown), f"does{suffix}": does, f"doing{suffix}": doing}
    return template.format(**words)


def _name(draws: random.Random, shown: Combination) -> str:
    size, shape = pick(draws, SIZE_WORDS[shown.size]), pick(draws, SHAPE_WORDS[shown.shape])
    return f"{pick(draws, ARTICLES)} {size} {shown.colour} {shape}"
