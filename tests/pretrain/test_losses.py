"""Each loss against the loop that its docstring writes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

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


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("kind", ["l2", "mse", "smooth_l1"])
def test_alignment(kind):
    student = torch.randn(2, 3, 5, requires_grad=True)
    teacher = torch.randn(2, 3, 5, requires_grad=True)
    total = 0.0
    for b in range(2):
        for v in range(3):
            s, t = (x[b, v].detach() / x[b, v].detach().norm() for x in (student, teacher))
            if kind == "l2":
                total += 2 - 2 * float(s @ t)
            else:
                d = (s - t).abs()
                rule = d**2 if kind == "mse" else torch.where(d < 1, d**2 / 2, d - 0.5)
                total += float(rule.mean())
    loss = alignment_loss(student, teacher, kind)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)
    assert alignment_loss(student[None], teacher[None], kind).item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None
    assert student.grad.any()


def test_alignment_refuses_other_shapes_and_names():
    with pytest.raises(ValueError, match="differ in shape"):
        alignment_loss(torch.randn(1, 2, 3), torch.randn(1, 3, 3))
    with pytest.raises(ValueError, match="no alignment loss 'cosine'"):
        alignment_loss(torch.randn(1, 2, 3), torch.randn(1, 2, 3), "cosine")


def test_the_teachers_tokens_follow_the_visible_ones():
    teacher = torch.arange(2 * 5 * 3).view(2, 5, 3)
    seen = gather_visible(teacher, torch.tensor([[0, 2], [0, 4]]))
    assert seen.equal(torch.stack([teacher[0, [0, 2]], teacher[1, [0, 4]]]))


@pytest.mark.parametrize("identity", [[0, 1, 2, 3], [0, 1, 0, 3], [5, 5, 5, 5]])
def test_contrastive(identity):
    video, text = unit(4, 3, 6), unit(4, 6, seed=1)
    temp = torch.tensor([0.1])
    total = 0.0
    for i in range(4):
        target = [float(identity[i] == identity[j]) for j in range(4)]
        target = [t / sum(target) for t in target]
        to_text = torch.stack([sum(video[i, f] @ text[j] for f in range(3)) / 3 / 0.1 for j in range(4)])
        to_video = torch.stack([sum(video[j, f] @ text[i] for f in range(3)) / 3 / 0.1 for j in range(4)])
        for scores in (to_text, to_video):
            logs = scores.log_softmax(0)
            total -= sum(t * float(x) for t, x in zip(target, logs, strict=True)) / 2
    ids = torch.tensor(identity)
    loss = contrastive_loss(video, text, video, text, temp, ids, ids)
    assert float(loss) == pytest.approx(total / 4, rel=1e-5)
    assert float(contrastive_loss(video, text, video, text, temp[0], ids, ids)) == pytest.approx(float(loss))


def test_the_mean_of_two_ranks_is_the_loss_and_gradient_of_the_whole_batch():
    ids = torch.tensor([0, 1, 2, 0])
    results = []
    for ranks in (1, 2):
        video, text = unit(4, 2, 6).requires_grad_(), unit(4, 6, seed=1).requires_grad_()
        temp = torch.tensor([0.1], requires_grad=True)
        parts = [
            contrastive_loss(video[rows], text[rows], video, text, temp, ids[rows], ids)
            for rows in torch.arange(4).chunk(ranks)
        ]
        loss = torch.stack(parts).mean()
        loss.backward()
        results.append((loss.detach(), video.grad, text.grad, temp.grad))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ranks_of_any_identities_have_the_mean_of_the_naive_loop(data):
    """Ranks differ in how often a medium occurs in them; targets are normalised over the whole batch, so none shows."""
    ranks, share = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    size = ranks * share
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    video, text = unit(size, 2, 5, seed=size).double(), unit(size, 5, seed=size + 1).double()
    total = 0.0
    for i in range(size):
        same = [j for j in range(size) if ids[j] == ids[i]]
        for scores in ((video[i].mean(0) @ text.T) / 0.2, (text[i] @ video.mean(1).T) / 0.2):
            logs = scores.log_softmax(0)
            total -= sum(float(logs[j]) for j in same) / len(same) / 2
    parts = [
        contrastive_loss(video[rows], text[rows], video, text, torch.tensor(0.2, dtype=torch.float64), ids[rows], ids)
        for rows in torch.arange(size).chunk(ranks)
    ]
    assert float(torch.stack(parts).mean()) == pytest.approx(total / size, rel=1e-9)


def doubles(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    ).requires_grad_()


GRADCHECKS = {
    **{
        f"alignment {kind}": (
            lambda s, kind=kind: alignment_loss(s, doubles(2, 1, 3, 4).detach().flip(-1).bfloat16().to(s.dtype), kind),
            [(2, 1, 3, 4)],
        )
        for kind in ("l2", "mse", "smooth_l1")
    },
    "contrastive": (
        lambda v, t, temp: contrastive_loss(v, t, v, t, temp, torch.tensor([1, 2, 1]), torch.tensor([1, 2, 1])),
        [(3, 2, 4), (3, 4), (1,)],
    ),
    "matching": (lambda a, b, c: matching_loss(a, b, c, torch.tensor([True, False]))[0], [(2, 2)] * 3),
    "mlm": (lambda x: mlm_loss(x, torch.tensor([[1, -100], [0, 2]]))[0], [(2, 2, 3)]),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradients_are_those_of_finite_differences(name):
    loss, shapes = GRADCHECKS[name]
    assert torch.autograd.gradcheck(loss, [doubles(*shape) for shape in shapes])


@pytest.mark.parametrize("name", GRADCHECKS)
def test_losses_are_float32_inside_whatever_surrounds_them(name):
    """Under autocast and from bf16 inputs: the value is that of the same numbers in float32, and float32."""
    loss, shapes = GRADCHECKS[name]
    rounded = [doubles(*shape).detach().bfloat16() for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(*rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(*(x.float() for x in rounded)), rtol=1e-6, atol=1e-7)


def test_scores_are_not_rounded_by_autocast():
    video, text = unit(4, 2, 64), unit(4, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score = similarity(video, text)
    torch.testing.assert_close(score, similarity(video, text))
    assert score.dtype == torch.float32


def test_hard_negatives_are_drawn_by_softmax_among_other_media():
    rows = 6000
    score = torch.tensor([2.0, 1.0, 0.0, 3.0]).expand(rows, -1)
    identity, candidates = torch.zeros(rows, dtype=torch.int64), torch.tensor([1, 2, 3, 0])
    index, there = hard_negatives(score, identity, candidates, torch.arange(rows), "matching.text")
    share = torch.bincount(index, minlength=4) / rows
    assert there.all()
    assert share[3] == 0
    assert torch.allclose(share[:3], torch.tensor([2.0, 1.0, 0.0]).softmax(0), atol=0.02)
    again, _ = hard_negatives(score[:5], identity[:5], candidates, torch.arange(5), "matching.text")
    assert again.equal(index[:5])
    other, _ = hard_negatives(score, identity, candidates, torch.arange(rows), "matching.video")
    assert not other.equal(index)


@pytest.mark.parametrize("identity", [[4], [7, 7, 7]])
def test_rows_without_another_medium_have_no_negative(identity):
    ids = torch.tensor(identity)
    size = len(identity)
    index, there = hard_negatives(torch.zeros(size, size), ids, ids, ids, "matching.text")
    assert not there.any()
    assert (index < size).all()
    positive = torch.randn(size, 2)
    total, count = matching_loss(positive, torch.randn(size, 2), torch.randn(size, 2), there, there)
    expected = sum(-float(row.log_softmax(0)[1]) for row in positive)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert int(count) == size


def test_matching_counts_every_pair():
    positive, video, text = (torch.randn(3, 2) for _ in range(3))
    total, count = matching_loss(positive, video, text, torch.tensor([True, False, True]))
    expected = sum(-float(row.log_softmax(0)[1]) for row in positive)
    expected += sum(-float(row.log_softmax(0)[0]) for row in torch.cat([video[[0, 2]], text]))
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert int(count) == 8


@pytest.fixture
def words():
    """2,000 texts of ten words: [CLS] 2, seven words, [SEP] 3, padding 0."""
    ids = torch.randint(5, 90, (2000, 10), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, 8], ids[:, 9] = 2, 3, 0
    attention = torch.ones_like(ids)
    attention[:, 9] = 0
    return ids, attention


def hide(ids, attention, seeds, **options):
    settings = {"mask_id": 4, "keep_ids": [0, 2], "vocab_size": 90, "probability": 0.5}
    return mask_words(ids, attention, seeds, **settings | options)


def test_hidden_words_follow_berts_rule(words):
    ids, attention = words
    masked, labels = hide(ids, attention, torch.arange(2000))
    chosen = labels != -100
    assert not chosen[:, 0].any()
    assert not chosen[:, 9].any()
    assert chosen[:, 8].any()
    assert labels[chosen].equal(ids[chosen])
    assert masked[~chosen].equal(ids[~chosen])
    assert chosen[:, 1:9].float().mean() == pytest.approx(0.5, abs=0.02)
    asked = masked[chosen]
    assert (asked == 4).float().mean() == pytest.approx(0.8, abs=0.02)
    same = (asked == ids[chosen]).float().mean()
    assert same == pytest.approx(0.1 + 0.1 / 90, abs=0.015)
    others = asked[(asked != 4) & (asked != ids[chosen])]
    assert others.min() >= 0
    assert others.max() == 89


def test_hidden_words_belong_to_the_sample_not_to_the_batch(words):
    ids, attention = words
    seeds = torch.arange(2000) * 7
    masked, labels = hide(ids, attention, seeds)
    wide = F.pad(ids[3:5], (0, 6)), F.pad(attention[3:5], (0, 6))
    masked_wide, labels_wide = hide(*wide, seeds[3:5])
    assert masked_wide[:, :10].equal(masked[3:5])
    assert labels_wide[:, :10].equal(labels[3:5])
    keep_sep, _ = hide(ids, attention, seeds, keep_ids=[0, 2, 3])
    assert (keep_sep[:, 8] == 3).all()


def test_mlm_loss_is_a_sum_and_a_count():
    logits, labels = torch.randn(2, 3, 7), torch.tensor([[1, -100, 5], [-100, -100, 0]])
    expected = -sum(float(logits[b, w].log_softmax(0)[labels[b, w]]) for b, w in ((0, 0), (0, 2), (1, 2)))
    total, count = mlm_loss(logits, labels)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert int(count) == 3
    asked = labels != -100
    torch.testing.assert_close(mlm_loss(logits[asked], labels[asked])[0], total)
    nothing, none = mlm_loss(logits, torch.full_like(labels, -100))
    assert float(nothing) == 0
    assert int(none) == 0
    assert not math.isnan(float(nothing))
