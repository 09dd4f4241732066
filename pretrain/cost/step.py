"""FLOPs of a training step, part by part: what the model needs, and what is computed twice to save memory.

`model` FLOPs (forward and backward of every part once) are what utilisation is measured against. `beside` are those
that are computed and are not the model's: a second forward pass for activation checkpointing or for the survey of a
batch in micro-batches, and Muon's products.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from data_pipeline.schema import Kind
from pretrain.config import PretrainConfig
from pretrain.cost import arithmetic
from pretrain.models.config import TextConfig, VisionConfig


@dataclass(frozen=True)
class Part:
    """FLOPs of one part of the model in a step: forward, backward, and what is computed beside."""

    name: str
    forward: float
    backward: float
    beside: float = 0.0

    @property
    def model(self) -> float:
        """Forward and backward, once each."""
        return self.forward + self.backward


@dataclass(frozen=True)
class Tokens:
    """How many tokens a clip (or an image) has, and how many of them the student sees, cls counted in both."""

    frames: int
    whole: int
    seen: int


def tokens_of(config: PretrainConfig, kind: Kind) -> Tokens:
    """The tokens of one sample of a kind under the config's mask."""
    from pretrain.masking import visible_count

    vision, mask = config.vision, config.mask
    grid = vision.grid if kind == "video" else (1, *vision.grid[1:])
    whole = grid[0] * grid[1] * grid[2]
    seen = whole
    if mask is not None:
        seen = visible_count(mask.kind, grid, mask.ratio if kind == "video" else mask.image_ratio)
    return Tokens(grid[0], 1 + whole, 1 + seen)


def step_flops(
    config: PretrainConfig,
    vision: VisionConfig,
    kind: Kind,
    clips: int,
    words: float | None = None,
    teacher_frame: float = 0.0,
    in_parts: bool = False,
) -> list[Part]:
    """The parts of a step over `clips` samples of a kind, on all ranks together if `clips` is the global batch.

    `vision` is the encoder as it is built (its `align_width` is the teacher's). `words` is how many tokens a caption
    is padded to (None: as many as the config reads). `teacher_frame` is what the teacher computes for a frame
    (measure.frame_flops), 0 where there is none or its features are cached. `in_parts` says that a rank takes its
    batch in micro-batches.
    """
    tokens = tokens_of(config, kind)
    surveyed = in_parts and config.task == "stage2" and _compares_all(config)
    found = _student(vision, clips, tokens, surveyed)
    if config.text is not None:
        found += _text(config, config.text, vision, clips, tokens, words or config.text.max_tokens, surveyed)
    if teacher_frame and config.teacher is not None:
        frames = 1 if kind == "image" else config.vision.frames // config.teacher.frame_stride
        found.append(Part("teacher", clips * frames * teacher_frame, 0.0))
    return found


def _compares_all(config: PretrainConfig) -> bool:
    """Whether micro-batches have to be surveyed before their graphs are made (stage2.py)."""
    losses = config.losses
    return bool(losses.contrastive.weight) or bool(losses.matching.weight and losses.matching.negatives == "global")


def _student(vision: VisionConfig, clips: int, tokens: Tokens, surveyed: bool) -> list[Part]:
    positions = float(clips * tokens.seen)
    products = sum(arithmetic.block_products(vision, order, positions) for order in vision.orders)
    scans = sum(arithmetic.block_scans(vision, order, positions) for order in vision.orders)
    back = sum(arithmetic.block_scans(vision, order, positions, backward=True) for order in vision.orders)
    embed, embed_back = arithmetic.patches(vision, clips * (tokens.seen - 1), clips * (tokens.whole - 1))
    align = arithmetic.alignment(vision, positions)
    times = int(vision.checkpoint_blocks) + int(surveyed)
    return [
        Part("student: patches", embed, embed_back, embed * surveyed),
        Part("student: projections and convolutions", products, 2 * products, products * times),
        Part("student: scans", scans, back, scans * times),
        *([Part("alignment", align, 2 * align)] if align else []),
    ]


def _text(
    config: PretrainConfig,
    text: TextConfig,
    vision: VisionConfig,
    clips: int,
    tokens: Tokens,
    words: float,
    surveyed: bool,
) -> list[Part]:
    losses, attended = config.losses, tokens.seen - 1
    asked = clips / losses.mlm.every if losses.mlm.weight else 0.0
    judged = 3.0 * clips if losses.matching.weight else 0.0
    paired = float(clips) if losses.contrastive.weight or losses.matching.weight else 0.0
    encode = text.layers * arithmetic.text_layer(text, paired, words)
    masked = text.layers * arithmetic.text_layer(text, asked, words)
    fuse = text.fusion_layers * arithmetic.fusion_layer(text, vision.width, judged + asked, words, attended)
    hidden = asked * (words - 1) * losses.mlm.probability  # [CLS] is never hidden
    head = arithmetic.word_head(text, hidden)
    vectors = 1 if config.mask is not None else tokens.frames
    meet = paired * (
        arithmetic.product(vectors, vision.width, config.embed) + arithmetic.product(1, text.width, config.embed)
    )
    compare = 2 * arithmetic.product(clips, config.embed, clips) if losses.contrastive.weight else 0.0
    again = int(text.checkpoint_layers)
    parts = [
        Part("text layers", encode + masked, 2 * (encode + masked), again * (encode + masked) + surveyed * encode),
        Part("fusion layers", fuse, 2 * fuse, again * fuse),
        Part("masked words", head, 2 * head),
        Part("joint space", meet + compare, 2 * (meet + compare), surveyed * meet),
    ]
    return [part for part in parts if part.forward]


def muon_flops(shapes: Iterable[tuple[int, ...]]) -> Part:
    """What Muon computes in a step for matrices of these shapes, whatever the batch."""
    return Part("Muon", 0.0, 0.0, sum(arithmetic.orthogonalise(*shape) for shape in shapes))
