"""Stage 2: a joint model of clips and texts under four losses, over a global batch of any number of parts.

The contrastive loss, and matching with global negatives, compare every sample with every other. With more ranks
features are gathered with their true gradient; with several micro-batches a rank, `survey` first passes over all of
them without a graph and caches the gradient of these losses by the features (losses/cached.py), and `losses` then
replays it. So loss and gradient do not depend on how the batch is cut, dropout apart, and `negatives: local` apart,
which are by definition those of the clips that are in memory together.

B samples of a micro-batch, S of a rank, G of all ranks, C channels, T frames, L words, V visible tokens,
F vectors a clip, E joint width, D widths.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError
from data_pipeline.loader import Batch
from pretrain.checkpoint import ModelMeta, Preprocess, load_init
from pretrain.config import PretrainConfig
from pretrain.distributed import (
    all_reduce_max,
    all_reduce_sum,
    gather_rows,
    gather_with_gradient,
    own_rows,
    rank,
    world_size,
)
from pretrain.groups import Group, parameter_groups
from pretrain.losses import (
    Cached,
    cached_gradients,
    contrastive_loss,
    hard_negatives,
    has_negative,
    mask_words,
    matching_loss,
    mlm_loss,
    replay,
    similarity,
)
from pretrain.losses.mlm import IGNORED
from pretrain.models.config import JointConfig
from pretrain.models.joint import JointModel
from pretrain.models.videomamba import VisionOutput
from pretrain.pairs import Known, Pairs, Text, over_ranks
from pretrain.sight import Shown, Sight
from pretrain.tokenizer import load_tokenizer, tokenize

log = logging.getLogger(__name__)


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
        self.words: int | None = None
        self.pools_all = bool(self.rules.matching.weight) and self.rules.matching.negatives == "global"

    def parameter_groups(self) -> list[Group]:
        """By the rules of groups.py."""
        return parameter_groups(self.joint.named_parameters(), self.config.optim, self.config.rate_scale)

    def bare_parameters(self) -> list[nn.Parameter]:
        """The temperature and the matching head; with global negatives all that judges, whose gradient is cached."""
        judges = self.joint.judges() if self.pools_all else [*self.joint.itm_head.parameters()]
        return [self.joint.temp, *judges]

    def losses(self, batch: Batch, known: Known | None = None) -> dict[str, Tensor]:
        """`contrastive`, `matching`, `mlm` and `alignment`, weighted; those of weight 0 are not computed."""
        rules, model = self.rules, self.joint
        frames_BCTHW, seeds_B, identity_B = self._tensors(batch)
        model.clamp_temperature()
        if known is None:
            text = self._text(batch.captions, seeds_B)
            known = self._know([text], [self.see.show(frames_BCTHW, seeds_B, batch)], [identity_B])[0]
        elif known.dropout is not None:
            torch.manual_seed(known.dropout)
        text = known.text
        seen = self.see.look(model.vision_encoder, frames_BCTHW, seeds_B, known.shown)
        losses: dict[str, Tensor] = {}
        if rules.contrastive.weight or rules.matching.weight:
            own = self._pairs(seen, text, identity_B, seeds_B)
            if rules.contrastive.weight:
                losses["contrastive"] = rules.contrastive.weight * self._contrastive(own, known)
            if rules.matching.weight:
                losses["matching"] = rules.matching.weight * self._matching(own, known)
        if rules.mlm.weight:
            losses["mlm"] = rules.mlm.weight * self._mlm(text, seen.patches, known)
        if known.shown.target_JBVC is not None:
            losses["alignment"] = self.see.align(model.vision_encoder, seen, known.shown)
        self.metrics = {"temperature": model.temp.detach().reshape(())}
        return losses

    @torch.no_grad()
    def survey(self, pieces: Sequence[Batch]) -> list[Known]:
        """Pass over a rank's micro-batches without a graph, and cache what each has to know of the whole batch."""
        rows = _cuts([len(piece) for piece in pieces])
        tensors = [self._tensors(piece) for piece in pieces]
        captions = [caption for piece in pieces for caption in piece.captions]
        text = self._text(captions, torch.cat([seeds_B for _, seeds_B, _ in tensors]))
        self.joint.clamp_temperature()
        seeds = torch.randint(2**62, (len(pieces),)).tolist()
        shown, pairs = [], []
        for piece, (frames_BCTHW, seeds_B, identity_B), cut, seed in zip(pieces, tensors, rows, seeds, strict=True):
            shown.append(self.see.show(frames_BCTHW, seeds_B, piece))
            if self.rules.contrastive.weight or self.pools_all:
                torch.manual_seed(seed)
                seen = self.see.look(self.joint.vision_encoder, frames_BCTHW, seeds_B, shown[-1])
                found = self._pairs(seen, text.part(cut), identity_B, seeds_B)
                pairs.append(found if self.pools_all else found._replace(patches_BVD=found.patches_BVD[:, :0].clone()))
        known = self._know([text.part(cut) for cut in rows], shown, [identity_B for _, _, identity_B in tensors])
        own = Pairs(*(torch.cat(columns) for columns in zip(*pairs, strict=True))) if pairs else None
        known = [replace(about, dropout=seed) for about, seed in zip(known, seeds, strict=True)]
        if own is not None and self.rules.contrastive.weight:
            known = self._cache_contrastive(own, rows, known)
        if own is not None and self.pools_all:
            known = self._cache_matching(own, rows, known)
        return known

    def _tensors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Frames, seeds and identities on the device."""
        return batch.frames.to(self.device), batch.seeds.to(self.device), batch.identity.to(self.device)

    def _text(self, captions: Sequence[str], seeds_B: Tensor) -> Text:
        """Tokens and hidden words; with global negatives every rank pads to the same length."""
        rule = self.config.text_preprocess
        cleaned = [rule.clean_caption(caption) for caption in captions]
        ids_BL, words_BL = tokenize(self.tokenizer, cleaned, rule.max_tokens)
        if self.pools_all and world_size() > 1:
            width = int(all_reduce_max(torch.tensor(ids_BL.shape[1], device=self.device)))
            ids_BL, words_BL = tokenize(self.tokenizer, cleaned, rule.max_tokens, length=width)
        self.words = ids_BL.shape[1]
        ids_BL, words_BL = ids_BL.to(self.device), words_BL.to(self.device)
        masked_BL, label_BL = mask_words(
            ids_BL,
            words_BL,
            seeds_B,
            mask_id=self.mask_id,
            keep_ids=self.keep_ids,
            vocab_size=self.tokenizer.get_vocab_size(),
            probability=self.rules.mlm.probability,
        )
        return Text(ids_BL, words_BL, masked_BL, label_BL)

    def _know(self, texts: Sequence[Text], shown: Sequence[Shown], identities: Sequence[Tensor]) -> list[Known]:
        """A rank's parts, and the counts over all parts of all ranks that their losses are divided by."""
        pools = [gather_rows(torch.cat([*identities]))] * len(texts) if self.pools_all else identities
        pairs = sum(
            len(own_B) + 2 * has_negative(own_B, pool).sum() for own_B, pool in zip(identities, pools, strict=True)
        )
        starts = _starts([len(text.label_BL) for text in texts])
        asked = sum(
            (text.label_BL[self._asked_rows(first, len(text.label_BL))] != IGNORED).sum()
            for text, first in zip(texts, starts, strict=True)
        )
        counts = all_reduce_sum(torch.stack([torch.as_tensor(pairs), torch.as_tensor(asked)]).float())
        return [
            Known(text, show, counts[0], counts[1], first, len(texts))
            for text, show, first in zip(texts, shown, starts, strict=True)
        ]

    def _asked_rows(self, first: int, rows: int) -> slice:
        """Which samples of a part are asked for hidden words: every so-manieth of the global batch."""
        every = self.rules.mlm.every
        return slice(-first % every, rows, every)

    def _pairs(self, seen: VisionOutput, text: Text, identity_B: Tensor, seeds_B: Tensor) -> Pairs:
        """Both towers' vectors, and what the fusion layers read."""
        encoder = self.joint.vision_encoder
        pooled_BFD = encoder.pooled(seen.tokens_BLD, seen.frames, per_frame=seen.visible_BV is None)
        hidden_BLD = self.joint.text_encoder.encode(text.ids_BL, text.words_BL)
        video_BFE, text_BE = self.joint.embed_video(pooled_BFD), self.joint.embed_text(hidden_BLD)
        return Pairs(video_BFE, text_BE, hidden_BLD, text.words_BL, seen.patches, identity_B, seeds_B)

    def _contrastive(self, own: Pairs, known: Known) -> Tensor:
        """Every clip against every text of the global batch, now or as the survey did it."""
        if known.contrastive is not None:
            return replay(known.contrastive, (own.video_BFE, own.text_BE, self.joint.temp))
        return _contrast(own.video_BFE, own.text_BE, self.joint.temp, own.identity_B)

    def _cache_contrastive(self, own: Pairs, rows: Sequence[slice], known: Sequence[Known]) -> list[Known]:
        value, (video_SFE, text_SE, temp) = cached_gradients(
            lambda video, text, temp: _contrast(video, text, temp, own.identity_B),
            own.video_BFE,
            own.text_BE,
            self.joint.temp,
        )
        parts = len(rows)  # the mean over parts is taken of what each part gives
        return [
            replace(about, contrastive=Cached(value, (video_SFE[cut] * parts, text_SE[cut] * parts, temp)))
            for about, cut in zip(known, rows, strict=True)
        ]

    def _matching(self, own: Pairs, known: Known) -> Tensor:
        """Every pair against a hard clip and a hard text, of those in memory or of the global batch."""
        if known.matching is not None:
            return replay(known.matching, (own.hidden_BLD, own.patches_BVD, *self.joint.judges()))
        pool = own.of_all_ranks() if self.pools_all else own
        return over_ranks(self._judge(own, pool), known.pairs, known.parts)

    def _judge(self, own: Pairs, pool: Pairs) -> Tensor:
        """The sum of the matching losses of `own` with negatives from `pool`."""
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
        return matching_loss(positive_B2, hard_video_B2, hard_text_B2, has_video_B, has_text_B)[0]

    def _cache_matching(self, own: Pairs, rows: Sequence[slice], known: Sequence[Known]) -> list[Known]:
        """One part's fusion graph at a time, over negatives of the whole batch; gradients gathered by their owners."""
        own = own.leaves()
        pool = own.of_all_ranks().leaves()
        asked = [own.hidden_BLD, own.patches_BVD, pool.hidden_BLD, pool.patches_BVD, *self.joint.judges()]
        value, sums = torch.zeros((), device=self.device), [torch.zeros_like(tensor) for tensor in asked]
        for cut in rows:
            with torch.enable_grad():
                loss = over_ranks(self._judge(own.part(cut), pool), known[0].pairs)
                torch._foreach_add_(sums, torch.autograd.grad(loss, asked))
            value += loss.detach()
        hidden_SLD, patches_SVD, hidden_GLD, patches_GVD, *judges = sums
        hidden_SLD += own_rows(all_reduce_sum(hidden_GLD), len(hidden_SLD))
        patches_SVD += own_rows(all_reduce_sum(patches_GVD), len(patches_SVD))
        parts = len(rows)
        return [
            replace(about, matching=Cached(value, (hidden_SLD[cut] * parts, patches_SVD[cut] * parts, *judges)))
            for about, cut in zip(known, rows, strict=True)
        ]

    def _mlm(self, text: Text, patches_BVD: Tensor, known: Known) -> Tensor:
        """Hidden words of every so-manieth caption, divided by the number that is asked for in the global batch."""
        rows = self._asked_rows(known.first, len(text.label_BL))
        label_BL = text.label_BL[rows]
        if not len(label_BL):  # none of these few samples' turn: still every rank takes the same steps
            rows, label_BL = slice(0, 1), torch.full_like(text.label_BL[:1], IGNORED)
        asked_BL = label_BL != IGNORED
        logits = self.joint.mlm_logits(text.masked_BL[rows], text.words_BL[rows], patches_BVD[rows], asked_BL)
        total, _ = mlm_loss(logits, label_BL[asked_BL])
        return over_ranks(total, known.asked, known.parts)


def _contrast(video_BFE: Tensor, text_BE: Tensor, temp: Tensor, identity_B: Tensor) -> Tensor:
    """The contrastive loss of this rank's rows against those of all ranks, with the true gradient."""
    all_video_GFE, all_text_GE = gather_with_gradient(video_BFE), gather_with_gradient(text_BE)
    return contrastive_loss(video_BFE, text_BE, all_video_GFE, all_text_GE, temp, identity_B, gather_rows(identity_B))


def _cuts(sizes: Sequence[int]) -> list[slice]:
    """Rows of each of some parts that lie one behind another."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def _starts(sizes: Sequence[int]) -> list[int]:
    """The number in the global batch of the first sample of each of this rank's parts."""
    mine = rank() * sum(sizes)
    return [mine + cut.start for cut in _cuts(sizes)]
