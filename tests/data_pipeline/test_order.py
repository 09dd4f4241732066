import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from data_pipeline.draws import derive
from data_pipeline.order import Order, OrderCorpus, grouped_permutation, substitute
from data_pipeline.windows import WindowedEpoch


@st.composite
def orders(draw):
    """Any mixture of one to three corpora in shards of any sizes, some with groups, some a few shards at a time, by
    weights or by epochs, dropping or wrapping the tail."""
    tail = draw(st.sampled_from(["drop", "wrap"]))
    weighted = draw(st.booleans())
    corpora = []
    for number in range(draw(st.integers(1, 3))):
        group_size = draw(st.sampled_from([1, 1, 2, 3]))
        batch = group_size * draw(st.integers(1, 8))
        size = draw(st.integers(group_size if tail == "wrap" else batch, 60 + batch))
        cuts = sorted(draw(st.sets(st.integers(1, max(1, size - 1)), max_size=12)) & set(range(1, size)))
        shard_sizes = tuple(np.diff([0, *cuts, size]).tolist())  # one-sample shards, and fewer shards than ranks
        labels = np.random.default_rng(number).integers(0, draw(st.integers(1, 6)), size)
        corpora.append(
            OrderCorpus(
                name=f"corpus {number}",
                size=size,
                batch=batch,
                kind=draw(st.sampled_from(["video", "image"])),
                weight=draw(st.floats(0.05, 20)) if weighted else None,
                epochs=1.0 if weighted else draw(st.sampled_from([1.0, 1.0, 0.5, 3.0])),
                shard_sizes=shard_sizes,
                window=draw(st.none() | st.integers(1, 5)) if group_size == 1 else None,
                labels=labels if group_size > 1 else None,
                group_size=group_size,
            )
        )
    return Order(corpora, draw(st.integers(0, 2**62)), tail)


def same(a, b):
    return (
        a.step == b.step
        and a.corpus == b.corpus
        and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("epoch", "index", "seeds"))
    )


@given(orders(), st.integers(0, 200))
@settings(deadline=None)
def test_the_ranks_slices_are_the_global_batch_for_every_number_of_ranks(order, step):
    whole = order.batch(step)
    for world in (n for n in range(1, len(whole) + 1) if len(whole) % n == 0):
        parts = [order.slice(step, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {len(whole) // world}
        for name in ("epoch", "index", "seeds"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@given(orders())
@settings(deadline=None)
def test_no_sample_comes_twice_in_an_epoch_and_an_epoch_is_complete_but_for_its_tail(order):
    seen = {}
    for step in range(80):
        batch = order.batch(step)
        for epoch, index in zip(batch.epoch.tolist(), batch.index.tolist(), strict=True):
            place = (batch.corpus, epoch, index)
            assert place not in seen, f"{place} in steps {seen[place]} and {step}"
            assert 0 <= index < order.corpora[batch.corpus].size
            seen[place] = step
    for corpus, plan in enumerate(order.corpora):
        used = plan.size // plan.group_size * plan.group_size
        if order.tail == "drop":
            used = used // plan.batch * plan.batch
        epochs = sorted({epoch for c, epoch, _ in seen if c == corpus})
        assert epochs == list(range(len(epochs)))
        for epoch in epochs[:-1]:
            assert sum((c, e) == (corpus, epoch) for c, e, _ in seen) == used


@given(orders(), st.integers(0, 3000))
@settings(deadline=None)
def test_position_by_arithmetic_equals_walking(order, stop):
    walked = [0] * len(order.corpora)
    for step in range(stop):
        walked[order.corpus_of(step)] += 1
    assert [order.visits(corpus, stop) for corpus in range(len(walked))] == walked


@given(orders(), st.integers(0, 10**6), st.data())
@settings(deadline=None)
def test_a_run_resumed_at_any_step_on_other_ranks_goes_on_with_the_same_global_sequence(order, stop, data):
    """What `before` ranks took until `stop` and `after` ranks take from there is what one rank takes throughout."""

    def taken(step, world):
        """Rank by rank, as separate processes would: each with an order of its own."""
        ranks = [Order(order.corpora, order.seed, order.tail).slice(step, rank, world) for rank in range(world)]
        return [pair for plan in ranks for pair in zip(plan.epoch.tolist(), plan.index.tolist(), strict=True)]

    for step in range(max(0, stop - 1), stop + 2):
        whole = order.batch(step)
        worlds = [n for n in range(1, len(whole) + 1) if len(whole) % n == 0]
        before_or_after = data.draw(st.sampled_from(worlds))
        expected = list(zip(whole.epoch.tolist(), whole.index.tolist(), strict=True))
        assert taken(step, before_or_after) == expected


@st.composite
def windowed(draw):
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=14))
    return WindowedEpoch(draw(st.integers(0, 2**60)), np.array(sizes), draw(st.integers(1, 16))), sizes


@given(windowed(), st.data())
@settings(deadline=None)
def test_a_windowed_epoch_is_whole_local_and_the_same_by_any_way_of_asking(made, data):
    epoch, sizes = made
    total, count = sum(sizes), -(-len(sizes) // epoch._window)
    whole = epoch.at(np.arange(total))
    assert sorted(whole.tolist()) == list(range(total))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    expected = []  # the slow way: a window after another
    for window in range(count):
        shards = epoch.shards(window)
        inside = [sample for shard in shards for sample in np.flatnonzero(shard_of == shard)]
        part = whole[len(expected) : len(expected) + len(inside)].tolist()
        assert sorted(part) == sorted(inside)
        expected += part
    places = np.array(data.draw(st.lists(st.integers(0, total - 1), min_size=1, max_size=20)))
    assert epoch.at(places).tolist() == whole[places].tolist()


def test_windows_and_their_samples_change_from_epoch_to_epoch():
    order = Order([OrderCorpus("a", 120, 40, shard_sizes=(10,) * 12, window=4)], seed=5)
    batches = [order.batch(step).index for step in range(6)]
    shards = [frozenset((batch // 10).tolist()) for batch in batches]
    assert all(len(some) == 4 for some in shards), "forty samples lie in the four shards of a window"
    assert frozenset.union(*shards[:3]) == set(range(12))
    assert set(shards[:3]) != set(shards[3:])
    assert any(batch.tolist() != sorted(batch.tolist()) for batch in batches)


@given(orders(), st.integers(0, 10**7))
@settings(max_examples=50, deadline=None)
def test_a_fresh_order_at_any_step_equals_one_that_walked_there(order, step):
    fresh = Order(order.corpora, order.seed, order.tail)
    for before in range(max(0, step - 3), step):
        order.batch(before)
    assert same(order.batch(step), fresh.batch(step))


@given(orders())
@settings(deadline=None)
def test_the_steps_are_dealt_out_by_weight_evenly(order):
    weights = [
        c.weight if c.weight is not None else float(order.steps_per_epoch(i)) * c.epochs
        for i, c in enumerate(order.corpora)
    ]
    for steps in (10, 97, 1000):
        for corpus, weight in enumerate(weights):
            expected = steps * weight / sum(weights)
            assert abs(order.visits(corpus, steps) - expected) <= len(weights)


@given(orders())
@settings(deadline=None)
def test_seeds_belong_to_the_sample_alone(order):
    batch = order.batch(5)
    for row in range(len(batch)):
        expected = derive(order.seed, batch.corpus, int(batch.epoch[row]), int(batch.index[row]))
        assert int(batch.seeds[row]) == expected
    assert len(set(batch.seeds.tolist())) == len(batch)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=80), st.integers(2, 6), st.integers(0, 2**40))
@settings(deadline=None)
def test_groups_are_whole_and_only_a_remainder_is_dropped(labels, group_size, seed):
    labels = np.array(labels)
    order = grouped_permutation(seed, labels, group_size)
    assert len(order) == len(labels) // group_size * group_size
    assert len(set(order.tolist())) == len(order)
    pure = sum(len(set(group)) == 1 for group in labels[order].reshape(-1, group_size).tolist())
    assert pure >= sum(count // group_size for count in np.bincount(labels))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=8, max_size=120), st.integers(0, 2**40))
@settings(deadline=None)
def test_a_group_holds_a_value_twice_only_where_rounds_meet(samples, seed):
    labels, unlike = np.array(samples).T
    order = grouped_permutation(seed, labels, 4, unlike)
    assert sorted(order.tolist()) == sorted(set(order.tolist()))
    assert len(order) == len(labels) // 4 * 4
    pure = sum(len(set(group)) == 1 for group in labels[order].reshape(-1, 4).tolist())
    assert pure >= sum(count // 4 for count in np.bincount(labels))
    for label in range(3):  # each meeting of two rounds lies in one group at most; leftovers are too few for a pure one
        rounds = int(np.bincount(unlike[labels == label], minlength=1).max())
        groups = [group for group in order.reshape(-1, 4) if set(labels[group].tolist()) == {label}]
        assert sum(len(set(unlike[group].tolist())) < 4 for group in groups) <= max(0, rounds - 1)


def test_groups_of_unlike_samples_are_unlike():
    labels, unlike = np.divmod(np.arange(2 * 24 * 4), 96)
    unlike = unlike % 24
    plain = grouped_permutation(7, labels, 4)
    kept = grouped_permutation(7, labels, 4, unlike)
    assert sum(len(set(group)) < 4 for group in unlike[plain].reshape(-1, 4).tolist()) > 3
    assert all(len(set(group)) == 4 for group in unlike[kept].reshape(-1, 4).tolist())
    assert (labels[kept].reshape(-1, 4) == labels[kept].reshape(-1, 4)[:, :1]).all()


def test_groups_stay_together_in_batches_and_change_between_epochs():
    labels = np.repeat(np.arange(20), 12)
    order = Order([OrderCorpus("a", 240, 16, labels=labels, group_size=4)], seed=3)
    epochs = [np.concatenate([order.batch(s).index for s in range(e * 15, e * 15 + 15)]) for e in range(2)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(240))
        assert (labels[epoch].reshape(-1, 4) == labels[epoch].reshape(-1, 4)[:, :1]).all()
    members = [{frozenset(group) for group in epoch.reshape(-1, 4).tolist()} for epoch in epochs]
    assert len(members[0] & members[1]) < 10


def test_epochs_and_corpora_and_seeds_differ():
    order = Order([OrderCorpus("a", 64, 64), OrderCorpus("b", 64, 64)], seed=1)
    drawn = [tuple(order.batch(step).index.tolist()) for step in range(6)]
    drawn.append(tuple(Order(order.corpora, seed=2).batch(0).index.tolist()))
    assert len(set(drawn)) == 7


def test_the_order_never_changes():
    """A resumed run continues what an earlier version began: these numbers may not move."""
    golden = json.loads((Path(__file__).parent / "golden" / "order.json").read_text())
    labels = np.arange(40) % 3
    order = Order([OrderCorpus("a", 50, 8), OrderCorpus("b", 40, 8, labels=labels, group_size=4)], 7)
    for step, expected in golden.items():
        batch = order.batch(int(step))
        assert batch.corpus == expected["corpus"]
        for name in ("epoch", "index", "seeds"):
            assert getattr(batch, name).tolist() == expected[name]


def test_a_late_step_costs_what_an_early_one_does():
    windows = {"shard_sizes": (1000,) * 1000, "window": 16}
    corpora = [OrderCorpus("a", 20_000, 256), OrderCorpus("b", 7_000, 128, kind="image")]
    corpora.append(OrderCorpus("c", 1_000_000, 512, **windows))

    def cost(step):
        best = np.inf
        for _ in range(5):
            order = Order(corpora, 1)
            start = time.thread_time()
            order.batch(step)
            best = min(best, time.thread_time() - start)
        return best

    assert cost(1_000_000) < 3 * cost(1) + 0.005


@given(st.integers(2, 50), st.integers(-(2**62), 2**62), st.data())
@settings(deadline=None)
def test_a_substitute_is_another_sample_and_a_pure_draw(size, seed, data):
    index = data.draw(st.integers(0, size - 1))
    first = substitute(seed, index, 1, size)
    assert first == substitute(seed, index, 1, size)
    assert first[0] != index
    assert 0 <= first[0] < size
    assert first[1] not in {seed, substitute(seed, index, 2, size)[1]}


def test_substitutes_reach_every_other_sample():
    assert {substitute(seed, 3, 1, 8)[0] for seed in range(300)} == {0, 1, 2, 4, 5, 6, 7}


@given(st.integers(1, 300), st.integers(1, 40))
@settings(deadline=None)
def test_a_batch_that_does_not_divide_names_numbers_that_do(batch, world):
    assume(batch % world)
    order = Order([OrderCorpus("a", batch, batch)], 0)
    with pytest.raises(UserError) as told:
        order.slice(0, 0, world)
    words = told.value.cure.removeprefix("Use ").split()
    larger, ranks = int(words[0].rstrip(",")), int(words[2])
    assert larger % world == 0
    assert batch % ranks == 0
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    "corpora, tail, words",
    [
        ([], "drop", ["no corpus"]),
        ([OrderCorpus("few", 10, 16)], "drop", ["few", "10 samples", "at most 10", "tail=wrap"]),
        ([OrderCorpus("few", 0, 16)], "wrap", ["few", "0 samples"]),
        (
            [OrderCorpus("odd", 100, 10, labels=np.zeros(100), group_size=4)],
            "drop",
            ["10", "groups of 4", "batch of 8"],
        ),
    ],
)
def test_what_cannot_be_ordered_is_refused(corpora, tail, words):
    with pytest.raises(UserError) as told:
        Order(corpora, 0, tail)
    for word in words:
        assert word in str(told.value)


def test_wrapping_serves_a_corpus_smaller_than_a_batch():
    order = Order([OrderCorpus("few", 3, 8)], 0, "wrap")
    batch = order.batch(0)
    assert batch.epoch.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert sorted(batch.index[:3].tolist()) == sorted(batch.index[3:6].tolist()) == [0, 1, 2]
