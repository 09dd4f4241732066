"""The two tasks: a model and its losses each. The trainer knows neither; it sums what `losses` gives.

Stage 1 aligns the visible tokens of a masked clip with a CLIP teacher's. Stage 2 teaches a joint model with
four losses, masked (with the teacher) or unmasked (one vector a frame). Everything random comes from the
samples' own seeds, apart from dropout inside BERT, which is torch's.

B samples of this rank, G of all ranks, C channels, T frames, L words, V visible tokens, K token frames,
N patches a frame, F vectors a clip, E joint width, D widths.
"""

import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from configs.errors import UserError
from data_pipeline.draws import derive
from data_pipeline.loader import Batch
from pretrain.checkpoint import ModelMeta, Preprocess, load_init
from pretrain.config import PretrainConfig
from pretrain.distributed import all_reduce_max, all_reduce_sum, gather_rows, gather_with_gradient, world_size
from pretrain.losses import (
    alignment_loss,
    contrastive_loss,
    gather_visible,
    hard_negatives,
    mask_words,
    matching_loss,
    mlm_loss,
    similarity,
)
from pretrain.losses.mlm import IGNORED
from pretrain.masking import visible_indices
from pretrain.models.config import JointConfig, VisionConfig
from pretrain.models.joint import JointModel
from pretrain.models.teacher import ClipTeacher, TeacherOutput
from pretrain.models.videomamba import VideoMamba, VisionOutput
from pretrain.optim import Group, parameter_groups
from pretrain.tokenizer import load_tokenizer, tokenize

log = logging.getLogger(__name__)


class Task(Protocol):
    """What the trainer needs of a task."""

    model: nn.Module
    meta: ModelMeta
    preprocess: Preprocess
    tokenizer_folder: Path | None
    metrics: dict[str, Tensor]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name, already weighted; their mean over ranks is the loss of the global batch."""
        ...

    def parameter_groups(self) -> list[Group]:
        """Every trainable parameter in one group."""
        ...


def build_task(config: PretrainConfig, device: torch.device, tokenizer_folder: Path | None = None) -> Task:
    """The task of a config, its model freshly drawn from the config's seed or started from `init`, on `device`.

    Raises UserError if the teacher, tokenizer or checkpoint that it names does not fit.
    """
    torch.manual_seed(derive(config.seed, "model"))
    if config.task == "stage1":
        return Stage1(config, device)
    if tokenizer_folder is None:
        raise UserError("stage2 reads text and has no tokenizer.", "Give `tokenizer`, a folder that holds one.")
    return Stage2(config, device, tokenizer_folder)


class Sight:
    """What a task sees of a batch: the teacher's view, which tokens stay visible, and the student's view of those."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.mask, self.visual = config.mask, config.data.visual()
        # autocast would round the pixels at the first product anyway; before it, they move at half the cost
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.patches = (config.vision.image_size // config.vision.patch_size,) * 2
        self.teacher: ClipTeacher | None = None
        if config.teacher is not None:
            self.teacher = ClipTeacher.from_open_clip(
                config.teacher.source,
                config.teacher.weights,
                mean=self.visual.mean if config.teacher.pixels == "released" else None,
                std=self.visual.std if config.teacher.pixels == "released" else None,
                layers=config.teacher.layers,
                interval=config.teacher.interval,
                ln_post=config.teacher.ln_post,
                image_size=config.teacher.image_size,
                tubelet=config.vision.tubelet,
                stride=config.teacher.frame_stride,
                chunk=config.teacher.chunk,
                grid=(self.patches[0], self.patches[1]),
            ).to(device)
        self.tubelet = config.vision.tubelet
        self.vision = self._vision(config)

    def _vision(self, config: PretrainConfig) -> VisionConfig:
        """The student's config with the teacher's width, where it is aligned to one."""
        width = self.teacher.width if self.teacher is not None and config.losses.alignment.weight else 0
        if config.vision.align_width not in (0, width):
            raise UserError(
                f"vision.align_width is {config.vision.align_width}, and what there is to align to is {width} wide.",
                "Leave vision.align_width out: it follows the teacher.",
            )
        return config.vision.model_copy(update={"align_width": width})

    def __call__(
        self, encoder: VideoMamba, frames_BCTHW: Tensor, seeds_B: Tensor
    ) -> tuple[VisionOutput, TeacherOutput | None]:
        """The student's output on the visible tokens of uint8 frames, and the teacher's on all of them."""
        taught = self.teacher(frames_BCTHW) if self.teacher is not None else None
        visible_BV = self._visible(frames_BCTHW.shape[2], seeds_B, taught)
        return encoder(self.visual.normalise(frames_BCTHW, self.dtype), visible_BV, seeds_B), taught

    def _visible(self, frames: int, seeds_B: Tensor, taught: TeacherOutput | None) -> Tensor | None:
        if self.mask is None:
            return None
        image = frames == 1
        grid = (1 if image else frames // self.tubelet, *self.patches)
        attention_BKN = None if taught is None else taught.attention_BKN
        ratio = self.mask.image_ratio if image else self.mask.ratio
        return visible_indices(self.mask.kind, seeds_B, (grid[0], grid[1], grid[2]), ratio, attention_BKN)


def align(encoder: VideoMamba, seen: VisionOutput, taught: TeacherOutput, kind: str) -> Tensor:
    """The alignment loss of the tokens that the student saw, cls among them."""
    target_JBVC = taught.features_JBLC
    if seen.visible_BV is not None:
        target_JBVC = gather_visible(target_JBVC, seen.visible_BV)
    return alignment_loss(encoder.align(seen), target_JBVC, kind)  # type: ignore[arg-type]


class Stage1:
    """Masked video modelling: the visible tokens of the student towards the teacher's."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.see = Sight(config, device)
        self.encoder = VideoMamba(self.see.vision)
        self.model: nn.Module = self.encoder
        if config.init is not None:
            log.info("init: %s", load_init(self.encoder, config.init))
        self.encoder.to(device)
        self.meta = ModelMeta(kind="vision", vision=self.see.vision)
        self.preprocess = Preprocess(visual=self.see.visual)
        self.tokenizer_folder: Path | None = None
        self.metrics: dict[str, Tensor] = {}

    def parameter_groups(self) -> list[Group]:
        """By the rules of optim.py."""
        return parameter_groups(self.encoder.named_parameters(), self.config.optim)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`alignment`, weighted."""
        frames_BCTHW, seeds_B = batch.frames.to(self.device), batch.seeds.to(self.device)
        seen, taught = self.see(self.encoder, frames_BCTHW, seeds_B)
        assert taught is not None  # the config's rules
        rule = self.config.losses.alignment
        return {"alignment": rule.weight * align(self.encoder, seen, taught, rule.kind)}


class Stage2:
    """Joint pretraining: contrastive, matching, masked words, and alignment while there is a teacher."""

    def __init__(self, config: PretrainConfig, device: torch.device, tokenizer_folder: Path) -> None:
        assert config.text is not None  # the config's rules
        self.config, self.device, self.rules = config, device, config.losses
        self.see = Sight(config, device)
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.tokenizer_folder: Path | None = tokenizer_folder
        words = self.tokenizer.get_vocab_size()
        if words > config.text.vocab_size:
            raise UserError(
                f"The tokenizer {tokenizer_folder} has {words} pieces, text.vocab_size is {config.text.vocab_size}.",
                f"Use text.vocab_size={-(-words // 64) * 64} or more.",
            )
        self.joint = JointModel(JointConfig(vision=self.see.vision, text=config.text, embed=config.embed))
        self.model: nn.Module = self.joint
        if config.init is not None:
            log.info("init: %s", load_init(self.joint, config.init))
        self.joint.to(device)
        self.meta = ModelMeta(kind="joint", vision=self.joint.config.vision, joint=self.joint.config)
        self.preprocess = Preprocess(visual=self.see.visual, text=config.text_preprocess)
        self.metrics: dict[str, Tensor] = {}
        ids = self.tokenizer.get_vocab()
        self.mask_id, self.keep_ids = ids["[MASK]"], [ids["[PAD]"], ids["[CLS]"]]

    def parameter_groups(self) -> list[Group]:
        """By the rules of optim.py."""
        return parameter_groups(self.joint.named_parameters(), self.config.optim)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """`contrastive`, `matching`, `mlm` and `alignment`, weighted; those of weight 0 are not computed."""
        rules, model = self.rules, self.joint
        frames_BCTHW, seeds_B = batch.frames.to(self.device), batch.seeds.to(self.device)
        identity_B = batch.identity.to(self.device)
        ids_BL, words_BL = self._tokens(batch.captions)
        model.clamp_temperature()
        seen, taught = self.see(model.vision_encoder, frames_BCTHW, seeds_B)
        losses: dict[str, Tensor] = {}
        if rules.contrastive.weight or rules.matching.weight:
            pooled_BFD = model.vision_encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=seen.visible_BV is None)
            hidden_BLD = model.text_encoder.encode(ids_BL, words_BL)
            video_BFE, text_BE = model.embed_video(pooled_BFD), model.embed_text(hidden_BLD)
            if rules.contrastive.weight:
                losses["contrastive"] = rules.contrastive.weight * self._contrastive(video_BFE, text_BE, identity_B)
            if rules.matching.weight:
                everyone = Pairs(video_BFE, text_BE, hidden_BLD, words_BL, seen.patches, identity_B, seeds_B)
                losses["matching"] = rules.matching.weight * self._matching(everyone)
        if rules.mlm.weight:
            losses["mlm"] = rules.mlm.weight * self._mlm(ids_BL, words_BL, seen.patches, seeds_B)
        if rules.alignment.weight and taught is not None:
            loss = align(model.vision_encoder, seen, taught, rules.alignment.kind)
            losses["alignment"] = rules.alignment.weight * loss
        self.metrics = {"temperature": model.temp.detach().reshape(())}
        return losses

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask (B, L); with global negatives every rank pads to the same L."""
        text = self.config.text_preprocess
        cleaned = [text.clean_caption(caption) for caption in captions]
        ids_BL, words_BL = tokenize(self.tokenizer, cleaned, text.max_tokens)
        if self.rules.matching.negatives == "global" and world_size() > 1:
            width = int(all_reduce_max(torch.tensor(ids_BL.shape[1], device=self.device)))
            ids_BL, words_BL = tokenize(self.tokenizer, cleaned, text.max_tokens, length=width)
        return ids_BL.to(self.device), words_BL.to(self.device)

    def _contrastive(self, video_BFE: Tensor, text_BE: Tensor, identity_B: Tensor) -> Tensor:
        all_video_GFE, all_text_GE = gather_with_gradient(video_BFE), gather_with_gradient(text_BE)
        all_identity_G = gather_rows(identity_B)
        return contrastive_loss(
            video_BFE, text_BE, all_video_GFE, all_text_GE, self.joint.temp, identity_B, all_identity_G
        )

    def _matching(self, own: "Pairs") -> Tensor:
        """Every pair of this rank against a hard clip and a hard text, of this rank or of all of them."""
        pool = own.of_all_ranks() if self.rules.matching.negatives == "global" else own
        with torch.no_grad():
            sharpness = self.rules.matching.hardness / self.joint.temp.float()
            to_text_BG = similarity(own.video_BFE, pool.text_BE) * sharpness
            to_video_BG = similarity(pool.video_BFE, own.text_BE).T * sharpness
        text_B, has_text_B = hard_negatives(to_text_BG, own.identity_B, pool.identity_B, own.seeds_B, "matching.text")
        video_B, has_video_B = hard_negatives(
            to_video_BG, own.identity_B, pool.identity_B, own.seeds_B, "matching.video"
        )
        hidden = torch.cat([own.hidden_BLD, own.hidden_BLD, pool.hidden_BLD[text_B]])
        words = torch.cat([own.words_BL, own.words_BL, pool.words_BL[text_B]])
        patches = torch.cat([own.patches_BVD, pool.patches_BVD[video_B], own.patches_BVD])
        positive_B2, hard_video_B2, hard_text_B2 = self.joint.match_logits(hidden, words, patches).chunk(3)
        return over_ranks(*matching_loss(positive_B2, hard_video_B2, hard_text_B2, has_video_B, has_text_B))

    def _mlm(self, ids_BL: Tensor, words_BL: Tensor, patches_BVD: Tensor, seeds_B: Tensor) -> Tensor:
        every = self.rules.mlm.every
        ids_BL, words_BL, patches_BVD = ids_BL[::every], words_BL[::every], patches_BVD[::every]
        masked_BL, label_BL = mask_words(
            ids_BL,
            words_BL,
            seeds_B[::every],
            mask_id=self.mask_id,
            keep_ids=self.keep_ids,
            vocab_size=self.tokenizer.get_vocab_size(),
            probability=self.rules.mlm.probability,
        )
        asked_BL = label_BL != IGNORED
        logits = self.joint.mlm_logits(masked_BL, words_BL, patches_BVD, asked_BL)
        return over_ranks(*mlm_loss(logits, label_BL[asked_BL]))


class Pairs:
    """What matching needs of some clips and their texts, row by row."""

    def __init__(
        self,
        video_BFE: Tensor,
        text_BE: Tensor,
        hidden_BLD: Tensor,
        words_BL: Tensor,
        patches_BVD: Tensor,
        identity_B: Tensor,
        seeds_B: Tensor,
    ) -> None:
        self.video_BFE, self.text_BE, self.hidden_BLD, self.words_BL = video_BFE, text_BE, hidden_BLD, words_BL
        self.patches_BVD, self.identity_B, self.seeds_B = patches_BVD, identity_B, seeds_B

    def of_all_ranks(self) -> "Pairs":
        """The same of every rank, in rank order; what a negative is made of carries its gradient home."""
        return Pairs(
            gather_rows(self.video_BFE),
            gather_rows(self.text_BE),
            gather_with_gradient(self.hidden_BLD),
            gather_rows(self.words_BL),
            gather_with_gradient(self.patches_BVD),
            gather_rows(self.identity_B),
            gather_rows(self.seeds_B),
        )


def over_ranks(total: Tensor, count: Tensor) -> Tensor:
    """This rank's `total` such that the mean over ranks is the sum of totals over the sum of counts."""
    return total * world_size() / all_reduce_sum(count).clamp(min=1)
