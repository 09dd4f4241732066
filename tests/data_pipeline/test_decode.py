import io
import json
import pickle

import av
import numpy as np
import pytest

from data_pipeline.decode import decode_image, decode_video, probe
from data_pipeline.schema import LossReason, SampleError

TYPED = {
    LossReason.EMPTY_FILE,
    LossReason.NOT_MEDIA,
    LossReason.NO_VIDEO_STREAM,
    LossReason.TOO_SHORT,
    LossReason.DECODE_ERROR,
}


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


def everything(n):
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

    def choose(n):
        asked.append(n)
        return np.array([1, 4, 4, 11])

    assert np.array_equal(decode_video(clip, choose), whole[[1, 4, 4, 11]])
    assert asked == [12]
    assert np.array_equal(decode_video(clip, choose, count=12), whole[[1, 4, 4, 11]])


def test_a_wrong_count_is_corrected_by_asking_again():
    asked = []

    def last(n):
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
        decode_video(coloured(GREYS), lambda _: np.array(wrong, np.int64))


def test_real_clips_decode_to_what_the_list_says_or_give_a_typed_error(media_dir):
    listed = [json.loads(line) for line in (media_dir / "clips.jsonl").read_text().splitlines()]
    outcomes = {}
    for entry in listed:
        data = (media_dir / entry["file"]).read_bytes()
        try:
            found = probe(data)
        except SampleError as error:
            outcomes[entry["file"]] = error.reason
            continue
        outcomes[entry["file"]] = None
        if "frames" not in entry:
            continue
        assert found.frames == entry["frames"], entry["file"]
        turned = (entry["rotation_deg"] or 0) % 180 == 90
        height, width = (found.width, found.height) if turned else (found.height, found.width)
        aspect = (entry["sample_aspect_ratio"] or "1:1").split(":")
        assert height == entry["coded_height"]
        assert width == round(entry["coded_width"] * int(aspect[0]) / int(aspect[1])), entry["file"]
        if found.frames * height * width > 40e6:
            continue  # the long ones have been decoded once: that is enough time
        # 8 frames spread over the clip, the last one included, without being told the count
        asked = []

        def spread(n, asked=asked):
            asked.append(n)
            return np.linspace(0, n - 1, 8).round().astype(int)

        assert decode_video(data, spread, size=(32, 32)).shape == (8, 32, 32, 3)
        assert asked[-1] == entry["frames"], entry["file"]
    lost = {file: reason for file, reason in outcomes.items() if reason}
    assert set(lost.values()) <= TYPED
    sound = {entry["file"] for entry in listed if "frames" in entry and not entry["decode_errors"]}
    assert not sound & set(lost)
    assert lost["clips/derived_broken/zero_bytes.mp4"] is LossReason.EMPTY_FILE
    assert lost["clips/derived_broken/text_not_video.mp4"] is LossReason.NOT_MEDIA
    assert lost["clips/mediabunny/ac3.mp4"] is LossReason.NO_VIDEO_STREAM
    for cut in ("friday_trunc60pct.mp4", "flower_trunc50pct.webm", "av1_trunc40pct.mkv"):
        assert lost[f"clips/derived_broken/{cut}"] is LossReason.DECODE_ERROR


def test_real_images_decode(media_dir):
    for path in sorted((media_dir / "images").glob("*"))[:20]:
        data = path.read_bytes()
        found = probe(data)
        assert found.kind == "image", path.name
        assert decode_image(data).shape == (1, found.height, found.width, 3)
