import io
from pathlib import Path

import av
import numpy as np
import pytest

from data_pipeline.schema import Sample, content_digest
from data_pipeline.shards import ShardWriter


def encode_clip(frames_THWC, fps=10, codec="mpeg4"):
    """Real video bytes (mp4) of uint8 RGB frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = frames_THWC.shape[2], frames_THWC.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for frame in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def grey_ramp(number, frames=12, height=48, width=64):
    """A clip whose frame t is grey of 20 + 15 t, with a stripe whose column tells the clip's number."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:] = (20 + 15 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    column = 4 * (number % (width // 4))
    clip[:, : height // 4, column : column + 4] = 255
    return clip


def write_corpus(folder, samples, per_shard=10):
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, "part", per_shard) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def sample(number, media, kind="video", extension="mp4", captions=None, **attributes):
    return Sample(
        key=f"{number:05d}",
        media=media,
        extension=extension,
        kind=kind,
        captions=tuple(captions or (f"clip {number}", f"number {number}")),
        source=f"{number}.{extension}",
        sha256=content_digest(media),
        probe={},
        attributes=attributes,
    )


@pytest.fixture(scope="session")
def clip_corpus(tmp_path_factory) -> Path:
    """60 real clips of 12 frames, attribute `colour` of 7 values; number 17 is no video."""
    folder = tmp_path_factory.mktemp("clips") / "train"
    return write_corpus(
        folder,
        (
            sample(n, b"not a video" if n == 17 else encode_clip(grey_ramp(n)), colour=f"c{n % 7}", place=n)
            for n in range(60)
        ),
    )


@pytest.fixture(scope="session")
def image_corpus(tmp_path_factory) -> Path:
    """24 PNG images."""

    def png(number):
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(grey_ramp(number, frames=1)[0]).save(buffer, "png")
        return buffer.getvalue()

    return write_corpus(
        tmp_path_factory.mktemp("images") / "train",
        (sample(n, png(n), kind="image", extension="png") for n in range(24)),
    )


@pytest.fixture(scope="session")
def media_folder(tmp_path_factory) -> Path:
    """40 clips of three sizes, an image, and with them what goes wrong: a text, a cut clip, an empty file, a second
    name for clip 3, a clip without captions, a missing file; `captions.csv` lists them, some with two captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("media")
    rows = ["file,caption,place,colour,good"]
    for number in range(40):
        clip = grey_ramp(number, frames=4 + number % 5, height=(48, 32, 64)[number % 3])
        (folder / f"c{number:02d}.mp4").write_bytes(encode_clip(clip))
        rows.append(f'c{number:02d}.mp4,"clip {number}, plain",{number},c{number % 7},{number % 2 == 0}')
    rows.insert(8, "text.mp4,no video at all,,c0,true")
    rows.insert(12, "cut.mp4,half of a clip,,c0,true")
    rows.insert(20, "empty.mp4,nothing,,c0,true")
    rows += ["c05.mp4,another caption of clip 5,,,", "again.mp4,clip 3 under another name,3,c3,false"]
    rows += ["silent.mp4,  ,,,", "gone.mp4,not there,,,", "picture.png,a picture,,,"]
    (folder / "text.mp4").write_text("this is no video, whatever its name says\n")
    whole = encode_clip(grey_ramp(0, frames=30))
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "again.mp4").write_bytes((folder / "c03.mp4").read_bytes())
    (folder / "silent.mp4").write_bytes(encode_clip(grey_ramp(7, frames=9)))
    Image.fromarray(grey_ramp(2, frames=1)[0]).save(folder / "picture.png")
    (folder / "captions.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def make_bad_corpus():
    """make_bad_corpus(folder, count): shards whose every medium is no video."""
    return lambda folder, count: write_corpus(folder, (sample(n, b"no video %d" % n) for n in range(count)))


@pytest.fixture(scope="session")
def ramp():
    """ramp(frames=12, number=0): the bytes of a clip whose frame t is grey of 20 + 15 t, ten a second."""
    return lambda frames=12, number=0: encode_clip(grey_ramp(number, frames=frames))
