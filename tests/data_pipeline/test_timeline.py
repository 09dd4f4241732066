import io
from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.decode import decode_video, probe
from data_pipeline.media import opened
from data_pipeline.timeline import Run, Stamp, Timeline

RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (36, 64, 3), np.uint8)


def moving(count, codec="libx264", container="mp4", pix_fmt="yuv420p", times=None, **options):
    """A noisy picture drifting, so that every frame is its own and needs its references; `times` in 1/1000 s."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25, options={key.replace("_", "-"): str(v) for key, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = 64, 36, pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for t in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(NOISE, (t // 3, t), (0, 1)), format="rgb24")
            frame.pts = t if times is None else times[t]
            frame.time_base = Fraction(1, 25) if times is None else Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def in_sequence(clip):
    """Every frame, by nothing but PyAV."""
    with av.open(io.BytesIO(clip)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


KINDS = {
    "a keyframe every frame": {"g": 1},
    "every 12": {"g": 12},
    "every 30, many B-frames": {"g": 30, "bf": 4, "x264_params": "b-pyramid=normal:scenecut=0"},
    "one of 250": {"g": 250},
    "no B-frames": {"g": 20, "bf": 0},
    "open groups": {"g": 12, "bf": 3, "x264_params": "open-gop=1:scenecut=0"},
    "rolling refresh": {"g": 24, "x264_params": "intra-refresh=1"},
    "in matroska": {"g": 12, "container": "matroska", "x264_params": "open-gop=1"},
    "in a transport stream": {"g": 12, "container": "mpegts"},
    "hevc, open groups": {"codec": "libx265", "g": 12, "x265_params": "open-gop=1:log-level=none:bframes=3"},
    "mpeg4 in avi": {"codec": "mpeg4", "container": "avi", "g": 12},
    "mpeg4 with B-frames": {"codec": "mpeg4", "g": 12, "bf": 2},
    "mpeg2": {"codec": "mpeg2video", "container": "mpegts", "g": 12, "bf": 2},
    "vp8": {"codec": "libvpx", "container": "webm", "g": 20, "auto_alt_ref": 1, "lag_in_frames": 10},
    "vp9": {"codec": "libvpx-vp9", "container": "webm", "g": 20, "cpu_used": 8, "deadline": "realtime"},
    "av1": {
        "codec": "libsvtav1",
        "container": "matroska",
        "g": 20,
        "preset": 12,
        "svtav1_params": "logical-processors=1",
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_frames_are_those_of_a_sequential_decode_wherever_decoding_begins(kind):
    clip = moving(60, **KINDS[kind])
    whole = in_sequence(clip)
    n = probe(clip).frames
    assert n == len(whole)
    generator = np.random.default_rng(3)
    for chosen in (np.arange(n), [0], [n - 1], [n // 2], *(np.sort(generator.choice(n, 5)) for _ in range(6))):
        asked = []
        found = decode_video(clip, lambda k, _, asked=asked, chosen=chosen: (asked.append(k), np.array(chosen))[1])
        assert asked == [n]
        assert np.array_equal(found, whole[chosen]), f"{list(chosen)}"


def test_dense_keyframes_are_sought_and_rare_ones_are_not():
    dense, rare = moving(60, g=6, sc_threshold=0), moving(60, g=250)
    for clip, most in ((dense, 24), (rare, 60)):
        with opened(clip) as media:
            timeline = media.timeline(list(media.packets()))
        runs = timeline.plan([10, 30, 50])
        assert sum(run.stop - run.start for run in runs) <= most
        assert len(runs) == (3 if clip is dense else 1)


def test_a_variable_frame_rate_is_sampled_by_time():
    # 20 frames in the first 0.4 s, then 5 that last 0.4 s each: by number, four fifths of a choice would be the start
    times = [*range(0, 400, 20), *range(400, 2400, 400)]
    clip = moving(25, times=times, g=10)
    whole = in_sequence(clip)
    assert len(whole) == 25
    seen = []

    def middles(n, seconds):
        seen.append((n, seconds))
        return np.array([2, 7, 12, 17, 22])

    found = decode_video(clip, middles)
    n, seconds = seen[0]
    assert n == 25
    shown = (np.array([2, 7, 12, 17, 22]) + 0.5) * seconds * 1000 / n
    expected = [max(i for i, t in enumerate(times) if t <= at) for at in shown]
    assert np.array_equal(found, whole[expected])
    assert sum(i >= 19 for i in expected) == 4


@given(st.lists(st.integers(1, 400), min_size=1, max_size=60), st.integers(-(10**6), 10**6))
@settings(deadline=None)
def test_the_frame_of_a_slot_is_the_one_on_the_screen(gaps, start):
    pts = (start + np.cumsum([0, *gaps])).tolist()
    timeline = Timeline([Stamp(p, False, False) for p in pts], 0.001)
    n = len(pts)
    frames = timeline.frames_at(np.arange(n))
    length = timeline.seconds / 0.001
    for slot, frame in enumerate(frames):
        middle = pts[0] + (slot + 0.5) * length / n
        assert pts[frame] <= middle + 1e-6
        assert frame == n - 1 or middle <= pts[frame + 1] + 1e-6
    assert (np.diff(frames) >= 0).all()


@given(st.integers(1, 300), st.integers(1, 5000), st.integers(-1000, 1000))
@settings(deadline=None)
def test_at_a_constant_rate_slots_are_frames(n, gap, start):
    timeline = Timeline([Stamp(start + gap * i, False, False) for i in range(n)], 0.001)
    assert timeline.frames_at(np.arange(n)).tolist() == list(range(n))


@given(st.data())
@settings(deadline=None)
def test_a_plan_covers_what_is_wanted_from_a_keyframe_shown_before_it(data):
    pts = data.draw(st.permutations(range(data.draw(st.integers(1, 20)))))
    n = len(pts)
    keys = data.draw(st.sets(st.integers(0, n - 1)))
    stamps = [Stamp(p, place in keys, False) for place, p in enumerate(pts)]
    timeline = Timeline(stamps, 0.04)
    frames = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    runs = timeline.plan(frames)
    assert [pts for run in runs for pts in run.wanted] == frames
    for run in runs:
        for wanted in run.wanted:
            place = pts.index(wanted)
            assert run.start <= place < run.stop
            # no keyframe in reach would have done with less
            usable = [i for i in keys if i <= place and pts[i] <= wanted]
            assert run.start <= max(usable, default=0)
            assert stamps[run.start].is_keyframe or run.start == 0


def test_packets_without_times_tell_nothing():
    assert not Timeline([Stamp(None, True, False), Stamp(3, False, False)], 1.0).tells(None)
    assert not Timeline([], 1.0).tells(None)
    assert Timeline([Stamp(0, True, False), Stamp(1, False, True)], 1.0).tells(1)
    assert not Timeline([Stamp(0, True, False)], 1.0).tells(2)
    assert Timeline([Stamp(0, True, False)], 1.0).plan([0]) == [Run(0, 1, (0,))]


@pytest.mark.parametrize(
    ("kind", "sought"),
    [("every 12", True), ("open groups", True), ("in a transport stream", True), ("rolling refresh", False)],
)
def test_h264_keyframes_are_believed_where_decoding_from_them_is_exact(kind, sought):
    with opened(moving(60, **KINDS[kind])) as media:
        packets = list(media.packets())
        timeline = media.timeline(packets)
    assert sum(packet.is_keyframe for packet in packets) > 1
    assert (sum(stamp.is_keyframe for stamp in timeline.stamps) > 1) == sought
