"""Everything that keeps a state dict from fitting, in one message: what is missing, left over, or of another shape.

Layers that lack the same thing are told as one line: `layers.{0-23}.mixer.A_b_log`.
"""

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from configs.errors import UserError

Shape = tuple[int, ...]
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def require_fit(seen: Mapping[str, Shape], expected: Mapping[str, Shape], what: str) -> None:
    """UserError unless `seen` has exactly the names and shapes of `expected`.

    A missing name is shown with the nearest one that is left over, since that is mostly what became of it.
    """
    missing = [name for name in expected if name not in seen]
    left_over = [name for name in seen if name not in expected]
    shapes = [name for name in expected if name in seen and seen[name] != expected[name]]
    if not (missing or left_over or shapes):
        return
    parts = []
    if missing:
        parts.append(f"missing {len(missing)}: {', '.join(_nearest(missing, left_over))}")
    if left_over:
        parts.append(f"left over {len(left_over)}: {', '.join(_nearest(left_over, expected))}")
    if shapes:
        sizes = _told({name: f" is {_by(seen[name])}, expected {_by(expected[name])}" for name in shapes})
        parts.append(f"of another shape {len(shapes)}: {'; '.join(sizes)}")
    raise UserError(f"{what} does not fit: {' | '.join(parts)}.", _cure(missing, left_over, shapes))


def _cure(missing: list[str], left_over: list[str], shapes: list[str]) -> str:
    if any("_b." in name or "_b_" in name or name.endswith("_b") for name in missing) and not shapes:
        return "The backward direction is missing, as in models that scan one way only; those are no VideoMamba."
    if missing and not (left_over or shapes):
        return "Give the whole file; one that was cut or filtered cannot be mended by guessing."
    return "Give the file as published, or rename what is left over and import again."


def told(names: Iterable[str]) -> list[str]:
    """The names; those that differ in their numbers alone as one, `layers.{0-3}.norm.weight`."""
    return _told(dict.fromkeys(names, ""))


def _nearest(names: list[str], among: Iterable[str]) -> list[str]:
    """The names, alike ones as one, each with the nearest of `among` if any is near."""
    pool = sorted({_starred(name) for name in among})
    notes = {}
    for starred in {_starred(name) for name in names}:
        near = difflib.get_close_matches(starred, pool, n=1, cutoff=0.75)
        notes[starred] = f" (nearest: {near[0]})" if near and near[0] != starred else ""
    return _told({name: notes[_starred(name)] for name in names})


def _told(notes: Mapping[str, str]) -> list[str]:
    """Every name with its note; those that differ in their numbers alone, and not in the note, as one."""
    groups: dict[tuple[tuple[str, ...], str], list[list[int]]] = defaultdict(list)
    for name, note in notes.items():
        groups[tuple(_NUMBER.split(name)), note].append([int(number) for number in _NUMBER.findall(name)])
    lines = []
    for (pieces, note), numbers in groups.items():
        columns = [_runs(sorted(set(column))) for column in zip(*numbers, strict=True)]
        lines.append("".join(piece + run for piece, run in zip(pieces, [*columns, ""], strict=True)) + note)
    return lines


def _starred(name: str) -> str:
    return _NUMBER.sub("*", name)


def _runs(numbers: list[int]) -> str:
    """0, 1, 2, 5 as `{0-2,5}`, a single number as itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "{" + ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + "}"


def _by(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "a scalar"
