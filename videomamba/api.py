"""The public functions that no single part owns."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.models.videomamba import VideoMamba


def create_model(name: str = "middle", **options: Any) -> "VideoMamba":
    """A freshly initialised video encoder of a published size: tiny, small, middle or base.

    `options` are the fields of `pretrain.models.config.VisionConfig`, such as `frames=16` or `classes=400`.
    Raises ConfigError, naming the nearest valid one, for a size or an option that does not exist.
    """
    from configs.loader import validate
    from pretrain.models.config import VisionConfig

    config = validate({"name": name, **options}, VisionConfig, "create_model")

    from pretrain.models.videomamba import VideoMamba

    return VideoMamba(config)
