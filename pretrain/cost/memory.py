"""Memory of one device by part: what ZeRO leaves on each, what a step adds, and what is neither.

P trained parameters of 4 bytes, N ranks. Weights 4 P; Adam 8 P (Muon 4 P of its matrices); gradients 4 P. ZeRO 1 cuts
the optimizer by N and keeps a float32 copy of a rank's share, ZeRO 2 cuts the gradients too, ZeRO 3 the weights too.
"""

import json
from dataclasses import dataclass

from pretrain.config import DEEPSPEED, PretrainConfig
from pretrain.cost.dry_run import DryRun

FLOAT = 4
CUDA_CONTEXT = 0.6e9
"""Bytes of a CUDA context with the libraries that torch loads: what nvidia-smi shows before the first tensor."""
NCCL = 0.4e9
"""Bytes of NCCL's channels and buffers where there are several ranks."""
BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way, unless its JSON says otherwise."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device by part, when it holds the most. Their sum is what the device has to have."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def memory(config: PretrainConfig, run: DryRun, muon: int, ranks: int, micro: int, parts: int, gpu: bool) -> Memory:
    """Per device, for a dry run of `micro` samples at once, of which a rank takes `parts` a step.

    `muon` is how many of the trained parameters Muon updates.
    """
    stage, whole = config.zero_stage, FLOAT * run.trained
    share = ranks if stage else 1
    kept = whole // (ranks if stage >= 2 else 1) if parts > 1 else run.gradients
    found = {
        "weights": run.weights // (ranks if stage == 3 else 1),
        "float32 copy of ZeRO": whole // ranks if stage else 0,
        "optimizer": (2 * FLOAT * (run.trained - muon) + FLOAT * muon) // share,
        "average of weights": FLOAT * run.trained if config.optim.ema_decay else 0,
        "gradients": kept,
        "gradients on their way": gradient_buffers(config, whole, ranks),
        "activations": run.activations,
        "teacher": run.teacher,
        "features of other micro-batches": cached_features(config, micro, parts),
        "features of other ranks": gathered_features(config, micro * parts, ranks),
        "CUDA and NCCL": int(CUDA_CONTEXT + (NCCL if ranks > 1 else 0)) if gpu else 0,
    }
    return Memory({name: size for name, size in found.items() if size})


def gradient_buffers(config: PretrainConfig, whole: int, ranks: int) -> int:
    """What DeepSpeed reduces gradients in: with ZeRO a buffer of a fixed size, whatever the model's."""
    if not config.zero_stage:
        return min(whole, FLOAT * BUCKET) if ranks > 1 else 0
    rule = json.loads((DEEPSPEED / f"{config.deepspeed}.json").read_text())["zero_optimization"]
    size = int(FLOAT * rule.get("reduce_bucket_size", BUCKET))
    return size * (2 if rule.get("overlap_comm", config.zero_stage == 3) else 1)


def cached_features(config: PretrainConfig, micro: int, parts: int) -> int:
    """What a rank keeps of its micro-batches from the survey to their turn: targets, and the contrastive cache."""
    if parts == 1 or config.task == "stage1":
        return 0
    from pretrain.cost.step import tokens_of

    tokens, clips = tokens_of(config, "video"), micro * parts
    width = config.vision.align_width if config.teacher is not None else 0
    targets = config.vision.align_layers * clips * tokens.seen * width * FLOAT
    vectors = 2 * clips * (1 + tokens.frames) * config.embed * FLOAT
    return targets + vectors + (2 * pooled_bytes(config, clips) if pools_all(config) else 0)


def gathered_features(config: PretrainConfig, clips: int, ranks: int) -> int:
    """What a rank has of the others' clips for the losses that compare the whole batch."""
    if ranks == 1 or config.task == "stage1":
        return 0
    others = clips * (ranks - 1)
    return others * 2 * config.embed * FLOAT + (2 * pooled_bytes(config, others) if pools_all(config) else 0)


def pools_all(config: PretrainConfig) -> bool:
    """Whether matching draws negatives from the whole batch."""
    return bool(config.losses.matching.weight) and config.losses.matching.negatives == "global"


def pooled_bytes(config: PretrainConfig, clips: int) -> int:
    """Hidden states and patch tokens of so many clips, from which matching makes its pairs."""
    from pretrain.cost.step import tokens_of

    assert config.text is not None  # stage 2 has text
    seen = tokens_of(config, "video").seen - 1
    return clips * (config.text.max_tokens * config.text.width + seen * config.vision.width) * FLOAT


def network_bytes(config: PretrainConfig, run: DryRun, ranks: int, clips: int, parts: int) -> dict[str, float]:
    """Bytes that a rank sends in a step, by what for, with ring collectives (each rank sends (N - 1) / N of the whole).

    `clips` are a rank's in a step. ZeRO 2 reduces after every micro-batch, ZeRO 3 fetches the weights for each
    forward and each backward pass.
    """
    if ranks == 1:
        return {}
    whole, ring, stage = FLOAT * run.trained, (ranks - 1) / ranks, config.zero_stage
    found = {
        "gradients": ring * whole * (2 if stage == 0 else parts if stage >= 2 else 1),
        "weights": ring * whole * (0 if stage == 0 else 1 if stage < 3 else 2 * parts),
    }
    if config.task == "stage2":
        gathered = 2 * config.embed * FLOAT + (pooled_bytes(config, 1) if pools_all(config) else 0)
        # Gathered forward, and summed over ranks for the gradient, which takes twice as much.
        found["features"] = 3 * ring * ranks * clips * gathered
    return {name: size for name, size in found.items() if size}
