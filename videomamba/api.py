"""The public functions that no single part owns."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.models.videomamba import VideoMamba


def create_model(name: str | None = "middle", **options: Any) -> "VideoMamba":
    """A freshly initialised encoder of a published size (tiny, small, middle, base), or with `name=None` of any.

    `options` are the fields of `pretrain.models.config.VisionConfig`, such as `frames=16`, `classes=400` or
    `scan_order=("spatial_first", "temporal_first")`; any size needs `depth` and `width`. `frames=1` is an image model.
    docs/models.md shows them. Raises ConfigError, naming the nearest valid one, for what does not exist.
    """
    from configs.loader import validate
    from pretrain.models.config import VisionConfig

    config = validate({"name": name, **options}, VisionConfig, "create_model")

    from pretrain.models.videomamba import VideoMamba

    return VideoMamba(config)
