"""From pixels to tokens: patches against loops, images, and positions at other lengths and sizes."""

import math

import pytest
import torch
from torch.nn import functional as F

from pretrain.models.pos_embed import resize_spatial, resize_temporal, sincos_table


@pytest.mark.parametrize("stem", ["linear", "conv"])
@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize("size", [(32, 32), (16, 40), (48, 8)])
def test_every_token_is_its_patch_and_its_place(encoder, size, tubelet, stem):
    """Patch by patch, for inputs of other lengths and sizes than the config's, and not square ones."""
    model = encoder(tubelet=tubelet, stem=stem)
    clip = torch.randn(2, 3, 6, *size)
    rows, columns = size[0] // 8, size[1] // 8
    tokens, (frames, *_) = model._embed(clip, None)
    assert tokens.shape == (2, 1 + 6 // tubelet * rows * columns, 32)
    spatial = resize_spatial(model.pos_embed, (rows, columns))[0]
    temporal = resize_temporal(model.temporal_pos_embedding, frames)[0]
    torch.testing.assert_close(tokens[:, 0], (model.cls_token[0] + spatial[0]).expand(2, -1))
    for k in range(frames):
        for row in range(rows):
            for column in range(columns):
                pixels = clip[:, :, k * tubelet : (k + 1) * tubelet, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
                place = row * columns + column
                expected = model.patch_embed(pixels)[:, 0] + spatial[1 + place] + temporal[k]
                ours = tokens[:, 1 + k * rows * columns + place]
                torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_rows_and_columns_are_resized_each_along_its_own():
    """A table that grows along rows alone still does so on any grid, and one of columns along columns."""
    side = torch.arange(4.0)
    by_row, by_column = side[:, None].expand(4, 4), side[None].expand(4, 4)
    table = torch.stack([by_row.flatten(), by_column.flatten()], dim=1)[None]
    resized = resize_spatial(torch.cat([torch.zeros(1, 1, 2), table], 1), (2, 6))[0, 1:].view(2, 6, 2)
    torch.testing.assert_close(resized[..., 0], resized[:, :1, 0].expand(2, 6))
    torch.testing.assert_close(resized[..., 1], resized[:1, :, 1].expand(2, 6))
    assert (resized[..., 0].diff(dim=0) > 0).all()
    assert (resized[..., 1].diff(dim=1) > 0).all()


def test_the_conv_stem_is_its_convolutions(encoder, clip):
    model = encoder(stem="conv")
    embed = model.patch_embed
    frames = clip.transpose(1, 2).flatten(0, 1)
    lit = F.gelu(embed.stem(frames)).unflatten(0, (3, 4)).transpose(1, 2)
    tokens = embed.proj(lit).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(clip), tokens, rtol=1e-4, atol=1e-5)


def test_an_image_has_no_time_and_fills_a_tubelet(encoder, clip):
    model = encoder()
    image = clip[:, :, :1]
    out = model(image)
    assert out.tokens_BLD.shape == (3, 17, 32)
    assert out.frames == 1
    with torch.no_grad():
        model.temporal_pos_embedding += 5
    torch.testing.assert_close(model(image).tokens_BLD, out.tokens_BLD)
    twice = image.expand(-1, -1, 2, -1, -1)
    assert not torch.allclose(model(twice).tokens_BLD, out.tokens_BLD, atol=1e-4)
    with torch.no_grad():
        model.temporal_pos_embedding.zero_()
    torch.testing.assert_close(model(twice).tokens_BLD, out.tokens_BLD)


def test_other_lengths_and_sizes_resize_the_positions(encoder):
    model = encoder(align_width=8)
    out = model(torch.randn(1, 3, 8, 48, 40))
    assert out.tokens_BLD.shape == (1, 1 + 4 * 6 * 5, 32)
    assert model.align(out).shape == (1, 1, 121, 8)
    with pytest.raises(ValueError, match="3 frames of 32x36"):
        model(torch.randn(1, 3, 3, 32, 36))
    for shape in ((1, 4, 3, 32, 32), (3, 4, 32, 32)):  # frames before channels, and a clip without its batch
        with pytest.raises(ValueError, match=r"expected clips as \(batch, 3, frames, height, width\)"):
            model(torch.randn(shape))


def test_position_tables():
    spatial, temporal = torch.randn(1, 17, 6), torch.randn(1, 4, 6)
    assert resize_spatial(spatial, (4, 4)) is spatial
    assert resize_temporal(temporal, 4) is temporal
    assert resize_spatial(spatial, (2, 6))[:, 0].equal(spatial[:, 0])
    with pytest.raises(ValueError, match="not a square"):
        resize_spatial(spatial[:, 1:], (2, 2))
    table = sincos_table(5, 6)
    for position in range(5):
        for column in range(6):
            angle = position / 10000 ** (2 * (column // 2) / 6)
            assert table[position, column] == pytest.approx(math.sin(angle) if column % 2 == 0 else math.cos(angle))


def test_an_image_model_knows_no_time(encoder):
    model = encoder(tubelet=1, frames=1)
    assert not any("temporal" in name for name in model.state_dict())
    assert model(torch.randn(1, 3, 1, 48, 16)).tokens_BLD.shape == (1, 1 + 6 * 2, 32)
    with pytest.raises(ValueError, match=r"an image model \(frames: 1\) has no temporal embedding for a clip of 4"):
        model(torch.randn(1, 3, 4, 32, 32))


def test_one_token_frame_of_a_clip_is_no_image(encoder):
    """Two frames in a tubelet of two are a clip, and have a time."""
    model = encoder(frames=2)
    clip = torch.randn(1, 3, 2, 32, 32)
    before = model(clip).tokens_BLD
    with torch.no_grad():
        model.temporal_pos_embedding += 1
    assert not torch.allclose(before, model(clip).tokens_BLD, atol=1e-3)
