"""Approximate indexes and the torch one against exact search by a plain product."""

import numpy as np
import pytest

from configs.errors import UserError
from retrieval_eval.approximate import Kind, build, lists_for, recall, sample_rows
from retrieval_eval.index import DeviceIndex, FlatIndex, VectorIndex, open_index


def clustered(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Vectors around 40 centres with lengths below one, as means of unit vectors are."""
    generator = np.random.default_rng(seed)
    centres = generator.standard_normal((40, width))
    vectors = centres[generator.integers(0, 40, count)] + 0.3 * generator.standard_normal((count, width))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors * generator.uniform(0.6, 1.0, (count, 1))).astype(np.float32)


@pytest.mark.parametrize("slice_rows", [7, 100, 1000])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_the_torch_index_finds_what_a_plain_product_finds(slice_rows: int, k: int) -> None:
    vectors, queries = clustered(203, 16), clustered(11, 16, seed=1)
    scores, rows = DeviceIndex(vectors, "cpu", slice_rows).search(queries, k)
    plain = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    order = np.argsort(-plain, axis=1)[:, :k]
    assert rows.tolist() == order.tolist()
    assert np.allclose(scores, np.take_along_axis(plain, order, axis=1), atol=1e-6)


@pytest.mark.parametrize("kind,least", [("flat", 100.0), ("hnsw", 95.0), ("ivfpq", 30.0)])
def test_recall_is_the_share_of_the_exact_answer(kind: Kind, least: float) -> None:
    vectors, queries = clustered(3000, 32), clustered(50, 32, seed=1)
    index = build(kind, vectors)
    found = recall(index, vectors, queries, k=10)
    plain = np.argsort(-(queries @ vectors.T), axis=1)[:, :10]
    rows = index.search(queries, 10)[1]
    naive = 100 * np.mean([len(set(plain[q]) & set(rows[q])) / 10 for q in range(len(queries))])
    assert (found.k, found.queries) == (10, 50)
    assert found.percent == pytest.approx(naive)
    assert found.percent >= least


def test_an_index_survives_its_own_file_format() -> None:
    vectors, queries = clustered(500, 16), clustered(5, 16, seed=1)
    index = build("hnsw", vectors)
    again = VectorIndex.from_bytes(index.to_bytes())
    assert again.search(queries, 7)[1].tolist() == index.search(queries, 7)[1].tolist()


def test_too_few_vectors_for_product_codes() -> None:
    with pytest.raises(UserError, match="255 vectors are too few"):
        build("ivfpq", clustered(255, 16))
    assert [lists_for(n) for n in (1, 256, 10_000, 1_000_000)] == [1, 6, 256, 4000]


def test_without_a_gpu_auto_is_faiss_on_the_cpu_and_cuda_is_refused() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert isinstance(open_index(clustered(10, 8)), FlatIndex)
    with pytest.raises(UserError, match="There is no GPU"):
        open_index(clustered(10, 8), "cuda")


def test_rows_to_measure_with_are_distinct_sorted_and_drawn_by_seed() -> None:
    rows = sample_rows(100, 30, seed=1)
    assert len(set(rows.tolist())) == 30
    assert rows.tolist() == sorted(rows.tolist()) == sample_rows(100, 30, seed=1).tolist()
    assert sample_rows(5, 30).tolist() == [0, 1, 2, 3, 4]
