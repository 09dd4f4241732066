import io
import json
import pickle
from contextlib import suppress

import av
import numpy as np
import pytest

from data_pipeline.colour import Converter
from data_pipeline.decode import decode_image, decode_video, probe
from data_pipeline.media import opened
from data_pipeline.schema import LossReason, SampleError


def coloured(colours, height=48, width=64, codec="libx264", container="mp4", fps=10, sar=None, rotation=None):
    """A clip of flat frames in the colours given."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if sar:
            stream.codec_context.sample_aspect_ratio = sar
        if rotation:
            stream.set_display_rotation(rotation)
        for colour in colours:
            frame = np.empty((height, width, 3), np.uint8)
            frame[:] = colour
            frame[: height // 2, : width // 2] = 0  # the top left quarter tells which way is up
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


GREYS = [(20 + 15 * t,) * 3 for t in range(12)]


def everything(n, _):
    return np.arange(n)


def shade(frames_THWC):
    """The grey of the frames' lower right corner."""
    return frames_THWC[:, -8:, -8:].mean((1, 2, 3))


@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("libvpx", "webm"), ("mpeg4", "avi")])
def test_the_chosen_frames_are_those_of_a_full_decode(codec, container):
    clip = coloured(GREYS, codec=codec, container=container)
    whole = decode_video(clip, everything)
    assert whole.shape == (12, 48, 64, 3)
    assert whole.dtype == np.uint8
    assert np.abs(shade(whole) - [grey[0] for grey in GREYS]).max() < 6
    asked = []

    def choose(n, _):
        asked.append(n)
        return np.array([1, 4, 4, 11])

    assert np.array_equal(decode_video(clip, choose), whole[[1, 4, 4, 11]])
    assert asked == [12]
    assert np.array_equal(decode_video(clip, choose, count=12), whole[[1, 4, 4, 11]])


def test_a_wrong_count_is_corrected_by_asking_again():
    asked = []

    def last(n, _):
        asked.append(n)
        return np.array([n - 1])

    clip = coloured(GREYS)
    assert np.array_equal(decode_video(clip, last, count=99), decode_video(clip, everything)[-1:])
    assert asked == [99, 12]


def test_colours_come_back():
    primaries = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    frames = decode_video(coloured(primaries, codec="libx264"), everything)
    assert np.abs(frames[:, -8:, -8:].mean((1, 2)) - primaries).max() < 6


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_clips_come_out_upright(rotation):
    clip = coloured(GREYS[8:], rotation=rotation)
    stored = decode_video(coloured(GREYS[8:]), everything)
    # The display matrix turns counter-clockwise by the angle that it was given.
    expected = np.rot90(stored, rotation // 90, axes=(1, 2))
    upright = decode_video(clip, everything)
    assert np.array_equal(upright, expected)
    found = probe(clip)
    assert (found.height, found.width) == expected.shape[1:3]
    assert decode_video(clip, everything, size=(20, 30)).shape == (4, 20, 30, 3)
    assert min(decode_video(clip, everything, max_short_side=24).shape[1:3]) == 24


def test_pixels_become_square():
    clip = coloured(GREYS, sar=2)
    found = probe(clip)
    assert (found.width, found.height) == (128, 48)
    assert decode_video(clip, everything).shape == (12, 48, 128, 3)
    assert decode_video(clip, everything, max_short_side=24).shape == (12, 24, 64, 3)
    assert decode_video(clip, everything, max_short_side=100).shape == (12, 48, 128, 3)


def test_probe_says_what_a_clip_is():
    found = probe(coloured(GREYS, fps=10))
    assert found.tree() == {
        "frames": 12,
        "width": 64,
        "height": 48,
        "fps": 10.0,
        "duration": 1.2,
        "codec": "h264",
        "rotation": 0,
    }
    assert found.kind == "video"


def test_an_image_is_one_frame(media_folder):
    data = (media_folder / "picture.png").read_bytes()
    found = probe(data)
    assert (found.kind, found.frames, found.width, found.height) == ("image", 1, 64, 48)
    assert decode_image(data).shape == (1, 48, 64, 3)
    assert decode_image(data, size=(16, 16)).shape == (1, 16, 16, 3)


def test_faults_have_their_type(media_folder):
    for data, reason in [
        (b"", LossReason.EMPTY_FILE),
        (b"no video", LossReason.NOT_MEDIA),
        ((media_folder / "cut.mp4").read_bytes(), None),
    ]:
        with pytest.raises(SampleError) as failure:
            probe(data)
        assert reason in (None, failure.value.reason)
        with pytest.raises(SampleError):
            decode_video(data, everything)
        again = pickle.loads(pickle.dumps(failure.value))
        assert (again.reason, again.detail) == (failure.value.reason, failure.value.detail)


def test_sound_alone_is_no_video():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        for start in range(0, 16000, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with pytest.raises(SampleError) as failure:
        probe(buffer.getvalue())
    assert failure.value.reason is LossReason.NO_VIDEO_STREAM


def test_a_damaged_middle_is_noticed():
    clip = bytearray(coloured([np.random.default_rng(t).integers(0, 255, 3) for t in range(24)], codec="libx264"))
    begin = clip.find(b"mdat") + 1000 if len(clip) > 4000 else clip.find(b"mdat") + len(clip) // 4
    clip[begin : begin + 300] = np.random.default_rng(0).bytes(300)
    with pytest.raises(SampleError) as failure:
        probe(bytes(clip))
    assert failure.value.reason is LossReason.DECODE_ERROR


@pytest.mark.parametrize("wrong", [[2, 1], [0, 12], [-1, 0], []])
def test_choose_must_give_sorted_indices_in_range(wrong):
    with pytest.raises(ValueError, match="expected sorted indices"):
        decode_video(coloured(GREYS), lambda *_: np.array(wrong, np.int64))


PARTS = 4  # of the list of real clips, so that test processes share it


@pytest.mark.parametrize("part", range(PARTS))
def test_real_clips_decode_to_what_the_list_says_or_give_a_typed_error(media_dir, part):
    listed = [json.loads(line) for line in (media_dir / "clips.jsonl").read_text().splitlines()]
    for entry in listed[part::PARTS]:
        data = (media_dir / entry["file"]).read_bytes()
        sound = "frames" in entry and not entry["decode_errors"]
        if sound:
            found = probe(data)
            is_as_listed(found, entry)
            chosen_frames_are_right(data, found)
            continue
        for read in (lambda data=data: probe(data), lambda data=data: decode_video(data, spread)):
            with suppress(SampleError):  # nothing else may come out
                read()


def spread(n, _):
    """8 frames over the clip, the last one included."""
    return np.linspace(0, n - 1, 8).round().astype(int)


def is_as_listed(found, entry):
    turned = (entry["rotation_deg"] or 0) % 180 == 90
    height, width = (found.width, found.height) if turned else (found.height, found.width)
    aspect = (entry["sample_aspect_ratio"] or "1:1").split(":")
    assert found.frames == entry["frames"], entry["file"]
    assert found.rotation == (entry["rotation_deg"] or 0) % 360, entry["file"]
    assert height == entry["coded_height"], entry["file"]
    assert width == round(entry["coded_width"] * int(aspect[0]) / int(aspect[1])), entry["file"]


def chosen_frames_are_right(data, found):
    """Without being told their number, 8 frames are those of a decode from the first to the last."""
    if found.frames * found.width * found.height > 300e6:
        return  # probing has decoded it once: that is enough time
    asked = []
    small = {"size": (24, 32)}
    frames = decode_video(data, lambda n, seconds: (asked.append((n, seconds)), spread(n, 0))[1], **small)
    assert asked[0][0] == found.frames
    assert len(asked) == 1
    assert asked[0][1] == pytest.approx(found.duration, rel=0.1, abs=0.1)
    assert frames.shape == (8, 24, 32, 3)
    if found.frames * found.width * found.height > 60e6:
        return
    with opened(data) as media:
        packets = list(media.packets())
        wanted = media.timeline(packets).frames_at(spread(found.frames, 0)).tolist()
        converter = Converter(found.codec)
        whole = [converter.rgb(frame, 32, 24) for frame in media.decode(packets)]
    if found.rotation in (0, 180):  # a quarter turn changes which side is which
        upright = [np.rot90(whole[frame], found.rotation // 90) for frame in wanted]
        assert np.array_equal(frames, np.stack(upright))


def test_what_the_list_knows_to_be_broken_has_its_reason(media_dir):
    for name, reason in {
        "derived_broken/zero_bytes.mp4": LossReason.EMPTY_FILE,
        "derived_broken/text_not_video.mp4": LossReason.NOT_MEDIA,
        "mediabunny/ac3.mp4": LossReason.NO_VIDEO_STREAM,
        "exoplayer/sample_latm.ts": LossReason.NO_VIDEO_STREAM,
        "derived_broken/friday_trunc60pct.mp4": LossReason.DECODE_ERROR,
        "derived_broken/flower_trunc50pct.webm": LossReason.DECODE_ERROR,
        "derived_broken/av1_trunc40pct.mkv": LossReason.DECODE_ERROR,
        "decord/corrupted.mp4": LossReason.DECODE_ERROR,
        "mediabunny/annex-b.mp4": LossReason.DECODE_ERROR,
    }.items():
        with pytest.raises(SampleError) as told:
            probe((media_dir / "clips" / name).read_bytes())
        assert told.value.reason is reason, name


def test_real_images_decode(media_dir):
    for path in sorted((media_dir / "images").glob("*"))[:20]:
        data = path.read_bytes()
        found = probe(data)
        assert found.kind == "image", path.name
        assert decode_image(data).shape == (1, found.height, found.width, 3)
