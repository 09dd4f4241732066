"""FLOPs of the parts of a model, by formula, forward: a multiplication and an addition are two.

Counted are matrix products, convolutions, attention and the scan; norms, activations, softmax and losses, which are
bound by memory and not by arithmetic, are not. Letters: B clips, T frames, K token frames, N patches a frame, V visible
tokens with cls, D width, E inner width, S states, R rank of the time step, L words, W the text's width, P tokens that
words attend to.
"""

from pretrain.models.config import STEM_STRIDE, TextConfig, VisionConfig

SCAN_FORWARD, SCAN_BACKWARD = 7, 15
"""Operations on every state of every position and channel, an exponential counting as one.

Forward: delta A, exp, times the state, x B, their sum, times C, the sum over states. Backward: the state's gradient by
y and by what follows (dy C, g decay, their sum), the gradients by decay, exp, delta, A, x, B and C, and the sums over
states and channels. tests/pretrain/test_cost_arithmetic.py counts them in the recurrence as it is written.
"""


def product(rows: float, inner: float, columns: float) -> float:
    """(rows, inner) times (inner, columns)."""
    return 2.0 * rows * inner * columns


def scan(positions: float, channels: int, states: int, backward: bool = False) -> float:
    """One direction over so many positions, of all samples together."""
    return (SCAN_BACKWARD if backward else SCAN_FORWARD) * positions * channels * states


def block_products(vision: VisionConfig, order: str, positions: float) -> float:
    """Projections and convolutions of one block; the two scans beside them are `block_scans`."""
    D, E, S, R = vision.width, vision.expand * vision.width, vision.d_state, vision.rank
    ends = product(positions, D, 2 * E) + product(positions, E, D)
    inside = product(positions, E, R + 2 * S) + product(positions, R, E) + 2.0 * positions * E * vision.d_conv
    return ends + 2 * _walks(order) * inside


def block_scans(vision: VisionConfig, order: str, positions: float, backward: bool = False) -> float:
    """Both directions' scans of one block."""
    channels = vision.expand * vision.width
    return 2 * _walks(order) * scan(positions, channels, vision.d_state, backward)


def _walks(order: str) -> int:
    """How often a block's tokens are walked over in each direction."""
    return 2 if order == "st_full" else 1


def patches(vision: VisionConfig, seen: float, whole: float) -> tuple[float, float]:
    """The patch embedding: forward, and backward, where no gradient by the pixels is wanted.

    `whole` patches of all clips are cut out and `seen` are visible; a linear stem embeds them all.
    """
    D, t, p = vision.width, vision.tubelet, vision.patch_size
    if vision.stem == "linear":
        forward = product(whole, vision.channels * t * p * p, D)
        return forward, forward
    squares = t * (p // STEM_STRIDE) ** 2
    stem = product(seen * squares, vision.channels * STEM_STRIDE**2, vision.stem_width)
    join = product(seen, vision.stem_width * squares, D)
    return stem + join, stem + 2 * join


def alignment(vision: VisionConfig, positions: float) -> float:
    """The decoders that bring the student's features to the teacher's width."""
    return vision.align_layers * product(positions, vision.width, vision.align_width) if vision.align_width else 0.0


def text_layer(text: TextConfig, texts: float, words: float) -> float:
    """One BERT layer over `texts` texts of `words` tokens each."""
    W, rows = text.width, texts * words
    return 4 * product(rows, W, W) + 2 * product(rows, W, text.intermediate) + 2 * product(rows, W, words)


def fusion_layer(text: TextConfig, vision_width: int, texts: float, words: float, attended: float) -> float:
    """A BERT layer that also attends to `attended` tokens of a clip for each text."""
    W, rows = text.width, texts * words
    cross = 2 * product(rows, W, W) + 2 * product(texts * attended, vision_width, W) + 2 * product(rows, W, attended)
    return text_layer(text, texts, words) + cross


def word_head(text: TextConfig, words: float) -> float:
    """Scores over the vocabulary of so many hidden words."""
    return product(words, text.width, text.width) + product(words, text.width, text.vocab_size)


def orthogonalise(rows: int, columns: int, iterations: int = 5) -> float:
    """Muon's Newton-Schulz iterations on one matrix (optim.py)."""
    short, long = sorted((rows, columns))
    return iterations * (2 * product(short, long, short) + product(short, short, short))
