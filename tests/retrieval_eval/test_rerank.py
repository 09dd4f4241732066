"""Re-ranking: the scorer against the model's own matching head, and the order against a naive loop."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from retrieval_eval.decoder import PairScorer
from retrieval_eval.encoders import Encoders
from retrieval_eval.rerank import Candidates, in_order, rerank
from retrieval_eval.texts import TextStates

TEXTS = ["a red square moves left", "blue", "take 3: white goes right", "green moves", "a white square moves left"]


@pytest.fixture(scope="module", params=[1, 2, 3])
def encoders(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Encoders:
    folder = make_checkpoint(tmp_path_factory.mktemp("fusion"), seed=1, fusion_layers=request.param)
    return Encoders.load(folder, "cpu")


def _naive(encoders: Encoders, tokens_VND: np.ndarray) -> np.ndarray:
    texts = encoders.texts(TEXTS)
    match_VU = np.empty((len(tokens_VND), len(TEXTS)), dtype=np.float32)
    for v in range(len(tokens_VND)):
        for u in range(len(TEXTS)):
            words = texts.mask_BL[u : u + 1].sum()
            with torch.no_grad():
                logits = encoders.model.match_logits(
                    texts.hidden_BLD[u : u + 1, :words].clone(),
                    texts.mask_BL[u : u + 1, :words],
                    torch.from_numpy(tokens_VND[v : v + 1]).float(),
                )
            match_VU[v, u] = logits[0, 1]
    return match_VU


def _states(encoders: Encoders) -> TextStates:
    texts = encoders.texts(TEXTS)
    with torch.inference_mode():
        started = PairScorer(encoders.model).start(texts.hidden_BLD, texts.mask_BL)
    return TextStates(started.numpy(), texts.mask_BL.sum(1).numpy())


@pytest.mark.parametrize("words", [1, 20, 8192])
def test_scores_and_order_equal_a_loop_over_pairs(encoders: Encoders, words: int) -> None:
    generator = np.random.default_rng(0)
    tokens_VND = generator.standard_normal((7, 12, 32)).astype(np.float16)
    dual_VU = generator.standard_normal((7, len(TEXTS))).astype(np.float32)
    naive_VU = _naive(encoders, tokens_VND)
    assert naive_VU.std() > 0.05  # the pairs do differ
    top = 2
    clips_UK, texts_VK = np.argsort(-dual_VU.T, axis=1)[:, :top], np.argsort(-dual_VU, axis=1)[:, :top]
    made = rerank(
        dual_VU, Candidates(clips_UK, texts_VK), tokens_VND, _states(encoders), PairScorer(encoders.model), words
    )
    pairs = set()
    for u in range(len(TEXTS)):
        first = clips_UK[u]
        pairs |= {(int(v), u) for v in first}
        rest = [v for v in np.argsort(-dual_VU[:, u]) if v not in first]
        expected = [*sorted(first, key=lambda v, u=u: -naive_VU[v, u]), *rest]
        assert np.argsort(-made.t2v_VU[:, u]).tolist() == expected
        assert made.t2v_VU[first, u] == pytest.approx(naive_VU[first, u], abs=1e-5)
    for v in range(7):
        first = texts_VK[v]
        pairs |= {(v, int(u)) for u in first}
        rest = [u for u in np.argsort(-dual_VU[v]) if u not in first]
        expected = [*sorted(first, key=lambda u, v=v: -naive_VU[v, u]), *rest]
        assert np.argsort(-made.v2t_VU[v]).tolist() == expected
    assert made.pairs == len(pairs)


def test_the_bf16_scores_are_float32_and_near(encoders: Encoders) -> None:
    generator = np.random.default_rng(2)
    tokens_VND = generator.standard_normal((3, 12, 32)).astype(np.float16)
    dual_VU = generator.standard_normal((3, len(TEXTS))).astype(np.float32)
    both = Candidates(np.tile(np.arange(3), (len(TEXTS), 1)), np.tile(np.arange(len(TEXTS)), (3, 1)))
    exact, rough = (
        rerank(dual_VU, both, tokens_VND, _states(encoders), PairScorer(encoders.model), precision=precision).t2v_VU
        for precision in ("fp32", "bf16")
    )
    assert np.abs(exact - rough).max() < 0.1 * np.abs(exact).max()
    assert (exact != rough).any()


def test_what_is_not_reranked_stays_behind_in_its_order() -> None:
    generator = np.random.default_rng(1)
    dual_VU = (generator.standard_normal((40, 30)) * 1e-3).astype(np.float32)
    match_VU = (generator.standard_normal((40, 30)) * 50).astype(np.float32)
    chosen_VU = generator.random((40, 30)) < 0.3
    final_VU = in_order(dual_VU, match_VU, chosen_VU)
    for u in range(30):
        chosen = np.flatnonzero(chosen_VU[:, u])
        rest = np.flatnonzero(~chosen_VU[:, u])
        expected = [*chosen[np.argsort(-match_VU[chosen, u])], *rest[np.argsort(-dual_VU[rest, u])]]
        assert np.argsort(-final_VU[:, u]).tolist() == expected


def test_a_model_without_fusion_layers_is_refused(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    encoders = Encoders.load(make_checkpoint(tmp_path, fusion_layers=0), "cpu")
    with pytest.raises(UserError, match="no fusion layers"):
        PairScorer(encoders.model)


def test_a_score_that_is_not_finite_is_refused(run_folder: Path) -> None:
    encoders = Encoders.load(run_folder, "cpu")
    tokens_VND = np.full((1, 12, 32), np.nan, dtype=np.float16)
    everything = Candidates(np.zeros((len(TEXTS), 1), dtype=np.int64), np.arange(len(TEXTS))[None])
    dual_VU, states, scorer = np.zeros((1, len(TEXTS)), np.float32), _states(encoders), PairScorer(encoders.model)
    with pytest.raises(UserError, match="5 match scores are not finite"):
        rerank(dual_VU, everything, tokens_VND, states, scorer)
