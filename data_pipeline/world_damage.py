"""Damage done on purpose to a few training clips, each in another way, so that a build has something to count."""

import random
from collections.abc import Callable
from pathlib import Path

from data_pipeline.world import WORLD_VERSION, WorldConfig

ONE_IN = 20  # at most one clip of this many is damaged


def damaged(config: WorldConfig) -> dict[str, str]:
    """The damaged files of a world, relative to its folder, and the way of each; a pure function of the config."""
    draws = random.Random(f"world/{WORLD_VERSION}/{config.seed}/damaged")
    places = {way: ONE_IN * turn + int(draws.random() * ONE_IN) for turn, way in enumerate(WAYS)}
    fits = {way: place for turn, (way, place) in enumerate(places.items()) if ONE_IN * (turn + 1) <= config.train}
    return {f"train/train-{place:06d}.mp4": way for way, place in fits.items()}


def damage(path: Path, way: str) -> None:
    """Damage one file in place."""
    WAYS[way](path)


def _cut_short(path: Path) -> None:
    """As a download that broke off."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 6 // 10])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    """As an error page saved under the clip's name."""
    path.write_text("<html><body>404 Not Found</body></html>\n", encoding="utf-8")


def _overwrite_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes(64) + content[64:])


def _scramble(path: Path) -> None:
    """Noise over the middle of the pictures; the index in front stays whole."""
    content = path.read_bytes()
    start, stop = len(content) * 4 // 10, len(content) * 7 // 10
    draws = random.Random("scramble")
    noise = bytes(int(draws.random() * 256) for _ in range(stop - start))
    path.write_bytes(content[:start] + noise + content[stop:])


def _remove(path: Path) -> None:
    path.unlink()


WAYS: dict[str, Callable[[Path], None]] = {
    "cut short": _cut_short,
    "empty": _empty,
    "text": _text,
    "header overwritten": _overwrite_header,
    "middle scrambled": _scramble,
    "missing": _remove,
}
