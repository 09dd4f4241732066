"""The index against brute force."""

import numpy as np
import pytest

from configs.errors import UserError
from retrieval_eval.index import FlatIndex


def unit(generator: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = generator.standard_normal(shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("queries", [1, 3, 1100])
def test_scores_are_the_mean_over_frames_of_cosines(queries: int) -> None:
    generator = np.random.default_rng(0)
    frames_VTE, texts_QE = unit(generator, 37, 8, 64), unit(generator, queries, 64)
    brute_QV = np.einsum("vte,qe->qvt", frames_VTE, texts_QE).mean(axis=2)
    index = FlatIndex(frames_VTE.mean(axis=1))
    assert np.abs(index.scores(texts_QE) - brute_QV).max() < 1e-5
    found_QK, positions_QK = index.search(texts_QE, 5)
    assert np.abs(found_QK - np.sort(brute_QV, axis=1)[:, :-6:-1]).max() < 1e-5
    assert np.abs(np.take_along_axis(brute_QV, positions_QK, axis=1) - found_QK).max() < 1e-5


def test_an_index_survives_its_bytes() -> None:
    vectors = unit(np.random.default_rng(1), 20, 16)
    again = FlatIndex.from_bytes(FlatIndex(vectors).to_bytes())
    assert (again.search(vectors, 1)[1][:, 0] == np.arange(20)).all()


def test_a_vector_that_is_not_finite_is_refused() -> None:
    vectors = np.zeros((4, 8))
    vectors[2, 3] = np.inf
    with pytest.raises(UserError, match="1 of 4 vectors"):
        FlatIndex(vectors)


def test_all_scores_are_those_that_a_search_for_everything_finds() -> None:
    generator = np.random.default_rng(3)
    index = FlatIndex(unit(generator, 301, 64))
    queries = unit(generator, 50, 64)
    found_QK, positions_QK = index.search(queries, 301)
    assert np.abs(np.take_along_axis(index.scores(queries), positions_QK, axis=1) - found_QK).max() < 1e-5
