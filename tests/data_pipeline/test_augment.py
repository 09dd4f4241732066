import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from configs.errors import ConfigError
from configs.loader import validate
from data_pipeline.augment import affine, augment, color_jitter, erase, operate, turned
from data_pipeline.clips import Augment, Draws
from data_pipeline.config import AugmentConfig, CorpusConfig, DataConfig
from data_pipeline.loader import TrainLoader
from data_pipeline.preprocess import IMAGENET_MEAN, IMAGENET_STD, VisualPreprocess
from data_pipeline.rand_policy import OPERATIONS, RandAugment, argument
from data_pipeline.torchvision_shim import ensure_torchvision
from data_pipeline.transforms import crop_to_square, multi_scale_box, resize, three_crops

FILL = (124, 116, 104)
NAME = "rand-m7-n4-mstd0.5-inc1"


def smooth(height, width, frames=1, seed=0):
    """A picture with soft edges, a stretch of one tone and channels of their own range, as photographs have."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(20, 230, (5, 7, 3), np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).copy()
    picture[: height // 4, : width // 3] = (60, 90, 200)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    return tensor[None].repeat(frames, 1, 1, 1)


def as_pillow(frames_TCHW):
    return Image.fromarray(frames_TCHW[0].permute(1, 2, 0).numpy())


def gap(frames_TCHW, image):
    return np.abs(frames_TCHW[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(image).astype(int))


TIMMS = {
    "autocontrast": "AutoContrast", "equalize": "Equalize", "invert": "Invert", "rotate": "Rotate",
    "posterize": "PosterizeIncreasing", "solarize": "SolarizeIncreasing", "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing", "contrast": "ContrastIncreasing", "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing", "shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", [(33, 47), (64, 21)])
def test_each_operation_is_what_timm_does_with_pillow(operation, size, monkeypatch):
    ensure_torchvision()
    from timm.data import auto_augment as timm

    for magnitude in (0.0, 3.3, 7.0, 9.9):
        for negative in (False, True):
            monkeypatch.setattr(timm.random, "random", lambda negative=negative: 0.9 if negative else 0.1)
            told = timm.LEVEL_TO_ARG[TIMMS[operation]]
            arguments = told(magnitude, {"translate_pct": 0.45}) if told else ()
            ours = argument(operation, magnitude, True, negative)
            if arguments:
                assert ours == pytest.approx(arguments[0])
            frames = smooth(*size)
            image = timm.NAME_TO_OP[TIMMS[operation]](
                as_pillow(frames), *arguments, fillcolor=FILL, resample=Image.Resampling.BILINEAR
            )
            difference = gap(operate(frames, operation, ours, FILL), image)
            assert difference.mean() < 1  # Pillow cuts fractions off, and these are rounded
            assert (difference > 2).mean() < 0.003  # at the frame's border, where rounding decides on which side


def test_what_is_drawn_by_a_name_is_what_timm_would_draw():
    policy = RandAugment.parse(NAME)
    assert policy == RandAugment(m=7.0, n=4, mstd=0.5, inc=True)
    drawn = [policy.draw(seed) for seed in range(4000)]
    counts = np.array([len(steps) for steps in drawn])
    assert abs(counts.mean() - 2) < 0.06
    assert set(counts) == {0, 1, 2, 3, 4}
    steps = [step for steps in drawn for step in steps]
    shares = np.array([sum(name == operation for name, _ in steps) for operation in OPERATIONS]) / len(steps)
    assert np.abs(shares - 1 / 15).max() < 0.012
    degrees = np.array([value for name, value in steps if name == "rotate"])
    assert abs(np.abs(degrees).mean() - 21) < 0.3  # 7 of 10 of 30 degrees
    assert abs(np.abs(degrees).std() - 1.5) < 0.2  # 0.5 of 10 of 30
    assert abs((degrees > 0).mean() - 0.5) < 0.1
    assert policy.draw(5) == policy.draw(5)
    even = RandAugment.parse("rand-m10-n1-mstd101-p1")
    degrees = [abs(value) for seed in range(3000) for name, value in even.draw(seed) if name == "rotate"]
    assert abs(np.mean(degrees) - 15) < 1.5


@pytest.mark.parametrize("name", ["rnd-m7", "rand-m7-q3", "rand-m11", "rand-m7-m7", "rand-mstd", "rand-n0", "rand-p2"])
def test_a_wrong_name_is_told_with_its_cure(name):
    with pytest.raises(ConfigError, match=r"rand-m7-n4-mstd0\.5-inc1|0 <= m"):
        validate({"train": [{"path": "x"}], "augment": {"rand_augment": name}}, DataConfig, "run.yaml")


@pytest.mark.parametrize("size", [(31, 45), (8, 64)])
@pytest.mark.parametrize("degrees", [0.0, 12.5, -29.0])
def test_geometry_is_pillows_also_at_the_border(size, degrees):
    frames = smooth(*size)
    for matrix in (turned(degrees, *size), (1, 0.21, 0, 0, 1, 0), (1, 0, 7.3, 0, 1, -4.6), (0.9, 0.1, 2, -0.2, 1.1, 3)):
        image = as_pillow(frames).transform(
            size[::-1], Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
        )
        difference = gap(affine(frames, matrix, FILL), image)
        assert (difference > 1).mean() < 0.004
    image = as_pillow(frames).rotate(degrees, Image.Resampling.BILINEAR, fillcolor=FILL)
    assert (gap(affine(frames, turned(degrees, *size), FILL), image) > 1).mean() < 0.004


def test_colour_jitter_stays_in_its_range_and_is_torchvisions():
    ensure_torchvision()
    from torchvision.transforms.v2 import functional

    frames = smooth(21, 33)
    for seed in range(20):
        only = color_jitter(frames, (0.4, 0, 0, 0), seed)
        low, high = functional.adjust_brightness(frames, 0.6), functional.adjust_brightness(frames, 1.4)
        assert (only >= low).all()
        assert (only <= high).all()
    assert torch.equal(color_jitter(frames, (0, 0, 0, 0), 3), frames)
    both = {color_jitter(frames, (0.4, 0.4, 0.2, 0.1), seed).sum().item() for seed in range(20)}
    assert len(both) == 20


def test_erasing_covers_what_timm_would_and_keeps_the_rest():
    frames = torch.full((3, 3, 60, 90), 255, dtype=torch.uint8)
    shares = []
    for seed in range(400):
        erased = erase(frames, 0.25, seed, IMAGENET_MEAN, IMAGENET_STD)
        changed = (erased != frames).any(1)
        if changed.any():
            rows, columns = changed[0].any(1).nonzero(), changed[0].any(0).nonzero()
            box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            shares.append(float(box) / (60 * 90))
            assert torch.equal(erased, erased[:1].expand_as(erased))
    assert 70 < len(shares) < 130
    assert min(shares) > 0.015
    assert max(shares) < 0.35
    noise = erase(frames, 1.0, 2, IMAGENET_MEAN, IMAGENET_STD)
    inside = noise[0, 0][(noise[0] != 255).any(0)].float()
    assert abs(inside.mean() - 255 * 0.485) < 8


EVERYTHING = AugmentConfig(color_jitter=(0.4, 0.4, 0.4, 0.1), rand_augment=NAME, erase=0.5)


def test_all_frames_of_a_clip_are_changed_alike_and_only_by_the_seed():
    frames = smooth(37, 53, frames=5)
    seen = set()
    for seed in range(60):
        changed = augment(frames, EVERYTHING, seed, IMAGENET_MEAN, IMAGENET_STD)
        assert changed.dtype == torch.uint8
        assert torch.equal(changed, changed[:1].expand_as(changed)), seed
        assert torch.equal(changed, augment(frames, EVERYTHING, seed, IMAGENET_MEAN, IMAGENET_STD))
        seen.add(changed.sum().item())
    assert len(seen) > 50
    assert torch.equal(augment(frames, AugmentConfig(), 1, IMAGENET_MEAN, IMAGENET_STD), frames)


def test_augmentation_does_not_depend_on_workers(clip_corpus):
    def batches(workers):
        config = DataConfig(
            train=(CorpusConfig(path=str(clip_corpus), flip=True),), batch=6, image_size=33, workers=workers,
            augment=EVERYTHING.model_copy(update={"crop": "multiscale"}),
        )  # fmt: skip
        return [batch.frames for batch in TrainLoader(config, 3, steps=3)]

    none, two = batches(0), batches(2)
    assert all(torch.equal(a, b) for a, b in zip(none, two, strict=True))


def released_multi_scale(height, width, size, pick):
    """GroupMultiScaleCrop as TSN wrote it down, `pick` choosing from a list."""
    base = min(height, width)
    crops = [int(base * x) for x in (1, 0.875, 0.75, 0.66)]
    sides_h = [size if abs(x - size) < 3 else x for x in crops]
    pairs = [(w, h) for i, h in enumerate(sides_h) for j, w in enumerate(sides_h) if abs(i - j) <= 1]
    w, h = pick(pairs)
    dx, dy = (width - w) // 4, (height - h) // 4
    offsets = [(0, 0), (4 * dx, 0), (0, 4 * dy), (4 * dx, 4 * dy), (2 * dx, 2 * dy)]
    offsets += [(0, 2 * dy), (4 * dx, 2 * dy), (2 * dx, 4 * dy), (2 * dx, 0)]
    offsets += [(dx, dy), (3 * dx, dy), (dx, 3 * dy), (3 * dx, 3 * dy)]
    x, y = pick(offsets)
    return y, x, h, w


@pytest.mark.parametrize("size", [(240, 321), (257, 256), (226, 640)])
def test_multi_scale_crops_are_the_released_ones(size):
    generator = np.random.default_rng(0)

    def pick(items):
        return items[generator.integers(len(items))]

    theirs = {released_multi_scale(*size, 224, pick) for _ in range(4000)}
    grid = [(i + 0.5) / 130 for i in range(130)]
    assert {multi_scale_box((a, b), *size, 224) for a in grid for b in grid} == theirs


def test_three_crops_are_the_ends_and_the_middle_of_the_long_side():
    for height, width in ((40, 91), (91, 40), (33, 33)):
        frames = smooth(height, width, frames=2)
        crops = three_crops(frames, 32, "bilinear")
        assert crops.shape == (3, 2, 3, 32, 32)
        short = min(height, width)
        whole = resize(frames, (round(height * 32 / short), round(width * 32 / short)), "bilinear")
        room = max(whole.shape[-2:]) - 32
        for crop, start in zip(crops, (0, room // 2, room), strict=True):
            part = whole.narrow(-1 if width > height else -2, start, 32) if height != width else whole
            assert torch.equal(crop, part)


@pytest.mark.parametrize("size", [(33, 47), (121, 64)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_is_resized_as_pillow_resizes(size, interpolation):
    frames = smooth(*size)
    box = (3, 5, size[0] - 7, size[1] - 9)
    image = as_pillow(frames).crop((5, 3, 5 + box[3], 3 + box[2]))
    expected = image.resize((24, 24), Image.Resampling[interpolation.upper()])
    assert gap(crop_to_square(frames, box, 24, interpolation), expected).max() <= 1


def test_a_mirror_image_is_drawn_for_half_of_the_clips():
    visual = VisualPreprocess(frames=2, image_size=16)
    frames = smooth(16, 16, frames=2)
    draws = Draws.of(np.arange(400), 2)
    mirrored = sum(
        torch.equal(Augment(visual, (1.0, 1.0), (1.0, 1.0), True)(frames, draws, row), frames.flip(-1))
        for row in range(400)
    )
    assert 160 < mirrored < 240
    assert torch.equal(Augment(visual, (1.0, 1.0), (1.0, 1.0), False)(frames, draws, 0), frames)


def test_where_direction_is_told_nothing_may_be_mirrored():
    with pytest.raises(ValidationError, match=r"flip: false there"):
        CorpusConfig(path="ssv2", flip=True, directional=True)
    assert not CorpusConfig(path="ssv2", directional=True).flip
