"""The matrix of dual scores as a picture: a row a clip, a column the first caption of each clip, in the same order.

So the right pairs lie on the diagonal. A large matrix is drawn in blocks, each as bright as the highest score in it: a
mean would wash out a diagonal one pair wide. Right pairs stand out only where they score above everything that shares
their block. V clips, U different texts.
"""

import base64
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from configs.files import write_whole
from retrieval_eval.report.data import Similarity

FILE = "similarity.png"
MOST = 500  # blocks a side
STOPS = ((17, 16, 52), (75, 32, 122), (170, 52, 115), (237, 105, 76), (252, 190, 95), (252, 250, 200))
"""Colours from the lowest to the highest score; each is lighter than the one before, so it reads in grey too."""


def blocks(scores_VU: NDArray[np.floating], text_of_V: NDArray[np.int64], most: int = MOST) -> NDArray[np.float32]:
    """The highest score of each block of `clips x first captions`, at most `most` blocks a side."""
    clips = len(scores_VU)
    size = max(1, -(-clips // most))
    starts = np.arange(0, clips, size)
    made = np.empty((len(starts), len(starts)), dtype=np.float32)
    for row, start in enumerate(starts):
        band = scores_VU[start : start + size].max(axis=0)[text_of_V]
        made[row] = np.maximum.reduceat(band, starts)
    return made


def write_similarity(path: Path, scores_VU: NDArray[np.floating], text_of_V: NDArray[np.int64]) -> None:
    """Draw the matrix; what its colours mean goes into the PNG as text."""
    made = blocks(scores_VU, text_of_V)
    low, high = (float(edge) for edge in np.percentile(made, [1, 100]))
    shades = (255 * np.clip((made - low) / max(high - low, 1e-12), 0, 1)).round().astype(np.uint8)
    image = Image.fromarray(shades, "P")
    image.putpalette(_palette().tobytes())
    said = PngInfo()
    block = -(-len(scores_VU) // len(made))
    for name, value in (("clips", len(scores_VU)), ("block", block), ("low", low), ("high", high)):
        said.add_text(name, f"{value:.6g}")
    file = BytesIO()
    image.save(file, "PNG", pnginfo=said, optimize=True)
    write_whole(path, file.getvalue())


def read_similarity(path: Path) -> Similarity | None:
    """What `write_similarity` wrote, for a page; None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        assert isinstance(image, PngImageFile)
        said = {name: float(str(value)) for name, value in image.text.items()}
        side = image.width
    return Similarity(
        image=base64.b64encode(path.read_bytes()).decode("ascii"),
        side=side,
        clips=int(said["clips"]),
        block=int(said["block"]),
        low=said["low"],
        high=said["high"],
    )


def _palette() -> NDArray[np.uint8]:
    places = np.linspace(0, len(STOPS) - 1, 256)
    channels = [np.interp(places, range(len(STOPS)), [stop[c] for stop in STOPS]) for c in range(3)]
    return np.stack(channels, axis=1).round().astype(np.uint8)
