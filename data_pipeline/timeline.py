"""When a clip's frames are shown, read off its packets: which frame is seen at a time, and where decoding must begin.

Frame rules speak of n equal slots of a clip's length; `frames_at` says which frame is on the screen in the middle of
a slot. At a constant frame rate slot k is frame k; at a variable one a frame fills as many slots as it lasts. `plan`
shares the wanted frames out to runs of packets, each beginning at a keyframe: one run from the start where keyframes
are rare, a run a frame where they are dense. Pure: packets are numbers here.

P packets in the order in which they are decoded, n frames in the order in which they are shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stamp:
    """What a packet says of its frame: the time at which it is shown (in ticks), and how it may be decoded."""

    pts: int | None
    is_keyframe: bool
    is_discarded: bool  # decoded for others' sake, outside of what an edit list shows


@dataclass(frozen=True)
class Run:
    """Packets `start` to `stop` (exclusive) to decode in sequence, for the frames shown at `wanted` (sorted ticks)."""

    start: int
    stop: int
    wanted: tuple[int, ...]


class Timeline:
    """The n shown frames of a clip, from the stamps of its packets; `tick` is the seconds of one unit of time."""

    def __init__(self, stamps: Sequence[Stamp], tick: float) -> None:
        self.stamps = stamps
        self.tick = tick
        shown = [stamp.pts for stamp in stamps if not stamp.is_discarded]
        self.pts_n: Int64Array = np.unique(np.array([pts for pts in shown if pts is not None], np.int64))
        self._complete = None not in shown
        self._place = {stamp.pts: place for place, stamp in enumerate(stamps)}

    def __len__(self) -> int:
        return len(self.pts_n)

    def tells(self, count: int | None) -> bool:
        """Whether every frame has its time, and there are as many as a full decode counted (None: not known)."""
        return self._complete and len(self) > 0 and count in (None, len(self))

    @property
    def spacing(self) -> float:
        """The usual ticks from one frame to the next; 0 for one frame."""
        return float(np.median(np.diff(self.pts_n))) if len(self) > 1 else 0.0

    @property
    def seconds(self) -> float:
        """From the first frame to the end of the last one, which is taken to last as long as is usual."""
        return (float(self.pts_n[-1] - self.pts_n[0]) + self.spacing) * self.tick

    def frames_at(self, slots: npt.NDArray[np.integer[Any]]) -> Int64Array:
        """The indices of the frames on the screen in the middle of these of the clip's n equal slots of time."""
        n = len(self)
        length = float(self.pts_n[-1] - self.pts_n[0]) + self.spacing
        middle = self.pts_n[0] + (np.asarray(slots, np.float64) + 0.5) * (length / n)
        frames: Int64Array = np.searchsorted(self.pts_n, middle, side="right") - 1
        return frames.clip(0, n - 1)

    def plan(self, frames: Sequence[int]) -> list[Run]:
        """The runs of packets that decode these frames (sorted indices, which may repeat) with the least work.

        A new run begins where the keyframe of the next frame lies beyond what has been decoded so far. A frame is
        never decoded from a keyframe that is shown after it, as the leading pictures of an open GOP would be.
        """
        runs: list[Run] = []
        for pts in (int(self.pts_n[frame]) for frame in frames):
            place = self._place[pts]
            begin = self._keyframe(place, pts)
            last = runs[-1] if runs else None
            if last is not None and begin < last.stop:
                runs[-1] = Run(min(last.start, begin), max(last.stop, place + 1), (*last.wanted, pts))
            else:
                runs.append(Run(begin, place + 1, (pts,)))
        return runs

    def _keyframe(self, place: int, pts: int) -> int:
        """The last packet up to `place` from which the frame shown at `pts` can be decoded; the first one if none."""
        for i in range(place, -1, -1):
            stamp = self.stamps[i]
            if stamp.is_keyframe and stamp.pts is not None and stamp.pts <= pts:
                return i
        return 0
