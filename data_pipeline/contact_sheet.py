"""A contact sheet of a corpus: random clips, some frames of each side by side, its captions below, as one PNG.

contact_sheet(Corpus.open("corpus"), clips=12, seed=0).save("sheet.png")
"""

import random
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data_pipeline.decode import decode_video
from data_pipeline.schema import Sample, SampleError
from data_pipeline.shards import Corpus

FRAMES = 4  # of a video; an image is shown once, as wide
HEIGHT = 132  # of a frame, in pixels
WIDTH = 720  # of a column
COLUMNS = 2
LINES = 4  # of captions below a clip
MARGIN = 14
_SIZE = 15  # of the letters
_INK, _PALE, _PAPER, _BLANK = (28, 28, 30), (120, 120, 126), (255, 255, 255), (226, 226, 230)
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
)  # each knows more than Latin letters


@dataclass(frozen=True)
class _Letters:
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    line: int

    def wrapped(self, text: str, width: int) -> list[str]:
        """The lines in which a text fits into a width in pixels; a word that is wider than that is broken."""
        lines = [""]
        for word in text.split():
            for piece in self._pieces(word, width):
                joined = f"{lines[-1]} {piece}".strip()
                if self.font.getlength(joined) <= width:
                    lines[-1] = joined
                else:
                    lines.append(piece)
        return lines

    def _pieces(self, word: str, width: int) -> list[str]:
        room = max(1, int(len(word) * width / max(1.0, self.font.getlength(word))))
        return [word[at : at + room] for at in range(0, len(word), room)]


def contact_sheet(corpus: Corpus, clips: int = 12, seed: int = 0) -> Image.Image:
    """The sheet of a random choice of clips, in their order in the corpus; one that cannot be read says why."""
    chosen = sorted(random.Random(seed).sample(range(len(corpus)), min(clips, len(corpus))))
    letters = _letters()
    cell = HEIGHT + (LINES + 1) * letters.line + 2 * MARGIN
    rows = -(-len(chosen) // COLUMNS)
    columns = min(COLUMNS, len(chosen))
    sheet = Image.new("RGB", (columns * (WIDTH + MARGIN) + MARGIN, rows * cell + MARGIN), _PAPER)
    for place, i in enumerate(chosen):
        x, y = MARGIN + place % COLUMNS * (WIDTH + MARGIN), MARGIN + place // COLUMNS * cell
        _draw(sheet, x, y, corpus, i, letters)
    return sheet


def _draw(sheet: Image.Image, x: int, y: int, corpus: Corpus, i: int, letters: _Letters) -> None:
    pen = ImageDraw.Draw(sheet)
    head, lines = corpus.location(i), []
    try:
        sample = corpus.read(i)
        head = f"{sample.source}   {_facts(sample)}"
        lines = [line for caption in sample.captions for line in letters.wrapped(f"“{caption}”", WIDTH)]
        sheet.paste(_strip(sample), (x, y))
    except SampleError as error:
        pen.rectangle((x, y, x + WIDTH - 1, y + HEIGHT - 1), fill=_BLANK)
        lines += letters.wrapped(f"cannot be shown: {error}", WIDTH)
    y += HEIGHT + 4
    pen.text((x, y), letters.wrapped(head, WIDTH)[0], font=letters.font, fill=_PALE)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"{lines[LINES - 1][:-2]} …"]
    for number, line in enumerate(lines, start=1):
        pen.text((x, y + number * letters.line), line, font=letters.font, fill=_INK)


def _facts(sample: Sample) -> str:
    probe = sample.probe
    if not probe:
        return sample.kind
    size = f"{probe.get('width')}×{probe.get('height')}"
    return size if sample.kind == "image" else f"{size}, {probe.get('duration', 0):.1f} s, {probe.get('frames')} frames"


def _strip(sample: Sample) -> Image.Image:
    """The frames of a clip in a row, each fitted into its place without cutting or stretching it."""
    count = 1 if sample.kind == "image" else FRAMES

    def middles(frames: int, _: float) -> npt.NDArray[np.int64]:
        return ((np.arange(count) + 0.5) * frames / count).astype(np.int64)

    frames = decode_video(sample.media, middles, max_short_side=2 * HEIGHT, count=sample.probe.get("frames"))
    strip = Image.new("RGB", (WIDTH, HEIGHT), _BLANK)
    room = WIDTH // count
    for number, frame in enumerate(frames):
        picture = ImageOps.contain(Image.fromarray(frame), (room - 4, HEIGHT))
        strip.paste(picture, (number * room + (room - picture.width) // 2, (HEIGHT - picture.height) // 2))
    return strip


def _letters() -> _Letters:
    for name in _FONTS:
        try:
            return _Letters(ImageFont.truetype(name, _SIZE), _SIZE + 4)
        except OSError:  # not installed here
            continue
    return _Letters(ImageFont.load_default(_SIZE), _SIZE + 4)
