"""Resized position embeddings against the published ones."""

import math

from pretrain.models.pos_embed import resize_spatial, resize_temporal


def test_resize(golden, errors):
    file = golden("pos_embed_resize")
    side = math.isqrt(file["pos_embed_resized"].shape[1] - 1)
    errors.check("spatial", resize_spatial(file["pos_embed"], (side, side)), file["pos_embed_resized"])
    frames = file["temporal_resized"].shape[1]
    errors.check("temporal", resize_temporal(file["temporal_pos_embedding"], frames), file["temporal_resized"])
