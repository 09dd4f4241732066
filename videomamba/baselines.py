"""What we measure ourselves against: each the plainest form that is well written and needs nothing of ours.

Letters: B batch, L length, D channels, N state or patches of a frame, T frames, H heads, E width of a head.
"""

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_pipeline.batches import Batch
    from data_pipeline.preprocess import VisualPreprocess
    from pretrain.config import PretrainConfig
    from pretrain.models.joint import JointModel
    from pretrain.tasks import Task


def eager_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    delta_bias_D: Tensor,
) -> Tensor:
    """The selective scan as a loop over L, as the recurrence is written: coefficients, state and output of a position.

    With softplus of delta, skip and gate; float32; y (B, L, D). Mamba's own `selective_scan_ref` makes all coefficients
    first and takes them by index, whose backward pass writes zeros of all B L D N of them at every position: many times
    slower still at long lengths. Source: state-spaces/mamba, selective_scan_interface.py.
    """
    delta_BLD = F.softplus(delta_BLD + delta_bias_D)
    state_BDN = u_BLD.new_zeros(u_BLD.shape[0], *A_DN.shape)
    outputs = []
    for t in range(u_BLD.shape[1]):
        decay_BDN = torch.exp(delta_BLD[:, t, :, None] * A_DN)
        state_BDN = decay_BDN * state_BDN + (delta_BLD[:, t] * u_BLD[:, t])[..., None] * B_BLN[:, t, None]
        outputs.append((state_BDN * C_BLN[:, t, None]).sum(-1))
    return (torch.stack(outputs, dim=1) + D_D * u_BLD) * F.silu(z_BLD)


def unbound_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    delta_bias_D: Tensor,
) -> Tensor:
    """`eager_scan` made as quick as a loop with autograd becomes, so that the loop is measured and not its indexing.

    All coefficients come first, with time first in memory, so that each step reads and writes contiguous blocks, and
    `unbind` takes the steps apart, which has no zeros to write in its backward pass.
    """
    delta_LBD = F.softplus(delta_BLD + delta_bias_D).transpose(0, 1).contiguous()
    decay_LBDN = torch.exp(delta_LBD.unsqueeze(-1) * A_DN)
    input_LBDN = (delta_LBD * u_BLD.transpose(0, 1)).unsqueeze(-1) * B_BLN.transpose(0, 1).unsqueeze(2)
    state_BDN = torch.zeros_like(decay_LBDN[0])
    states = []
    for decay_BDN, input_BDN in zip(decay_LBDN.unbind(0), input_LBDN.unbind(0), strict=True):
        state_BDN = torch.addcmul(input_BDN, decay_BDN, state_BDN)
        states.append(state_BDN)
    y_LBD = torch.einsum("lbdn,bln->lbd", torch.stack(states), C_BLN)
    return (y_LBD.transpose(0, 1) + D_D * u_BLD) * F.silu(z_BLD)


def doubling_scan(
    u_BLD: Tensor,
    delta_BLD: Tensor,
    A_DN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_D: Tensor,
    z_BLD: Tensor,
    delta_bias_D: Tensor,
) -> Tensor:
    """The same scan with no loop over L: log2(L) steps, in each of which a position takes over what those before it
    have gathered (Hillis and Steele, 1986). It works on B L D N values at once, and forgets none for the backward pass.
    """
    delta_BLD = F.softplus(delta_BLD + delta_bias_D)
    decay = torch.exp(delta_BLD[..., None] * A_DN)
    state = (delta_BLD * u_BLD)[..., None] * B_BLN[:, :, None, :]
    shift = 1
    while shift < u_BLD.shape[1]:
        reached = state[:, shift:] + decay[:, shift:] * state[:, :-shift]
        state = torch.cat([state[:, :shift], reached], 1)
        decay = torch.cat([decay[:, :shift], decay[:, shift:] * decay[:, :-shift]], 1)
        shift *= 2
    y_BLD = (state * C_BLN[:, :, None, :]).sum(-1)
    return (y_BLD + D_D * u_BLD) * F.silu(z_BLD)


def conv1d_both(
    x_BDL: Tensor, weight_DK: Tensor, bias_D: Tensor, weight_b_DK: Tensor, bias_b_D: Tensor
) -> tuple[Tensor, Tensor]:
    """The causal convolution and SiLU of both directions, (B, D, L) each, as the published mixer does it without its
    CUDA kernel: F.conv1d padded on both sides and cut, in the channel-first layout that the mixer has there; the second
    on the flipped sequence, and not flipped back. Source: OpenGVLab/VideoMamba, mamba_simple.py.
    """
    length, channels, pad = x_BDL.shape[2], x_BDL.shape[1], weight_DK.shape[1] - 1
    ahead_BDL = F.silu(F.conv1d(x_BDL, weight_DK[:, None], bias_D, padding=pad, groups=channels)[..., :length])
    flipped_BDL = F.conv1d(x_BDL.flip(2), weight_b_DK[:, None], bias_b_D, padding=pad, groups=channels)
    return ahead_BDL, F.silu(flipped_BDL[..., :length])


def faiss_flat(vectors_VE: "NDArray[np.float32]") -> Any:
    """FAISS's exact index as someone who knows it sets it: matrix products from 20 queries on."""
    import faiss

    faiss.cvar.distance_compute_blas_threshold = 20
    index = faiss.IndexFlatIP(vectors_VE.shape[1])
    index.add(vectors_VE)
    return index


def recalls_by_argsort(
    clips_VE: "NDArray[np.float32]", texts_VE: "NDArray[np.float32]", samples: int = 1000
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """R@1, 5, 10 and 50, median and mean rank both ways of clips and their texts, one each, as retrieval code commonly
    has it, and beside them their 95 % intervals by a loop over resamplings of the queries.
    """
    import numpy as np

    def numbers(ranks_Q: "NDArray[Any]") -> dict[str, float]:
        recalls = {f"R@{k}": 100.0 * float((ranks_Q < k).mean()) for k in (1, 5, 10, 50)}
        return recalls | {"MedR": float(np.median(ranks_Q)) + 1, "MeanR": float(ranks_Q.mean()) + 1}

    scores_VC, generator = clips_VE @ texts_VE.T, np.random.default_rng(0)
    table, intervals = {}, {}
    for way, scores in (("t2v", scores_VC.T), ("v2t", scores_VC)):
        order = np.argsort(-scores, axis=1)
        ranks_Q = np.where(order == np.arange(len(order))[:, None])[1]
        table[way] = numbers(ranks_Q)
        drawn = [numbers(generator.choice(ranks_Q, len(ranks_Q))) for _ in range(samples)]
        intervals[way] = {name: np.percentile([one[name] for one in drawn], [2.5, 97.5]) for name in table[way]}
    return table, intervals


def match_clip_by_clip(
    model: "JointModel",
    tokens_VND: "NDArray[np.float16]",
    hidden_ULD: Tensor,
    mask_UL: Tensor,
    texts: list[Any],
    batch: int = 16,
) -> "NDArray[np.float32]":
    """Match scores by the model's own decoder, (pairs,): each clip with `texts` of its own, a batch at a time.

    As the published code scores them: the clip's tokens stand once for each of its texts, and so do keys and values.
    """
    import numpy as np

    scores = []
    for clip, texts_M in enumerate(texts):
        tokens_ND = torch.from_numpy(np.array(tokens_VND[clip])).float()
        for part in torch.from_numpy(texts_M).split(batch):
            logits = model.match_logits(hidden_ULD[part], mask_UL[part], tokens_ND.expand(len(part), -1, -1))
            scores.append(logits[:, 1].float().numpy())
    return np.concatenate(scores)


def match_keys_once(
    model: "JointModel",
    tokens_VND: "NDArray[np.float16]",
    hidden_ULD: Tensor,
    mask_UL: Tensor,
    texts: list[Any],
    batch: int = 64,
) -> "NDArray[np.float32]":
    """The same scores by a loop that makes a clip's keys and values once and calls the layers' own parts on them."""
    import numpy as np

    tower, scores = model.text_encoder, []
    layers: list[Any] = list(tower.fusion_layers())

    def heads(rows: Any) -> Any:
        return rows.unflatten(-1, (tower.config.heads, -1)).transpose(-3, -2)

    for clip, texts_M in enumerate(texts):
        tokens_ND = torch.from_numpy(np.array(tokens_VND[clip])).float()
        crosses = [layer.crossattention for layer in layers]
        seen = [(heads(cross.self.key(tokens_ND)), heads(cross.self.value(tokens_ND))) for cross in crosses]
        for part in torch.from_numpy(texts_M).split(batch):
            state_BLD, mask_B11L = hidden_ULD[part], mask_UL[part, None, None, :].bool()
            for layer, keys_values in zip(layers, seen, strict=True):
                own = layer.attention
                asked, key, value = (heads(make(state_BLD)) for make in (own.self.query, own.self.key, own.self.value))
                read = F.scaled_dot_product_attention(asked, key, value, attn_mask=mask_B11L)
                state_BLD = own.output(read.transpose(1, 2).flatten(2), state_BLD)
                key, value = (part_AND.expand(len(part), -1, -1, -1) for part_AND in keys_values)
                read = F.scaled_dot_product_attention(heads(layer.crossattention.self.query(state_BLD)), key, value)
                state_BLD = layer.crossattention.output(read.transpose(1, 2).flatten(2), state_BLD)
                state_BLD = layer.feed_forward_chunk(state_BLD)
            scores.append(F.linear(state_BLD[:, 0], model.itm_head.weight, model.itm_head.bias)[:, 1].numpy())
    return np.concatenate(scores)


class JointAttentionBlock(nn.Module):
    """A pre-norm transformer block in timm's form: fused qkv, scaled_dot_product_attention, an MLP of four widths."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D), every token attending to every other."""
        qkv = self.qkv(self.norm1(x_BLD)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed_BHLE = F.scaled_dot_product_attention(query, key, value)
        x_BLD = x_BLD + self.proj(mixed_BHLE.transpose(1, 2).flatten(2))
        out_BLD: Tensor = x_BLD + self.mlp(self.norm2(x_BLD))
        return out_BLD


class JointAttentionViT(nn.Module):
    """ViT-Ti over all patches of all frames at once: what VideoMamba-Ti is compared with in its paper's Figure 1.

    DeiT-Ti's sizes (12 blocks, width 192, 3 heads; arXiv 2012.12877) with joint space-time attention (the "joint"
    form of TimeSformer, arXiv 2102.05095), a learned place in the frame and a learned time for each token.
    """

    def __init__(
        self, frames: int, image_size: int, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 16
    ) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // patch) ** 2, width) * 0.02)
        self.time_embed = nn.Parameter(torch.zeros(1, frames, 1, width))
        self.blocks = nn.Sequential(*(JointAttentionBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """Tokens (B, 1 + T N, D), cls first."""
        B, _, T = video_BCTHW.shape[:3]
        patches_BTND = self.patch_embed(video_BCTHW.transpose(1, 2).flatten(0, 1)).flatten(2).transpose(1, 2)
        patches_BTND = patches_BTND.unflatten(0, (B, T)) + self.pos_embed + self.time_embed[:, :T]
        tokens_BLD = torch.cat([self.cls_token.expand(B, -1, -1), patches_BTND.flatten(1, 2)], dim=1)
        out_BLD: Tensor = self.norm(self.blocks(tokens_BLD))
        return out_BLD


def pyav_clips(files: Iterator[Path], frames: int, image_size: int) -> Iterator[Tensor]:
    """Clips (T, C, S, S) uint8 as a loop of one's own would read them: decode up to the last frame wanted, resize.

    The middle frames of T equal intervals, by the container's count; bicubic with anti-aliasing, as the loader's.
    """
    import av

    for path in files:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            edges = [stream.frames * part // frames for part in range(frames + 1)]
            wanted = [(first + last - 1) // 2 for first, last in pairwise(edges)]
            chosen = []
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    chosen.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if number == wanted[-1]:
                    break
        clip_TCHW = torch.stack(chosen).permute(0, 3, 1, 2)
        yield F.interpolate(clip_TCHW, size=(image_size, image_size), mode="bicubic", antialias=True)


def webdataset_batches(shards: list[str], visual: "VisualPreprocess", batch: int) -> Iterator[Any]:
    """Endless batches (frames (B, T, C, S, S), captions) by webdataset's pipeline in one worker, with our decoder."""
    import webdataset as wds

    dataset = (
        wds.WebDataset(shards, resampled=True, shardshuffle=False)
        .shuffle(64)
        .map(_WdsDecode(visual))
        .batched(batch, collation_fn=_stacked)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="forkserver"))


class _WdsDecode:
    """A sample of webdataset's (bytes by extension) -> its frames (T, C, S, S) and first caption."""

    def __init__(self, visual: "VisualPreprocess") -> None:
        self.visual = visual

    def __call__(self, sample: dict[str, bytes]) -> tuple[Tensor, str]:
        import json

        from data_pipeline.decode import decode_video
        from data_pipeline.frames import middle_indices
        from data_pipeline.transforms import from_decoder, to_square

        meta = json.loads(sample["json"])
        count = meta["probe"]["frames"]
        decoded = decode_video(sample["mp4"], lambda n, _: middle_indices(n, self.visual.frames), count=count)
        square = to_square(from_decoder(decoded), self.visual.image_size, self.visual.resize, self.visual.interpolation)
        return square, meta["captions"][0]


def _stacked(samples: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    return torch.stack([frames for frames, _ in samples]), [caption for _, caption in samples]


def bare_training(
    task: "Task", batches: Iterator["Batch"], run: "PretrainConfig", device: torch.device, window: int
) -> Iterator[tuple[float, float]]:
    """A training loop of nothing but PyTorch: autocast, backward, clipping, fused AdamW, a cosine rate.

    Of every `window` steps: the seconds a step, and the mean loss. It reads the loss once a window, as a careful author
    would, and saves nothing.
    """
    from pretrain.finite import step_seed
    from pretrain.schedule import warmup_cosine

    groups: list[dict[str, Any]] = [
        {name: group[name] for name in ("params", "lr", "weight_decay")} for group in task.parameter_groups()
    ]
    optim = run.optim
    optimizer = torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, run.steps, optim.warmup_steps, optim.min_lr / optim.lr)
    )
    parameters = [parameter for group in groups for parameter in group["params"]]
    task.model.train()
    began, total = time.perf_counter(), torch.zeros((), device=device)
    for step, batch in enumerate(batches):
        torch.manual_seed(step_seed(run, step, 0))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = torch.stack([part.float() for part in task.losses(batch).values()]).sum()
        loss.backward()
        if optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        optimizer.step()
        schedule.step()
        total += loss.detach()
        if (step + 1) % window == 0:
            mean = float(total) / window
            now = time.perf_counter()
            yield (now - began) / window, mean
            began, total = time.perf_counter(), torch.zeros((), device=device)


def bare_step(task: Any, batch: Any, lr: float, clip_norm: float) -> Callable[[], float]:
    """A step of the training loop that one would write without a trainer: bf16 autocast, backward, clip, fused AdamW.

    The same losses and parameter groups as ours; the loss is read once a step, to be shown.
    """
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in task.parameter_groups()]
    optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
    parameters = [parameter for group in groups for parameter in group["params"]]

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack([loss.float() for loss in task.losses(batch).values()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        optimizer.step()
        return float(loss.detach())

    return step
