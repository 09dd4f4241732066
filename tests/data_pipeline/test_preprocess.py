import math

import numpy as np
import pytest
import torch

from configs.errors import ConfigError, UserError
from configs.loader import validate
from data_pipeline.config import CorpusConfig, DataConfig
from data_pipeline.draws import uniform_np
from data_pipeline.frame_cache import CacheSpec
from data_pipeline.preprocess import CLIP_MEAN, CLIP_STD, TextPreprocess, VisualPreprocess, clean_caption, require_same
from data_pipeline.torchvision_shim import ensure_torchvision
from data_pipeline.transforms import CROP_DRAWS, crop_box, crop_to_square, from_decoder, to_square


def test_normalise_is_the_formula_in_every_channel():
    frames = torch.randint(0, 256, (2, 3, 4, 5, 6), dtype=torch.uint8)
    visual = VisualPreprocess(frames=4, image_size=6, mean=CLIP_MEAN, std=CLIP_STD)
    expected = frames.double() / 255
    for channel in range(3):
        expected[:, channel] = (expected[:, channel] - CLIP_MEAN[channel]) / CLIP_STD[channel]
    found = visual.normalise(frames)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)
    assert visual.normalise(frames, torch.bfloat16).dtype == torch.bfloat16


def test_a_digest_names_every_field():
    base = VisualPreprocess()
    changes = {
        "frames": 4,
        "image_size": 96,
        "resize": "crop",
        "interpolation": "bilinear",
        "mean": (0, 0, 0),
        "std": (1, 1, 1),
        "first_seconds": 30.0,
    }
    assert set(changes) == set(VisualPreprocess.model_fields), "a new field needs a line here"
    digests = {base.digest} | {base.model_copy(update={key: value}).digest for key, value in changes.items()}
    assert len(digests) == len(changes) + 1
    assert VisualPreprocess().digest == base.digest


def test_names_given_before_a_field_was_added_stay():
    """Exports, indexes and checkpoints hold these: taken before `first_seconds` came."""
    assert VisualPreprocess().digest == "5fef61a15d34045f"
    demo = VisualPreprocess(
        frames=4, image_size=96, resize="crop", interpolation="bilinear", mean=CLIP_MEAN, std=CLIP_STD
    )
    assert demo.digest == "5d8c035645db8226"
    assert CacheSpec("abc", 40, 16, 96, "stretch", "bicubic").key == "640d1a03d4659f1768667004"


def test_a_mismatch_is_refused_by_name():
    require_same(VisualPreprocess(), VisualPreprocess(), "the index")
    with pytest.raises(UserError, match="image_size is 96 there and 224 here"):
        require_same(VisualPreprocess(), VisualPreprocess(image_size=96), "the index")
    with pytest.raises(UserError):
        require_same(VisualPreprocess(), TextPreprocess(), "the index")


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("released", "a man-made person's red/blue ball".replace("-", " ").replace("/", " ").replace("'", "")),
        ("lower", "a man-made, <person>'s red/blue (ball)!"),
        ("none", "A man-made, <person>'s RED/blue (ball)!"),
    ],
)
def test_captions_are_cleaned_by_rule(rule, expected):
    assert clean_caption("  A man-made,  <person>'s RED/blue\n(ball)! ", rule) == expected
    assert TextPreprocess(clean=rule).clean_caption("x") == "x"


def test_resize_stretches_or_crops_the_centre():
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 20:60] = 200  # the central square
    tensor = from_decoder(frames)
    assert tensor.shape == (2, 3, 40, 80)
    stretched = to_square(tensor, 20, "stretch", "bicubic")
    assert stretched.shape == (2, 3, 20, 20)
    assert stretched[0, 0, 10, 0] == 0
    cropped = to_square(tensor, 20, "crop", "bicubic")
    assert cropped.shape == (2, 3, 20, 20)
    assert int(cropped.min()) >= 195


def test_resizing_is_antialiased():
    """A one-pixel checkerboard shrunk four times is grey; a resizer without a filter would give black and white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    frames = from_decoder(np.repeat(board[None, :, :, None], 3, axis=3))
    small = to_square(frames, 16, "stretch", "bicubic").float()
    assert small.min() > 120
    assert small.max() < 135


def test_random_crops_keep_the_area_and_ratio_asked_for_and_reach_every_side():
    draws = uniform_np(np.arange(1500), "crop", CROP_DRAWS)
    boxes = np.array([crop_box(row.tolist(), 120, 160, (0.5, 1.0), (3 / 4, 4 / 3)) for row in draws])
    top, left, height, width = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 120).all()
    assert (left + width <= 160).all()
    share = height * width / (120 * 160)
    assert share.min() > 0.49
    ratio = width / height
    assert ratio.min() > 0.73
    assert ratio.max() < 1.36
    assert len(np.unique(top)) > 30
    assert len(np.unique(left)) > 30


def test_random_crops_are_distributed_as_torchvisions():
    ensure_torchvision()
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    theirs_crop = RandomResizedCrop(224, scale=(0.5, 1.0))
    image = torch.empty(3, 120, 160)
    theirs = [theirs_crop.make_params([image]) for _ in range(1500)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in theirs])
    draws = uniform_np(np.arange(1500), "crop", CROP_DRAWS)
    ours = np.array([crop_box(row.tolist(), 120, 160, (0.5, 1.0), (3 / 4, 4 / 3)) for row in draws])
    for column in range(4):  # Kolmogorov-Smirnov: 1500 against 1500 pass 0.07 with a probability near 0.001
        values = np.arange(161)
        gap = np.abs(
            np.searchsorted(np.sort(ours[:, column]), values, "right")
            - np.searchsorted(np.sort(theirs[:, column]), values, "right")
        )
        assert gap.max() / 1500 < 0.07


def test_a_crop_that_never_fits_falls_back_to_the_centre():
    assert crop_box([0.999] * CROP_DRAWS, 10, 100, (1.0, 1.0), (3 / 4, 4 / 3)) == (0, 43, 10, 13)
    assert crop_box([0.999] * CROP_DRAWS, 100, 10, (1.0, 1.0), (3 / 4, 4 / 3)) == (43, 0, 13, 10)


def test_all_frames_of_a_clip_are_cropped_alike():
    frames = from_decoder(np.repeat(np.random.default_rng(0).integers(0, 255, (1, 30, 40, 3), np.uint8), 5, axis=0))
    cut = crop_to_square(frames, (3, 7, 20, 25), 16, "bicubic")
    assert cut.shape == (5, 3, 16, 16)
    assert torch.equal(cut, cut[:1].expand_as(cut))


CORPUS = {"path": "x"}


@pytest.mark.parametrize(
    "tree, words",
    [
        ({"train": []}, ["train"]),
        ({"train": [CORPUS], "bacth": 3}, ["bacth", "batch"]),
        ({"train": [CORPUS], "crop_scale": [1.0, 0.5]}, ["crop_scale", "[smallest, largest]"]),
        (
            {"train": [{**CORPUS, "group_by": ["a"], "group_size": 4}], "batch": 30},
            ["30", "groups of 4", "batch of 32"],
        ),
        ({"train": [{**CORPUS, "group_by": ["a"]}]}, ["group_size", "2 or more"]),
        ({"train": [CORPUS, {**CORPUS, "weight": 2}]}, ["1 of 2 corpora", "every corpus"]),
        ({"train": [CORPUS], "cache": "c", "cache_frames": 4}, ["cache_frames is 4", "8 frames"]),
        ({"train": [CORPUS], "cache": "c", "frames": {"rule": "dense"}}, ["dense", "data.cache", "cache=null"]),
    ],
)
def test_a_wrong_data_config_is_told_with_its_cure(tree, words):
    with pytest.raises(ConfigError) as told:
        validate(tree, DataConfig, "run.yaml")
    for word in words:
        assert word in str(told.value)


def test_image_corpora_may_have_their_own_batch():
    config = DataConfig(train=(CorpusConfig(path="x"), CorpusConfig(path="y", kind="image")), batch=64, image_batch=128)
    assert (config.batch_of("video"), config.batch_of("image")) == (64, 128)
    assert config.visual() == VisualPreprocess()
    assert math.isclose(sum(config.visual().mean), 0.485 + 0.456 + 0.406)


def test_the_config_needs_no_torch(python):
    code = "import sys, data_pipeline.config, data_pipeline.order, data_pipeline.frames; print('torch' in sys.modules)"
    ran = python("-c", code)
    assert ran.stdout.strip() == "False", ran.stderr
