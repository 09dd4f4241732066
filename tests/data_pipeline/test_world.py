"""The rendered world without its files: splits, captions and pixels."""

import functools
import hashlib
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import world_captions as words
from data_pipeline.world import (
    CAMERAS,
    COLOURS,
    COMBINATIONS,
    MOTIONS,
    SHAPES,
    SIZES,
    WORLD_VERSION,
    Combination,
    WorldConfig,
    clip_specs,
    held_out,
    pose,
)
from data_pipeline.world_render import render_clip

GOLDEN = Path(__file__).parent / "golden" / "world.json"
DEMO = WorldConfig()


@pytest.fixture(scope="module")
def demo():
    return {split: clip_specs(DEMO, split) for split in ("train", "val", "test", "images")}


def meaning(spec):
    return tuple(thing.what for thing in spec.objects)


# ---- splits


def test_there_are_1152_combinations():
    assert len(set(COMBINATIONS)) == len(SHAPES) * len(COLOURS) * len(SIZES) * len(MOTIONS) == 1152


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_shows_every_value_and_pair_but_never_a_held_out_combination(seed):
    hidden = held_out(seed)
    assert 0.25 < len(hidden) / len(COMBINATIONS) < 1 / 3
    shown = {what for spec in clip_specs(WorldConfig(seed=seed, train=1500), "train") for what in meaning(spec)}
    assert not shown & hidden
    assert shown | hidden == set(COMBINATIONS)
    assert {(w.shape, w.motion) for w in shown} == set(itertools.product(SHAPES, MOTIONS))
    assert {(w.colour, w.shape) for w in shown} == set(itertools.product(COLOURS, SHAPES))
    assert {w.size for w in shown} == set(SIZES)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("seed", [0, 1])
def test_evaluation_clips_are_unique_and_half_of_them_unseen(seed, split):
    config = WorldConfig(seed=seed, train=2000)
    specs = clip_specs(config, split)
    shown = {what for spec in clip_specs(config, "train") for what in meaning(spec)}
    assert len({frozenset(meaning(spec)) for spec in specs}) == len(specs) == 400
    assert len({spec.captions for spec in specs}) == 400
    unseen = [spec for spec in specs if not set(meaning(spec)) <= shown]
    assert len(unseen) >= 200
    assert all(spec.seen == (spec not in unseen) for spec in specs)
    assert sum(len(spec.objects) == 2 for spec in specs) == 80


def test_validation_and_test_clips_mean_different_things(demo):
    assert not {meaning(s) for s in demo["val"]} & {meaning(s) for s in demo["test"]}


def test_training_shows_the_allowed_combinations_about_equally_often(demo):
    counts = Counter(spec.objects[0].what for spec in demo["train"])
    assert max(counts.values()) - min(counts.values()) <= 1


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    short=st.integers(0, 30),
    more=st.integers(0, 30),
    share=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    split=st.sampled_from(["train", "val", "test", "images"]),
)
def test_a_longer_split_begins_with_the_shorter_one(seed, short, more, share, split):
    def specs(count):
        counts = {"train": 0, "val": 0, "test": 0, "images": 0, split: count}
        return clip_specs(WorldConfig(seed=seed, two_objects=share, **counts), split)

    longer = specs(short + more)
    assert longer[:short] == specs(short)
    assert len(longer) == short + more
    if split in ("val", "test"):
        assert len({frozenset(meaning(spec)) for spec in longer}) == len(longer)


def test_more_clips_than_one_object_combinations_are_still_unique():
    specs = clip_specs(WorldConfig(train=0, test=1500, two_objects=0), "test")
    assert len({frozenset(meaning(spec)) for spec in specs}) == 1500
    assert {len(spec.objects) for spec in specs} == {1, 2}


def test_two_seeds_are_two_worlds():
    one, two = (clip_specs(WorldConfig(seed=seed, test=50), "test") for seed in (0, 1))
    assert {spec.captions for spec in one} != {spec.captions for spec in two}
    assert held_out(0) != held_out(1)


def test_canvases_rates_and_lengths_vary(demo):
    assert {(s.width, s.height, s.rate) for s in demo["train"]} == set(CAMERAS)
    assert {s.frames for s in demo["train"]} == set(range(16, 33))
    assert any(s.width < s.height for s in demo["train"])
    assert min(min(width, height) for width, height, _ in CAMERAS) >= 64


# ---- the same numbers everywhere


def fingerprint():
    """Hashes of what the splits hold, and a few captions and colours that a person can read."""
    config = WorldConfig(train=300, val=60, test=100, images=60)
    shown = {}
    for split in ("train", "val", "test", "images"):
        specs = clip_specs(config, split)
        text = "\n".join(f"{s.captions} {s.width}x{s.height} {s.rate} {s.frames} {s.seen}" for s in specs)
        shown[split] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "captions": [s.captions[0] for s in specs[:8]],
            "mean_rgb": [np.round(render_clip(s).mean((0, 1, 2)), 2).tolist() for s in specs[:8]],
        }
    return {"version": WORLD_VERSION, "splits": shown}


def test_the_world_is_the_recorded_one():
    """A change of what is rendered needs a new WORLD_VERSION; then `python tests/data_pipeline/test_world.py`."""
    recorded, found = json.loads(GOLDEN.read_text()), fingerprint()
    assert recorded["version"] == found["version"]
    for split, expected in recorded["splits"].items():
        assert found["splits"][split]["captions"] == expected["captions"]
        assert found["splits"][split]["sha256"] == expected["sha256"]
        np.testing.assert_allclose(found["splits"][split]["mean_rgb"], expected["mean_rgb"], atol=0.05)


def test_another_process_sees_the_same_world(python):
    program = """
import hashlib
from data_pipeline.world import WorldConfig, clip_specs
from data_pipeline.world_render import render_clip
specs = clip_specs(WorldConfig(test=30, train=900), "test")
pixels = b"".join(render_clip(spec).tobytes() for spec in specs)
print(hashlib.sha256(repr(specs).encode() + pixels).hexdigest())
"""
    there = python("-c", program, PYTHONHASHSEED="7")
    assert there.returncode == 0, there.stderr
    specs = clip_specs(WorldConfig(test=30, train=900), "test")
    pixels = b"".join(render_clip(spec).tobytes() for spec in specs)
    assert there.stdout.strip() == hashlib.sha256(repr(specs).encode() + pixels).hexdigest()


# ---- captions: the way back from words to attributes


def _either(table):
    return "|".join(sorted(table, key=len, reverse=True))


SIZE_OF = {name: size for size, names in words.SIZE_WORDS.items() for name in names}
SHAPE_OF = {name: shape for shape, names in words.SHAPE_WORDS.items() for name in names}
MOTION_OF = {form: motion for motion, pairs in words.MOTION_WORDS.items() for pair in pairs for form in pair}
OBJECT = rf"\b(?:a|the|one) ({_either(SIZE_OF)}) ({_either(COLOURS)}) ({_either(SHAPE_OF)})\b"
CLAUSE = re.compile(rf"{OBJECT}(?: that| is)? ({_either(MOTION_OF)})\b")


def read_back(caption):
    return tuple(
        Combination(SHAPE_OF[shape], colour, SIZE_OF[size], MOTION_OF[motion])
        for size, colour, shape, motion in CLAUSE.findall(caption)
    )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_every_caption_says_the_combination_and_nothing_else(demo, split):
    for spec in demo[split]:
        for caption in spec.captions:
            assert read_back(caption) == meaning(spec), caption
            assert len(caption.split()) <= (16 if len(spec.objects) == 1 else 24), caption
            assert not {"None", "{", "}"} & set(caption)


def test_a_training_clip_has_three_different_captions_and_a_test_clip_one(demo):
    assert all(len(set(spec.captions)) == 3 for spec in demo["train"])
    assert all(len(spec.captions) == 1 for split in ("val", "test") for spec in demo[split])


def test_picture_captions_name_the_looks_and_no_motion(demo):
    for spec in demo["images"]:
        (caption,) = spec.captions
        looks = [(SIZE_OF[s], c, SHAPE_OF[f]) for s, c, f in re.findall(OBJECT, caption)]
        assert looks == [(w.size, w.colour, w.shape) for w in meaning(spec)], caption
        assert not any(re.search(rf"\b{form}\b", caption) for form in MOTION_OF), caption
        grounds = [kind for kind, names in words.BACKGROUND_WORDS.items() if any(n in caption.split() for n in names)]
        assert grounds in ([], [spec.background.kind])


def test_no_phrase_means_two_motions_and_the_vocabulary_is_small(demo):
    forms = [form for pairs in words.MOTION_WORDS.values() for pair in pairs for form in pair]
    assert len(forms) == len(set(forms))
    captions = [caption for split in demo.values() for spec in split for caption in spec.captions]
    vocabulary = {word for caption in captions for word in caption.split()}
    assert 80 <= len(vocabulary) <= 130
    trained = {word for spec in demo["train"] for caption in spec.captions for word in caption.split()}
    assert {word for spec in demo["test"] for word in spec.captions[0].split()} <= trained


# ---- pixels


@functools.cache
def singles():
    return [spec for spec in clip_specs(WorldConfig(train=1200), "train") if len(spec.objects) == 1]


def one_object(motion, count=4):
    """Training clips of one object with a motion, on the square and on other canvases."""
    found = [spec for spec in singles() if spec.objects[0].what.motion == motion]
    squares = [spec for spec in found if spec.width == spec.height == 64]
    return squares[: count // 2] + [spec for spec in found if spec not in squares][: count - count // 2]


def mask_of(spec):
    """(T, H, W): where a frame differs from the clip's own empty background."""
    empty = render_clip(replace(spec, objects=()))
    return np.abs(render_clip(spec).astype(int) - empty).sum(-1) > 60


def track(spec):
    """Centroid x_T, y_T in units of the 64-unit square, and area_T in square units."""
    mask_THW = mask_of(spec)
    scale = min(spec.width, spec.height) / 64
    rows, columns = np.arange(spec.height)[:, None], np.arange(spec.width)
    area_T = mask_THW.sum((1, 2))
    x_T, y_T = ((mask_THW * place).sum((1, 2)) / np.maximum(area_T, 1) / scale for place in (columns, rows))
    return x_T, y_T, area_T / scale**2


@pytest.mark.parametrize(("motion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_translations_go_their_way(motion, axis, sign):
    for spec in one_object(motion):
        moved, other = track(spec)[axis], track(spec)[1 - axis]
        assert (sign * np.diff(moved) > 0).all()
        assert sign * (moved[-1] - moved[0]) > 20
        assert np.ptp(other) < 2.5


@pytest.mark.parametrize(("motion", "sign"), [("clockwise", 1), ("anticlockwise", -1)])
def test_circles_turn_their_way(motion, sign):
    for spec in one_object(motion):
        x_T, y_T, _ = track(spec)
        thing = spec.objects[0]
        scale = min(spec.width, spec.height) / 64
        centre_x = thing.x + (spec.width / scale - 64) / 2
        centre_y = thing.y + (spec.height / scale - 64) / 2
        turned_T = np.unwrap(np.arctan2(y_T - centre_y, x_T - centre_x))  # y points down: clockwise is positive
        assert 0.85 < sign * (turned_T[-1] - turned_T[0]) / (2 * np.pi) < 1.25
        assert (sign * np.diff(turned_T) > 0).all()


@pytest.mark.parametrize(("motion", "sign"), [("growing", 1), ("shrinking", -1)])
def test_growing_and_shrinking_change_the_area(motion, sign):
    for spec in one_object(motion):
        x_T, y_T, area_T = track(spec)
        assert sign * np.log(area_T[-1] / area_T[0]) > np.log(3)
        assert (sign * np.diff(area_T) >= -3).all()
        assert max(np.ptp(x_T), np.ptp(y_T)) < 2.5


def test_spinning_turns_in_place():
    for spec in one_object("spinning", 8):
        x_T, y_T, area_T = track(spec)
        assert max(np.ptp(x_T), np.ptp(y_T)) < 4  # a moon's middle is nearly its centre
        assert area_T.max() / area_T.min() < 1.25
        frames_THW3 = render_clip(spec)[:: max(1, spec.frames // 8)].astype(int)
        changed = (np.abs(np.diff(frames_THW3, axis=0)).sum(-1) > 40).sum((1, 2))
        assert (changed > 0.08 * area_T.mean()).all()


def test_blinking_comes_and_goes_in_eight_even_frames():
    for spec in one_object("blinking", 8):
        for places in (np.linspace(0, spec.frames - 1, 8), (np.arange(8) + 0.5) * spec.frames / 8):
            shown = track(spec)[2][places.astype(int)] > 0
            assert 2 <= shown.sum() <= 6
            assert np.abs(np.diff(shown.astype(int))).sum() >= 2


def test_bouncing_goes_up_and_down_in_place():
    for spec in one_object("bouncing", 8):
        x_T, y_T, _ = track(spec)
        assert np.ptp(x_T) < 2.5
        assert np.ptp(y_T) > 18
        turns = np.diff(np.sign(np.diff(y_T)[np.abs(np.diff(y_T)) > 0.2]))
        assert (turns != 0).sum() >= 2


def test_still_shows_one_frame_again_and_again():
    for spec in one_object("still"):
        frames = render_clip(spec)
        assert (frames == frames[0]).all()


def test_objects_stay_in_the_central_square(demo):
    for spec in demo["train"][:400]:
        for thing, moment in itertools.product(spec.objects, np.linspace(0, 1, 33)):
            x, y, radius, _, _ = pose(thing, float(moment))
            assert min(x, y, 64 - x, 64 - y) >= 0.99 * radius, thing


def test_sizes_and_shapes_cover_different_areas():
    areas = {size: [] for size in SIZES}
    for motion in ("still", "left", "spinning"):
        for spec in one_object(motion, 16):
            areas[spec.objects[0].what.size].append(track(spec)[2].mean())
    assert np.median(areas["large"]) > 2 * np.median(areas["small"])
    assert min(areas["small"]) > 50  # square units: never a speck


def test_an_object_has_its_colour():
    for spec in one_object("still", 16):
        inside = render_clip(spec)[0][mask_of(spec)[0]].astype(float)
        middle = np.median(inside, axis=0)
        nearest = min(COLOURS, key=lambda name: np.abs(middle - COLOURS[name]).sum())
        assert nearest == spec.objects[0].what.colour


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_looks_like_no_other(shape):
    """Drawn alike, two shapes differ on more than an eighth of the pixels that either covers."""
    (still,) = one_object("still", 2)[:1]
    thing = replace(still.objects[0], radius=13.0, angle=0.0, x=32.0, y=32.0)

    def silhouette(name):
        return mask_of(replace(still, objects=(replace(thing, what=thing.what._replace(shape=name)),)))[0]

    mine = silhouette(shape)
    for other in set(SHAPES) - {shape}:
        assert (mine ^ silhouette(other)).sum() > (mine | silhouette(other)).sum() / 8, other


def test_one_frame_does_not_betray_left_from_right(demo):
    """Over many clips, drawn frames of opposite motions lie in the same places."""
    places = {motion: [] for motion in ("left", "right")}
    for spec in demo["train"]:
        for thing in spec.objects:
            if thing.what.motion in places:
                places[thing.what.motion] += [pose(thing, (k + 0.5) / 8)[0] for k in range(8)]
    low, high = (np.quantile(values, [0.1, 0.5, 0.9]) for values in places.values())
    assert np.abs(low - high).max() < 2.5


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(fingerprint(), indent=1) + "\n")
