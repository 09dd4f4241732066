"""How large a published model is, read from the shapes of its tensors: nobody has to say which size a file holds.

One thing no shape tells: the number of attention heads of the text tower. Every BERT that Google published has heads
of 64, so width / 64 is assumed, and `heads` says otherwise.
"""

import math
import re
from typing import Any

from configs.errors import UserError
from configs.loader import validate
from pretrain.models.config import JointConfig, TextConfig, VisionConfig
from pretrain.released.names import VISION
from pretrain.weight_files import State

HEAD_WIDTH = 64
BERT = "text_encoder.bert."


class Shapes:
    """The shapes of a state dict, asked for one axis at a time; names that were asked for in vain are kept."""

    def __init__(self, tensors: State, prefix: str = "") -> None:
        self.shapes = {
            name.removeprefix(prefix): tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)
        }
        self.prefix = prefix
        self.wanting: list[str] = []

    def axis(self, axis: int, *names: str) -> int:
        """The length along `axis` of the first of `names` that is there and has that axis; 0 if none is."""
        for name in names:
            shape = self.shapes.get(name, ())
            if -len(shape) <= axis < len(shape):
                return shape[axis]
        self.wanting.append(self.prefix + names[0])
        return 0

    def count(self, pattern: str) -> int:
        """One more than the largest number that `pattern`'s group matches among the names."""
        found = [int(match[1]) for name in self.shapes if (match := re.match(pattern, name))]
        return max(found, default=-1) + 1

    def require(self) -> None:
        """UserError if a shape that the sizes are read from was not there."""
        if self.wanting:
            raise UserError(
                f"The sizes of this model cannot be read, since these are missing: {', '.join(self.wanting)}.",
                "Give a whole published file.",
            )


def vision_config(tensors: State, prefix: str = "") -> VisionConfig:
    """The encoder whose weights these are, by our names; `prefix` is `vision_encoder.` inside a joint model.

    One frame where there is no temporal embedding, as in an image model. Raises UserError where a shape is missing, or
    says what no VideoMamba can be (a grid that is not square, a patch that is not).
    """
    of = Shapes(tensors, prefix)
    mixer = "layers.0.mixer."
    width = of.axis(-1, "cls_token", "pos_embed", "layers.0.norm.weight", "norm.weight")
    inner = of.axis(0, f"{mixer}A_log", f"{mixer}D", f"{mixer}conv1d.bias")
    rank = of.axis(1, f"{mixer}dt_proj.weight", f"{mixer}dt_proj_b.weight")
    kernel = "patch_embed.proj.weight"
    patch, tubelet = of.axis(-1, kernel), of.axis(2, kernel)
    places = of.axis(1, "pos_embed")
    state, d_conv, channels = of.axis(1, f"{mixer}A_log"), of.axis(2, f"{mixer}conv1d.weight"), of.axis(1, kernel)
    of.require()
    side = _side(places - 1)
    time = of.shapes.get("temporal_pos_embedding", (1, 0, width))[1]
    settings: dict[str, Any] = {
        "depth": of.count(r"layers\.(\d+)\."), "width": width, "patch_size": patch, "tubelet": tubelet,
        "frames": time * tubelet or 1, "image_size": side * patch, "channels": channels, "d_state": state,
        "expand": _expand(inner, width), "d_conv": d_conv,
        "dt_rank": "auto" if rank == math.ceil(width / 16) else rank,
        "align_width": of.shapes.get("clip_decoder.0.head.weight", (0,))[0],
        "align_layers": of.count(r"clip_decoder\.(\d+)\.") or 1,
        "pool_norm": "pool_norm.weight" in of.shapes,
        "classes": of.shapes.get("head.weight", (0,))[0],
        "dt_init": "released",
        "align_source": "released" if "clip_decoder.0.head.weight" in of.shapes else "output",
    }  # fmt: skip
    return validate(settings, VisionConfig, "the vision encoder of this file")


def text_config(tensors: State, heads: int | None = None, max_tokens: int = 32) -> TextConfig:
    """The text tower of a joint state dict; `heads` if they are not 64 wide. Raises UserError as above."""
    of = Shapes(tensors, BERT)
    words, layer = "embeddings.word_embeddings.weight", "encoder.layer.0."
    width, vocabulary = of.axis(1, words), of.axis(0, words)
    positions = of.axis(0, "embeddings.position_embeddings.weight")
    intermediate = of.axis(0, f"{layer}intermediate.dense.weight", f"{layer}intermediate.dense.bias")
    of.require()
    layers = of.count(r"encoder\.layer\.(\d+)\.")
    fusion = [n for n in range(layers) if any(f"layer.{n}.crossattention." in name for name in of.shapes)]
    first = min(fusion, default=layers)
    settings = {
        "width": width, "heads": heads or _heads(width), "layers": first, "fusion_layers": layers - first,
        "intermediate": intermediate, "vocab_size": vocabulary, "positions": positions,
        "max_tokens": min(max_tokens, positions),
    }  # fmt: skip
    return validate(settings, TextConfig, "the text tower of this file")


def joint_config(tensors: State, heads: int | None = None, max_tokens: int = 32) -> JointConfig:
    """Both towers of a joint state dict and the width of the space they meet in. Raises UserError as above."""
    of = Shapes(tensors)
    embed = of.axis(0, "vision_proj.weight", "text_proj.weight", "vision_proj.bias")
    of.require()
    vision, text = vision_config(tensors, VISION), text_config(tensors, heads, max_tokens)
    return JointConfig(vision=vision, text=text, embed=embed)


def _heads(width: int) -> int:
    if width % HEAD_WIDTH:
        raise UserError(
            f"The text tower is {width} wide, which does not divide into heads of {HEAD_WIDTH}, and no shape tells "
            "how many heads there are.",
            "Give --heads.",
        )
    return width // HEAD_WIDTH


def _side(places: int) -> int:
    side = math.isqrt(places)
    if side * side != places:
        raise UserError(
            f"pos_embed has {places} places after cls, which is no square grid.",
            "Only models of square frames can be read; they see other frames by resizing.",
        )
    return side


def _expand(inner: int, width: int) -> int:
    if inner % width:
        raise UserError(
            f"The mixers are {inner} wide inside, which is no multiple of the width {width}.",
            "Give a file of the VideoMamba release.",
        )
    return inner // width
