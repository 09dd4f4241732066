"""What is made of the tokens: poolings and the classification head."""

import pytest
import torch


def test_poolings(encoder, clip):
    model = encoder(pool_norm=True)
    tokens = model(clip).tokens_BLD
    cls, patches = tokens[:, :1], tokens[:, 1:]
    frames = patches.view(3, 2, 16, 32).mean(2)
    expected = {"cls": cls, "avg": frames, "cls+avg": cls + frames, "cls_cat_avg": torch.cat([cls, frames], 1)}
    for pool, value in expected.items():
        torch.testing.assert_close(model.pooled(tokens, 2, pool, per_frame=True), model.pool_norm(value))
    torch.testing.assert_close(model.pooled(tokens), model.pool_norm(cls + patches.mean(1, keepdim=True)))


@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg", "cls_cat_avg"])
def test_masked_tokens_are_pooled_too(encoder, clip, pool):
    """Frame by frame where every frame shows as many patches, else all together."""
    model = encoder()
    visible = torch.tensor([[0, 3, 8, 17, 30]]).expand(3, -1)
    tokens = model(clip, visible).tokens_BLD
    cls, first, second = tokens[:, 0], tokens[:, 1:3].mean(1), tokens[:, 3:].mean(1)
    vectors = {"cls": [cls], "avg": [first, second], "cls+avg": [cls + first, cls + second],
               "cls_cat_avg": [cls, first, second]}[pool]  # fmt: skip
    torch.testing.assert_close(model.pooled(tokens, 2, pool, per_frame=True), torch.stack(vectors, 1))
    mean = tokens[:, 1:].mean(1)
    vectors = {"cls": [cls], "avg": [mean], "cls+avg": [cls + mean], "cls_cat_avg": [cls, mean]}[pool]
    torch.testing.assert_close(model.pooled(tokens, 2, pool), torch.stack(vectors, 1))


@pytest.mark.parametrize("pool", ["cls", "avg", "cls+avg"])
def test_the_head_reads_what_it_is_told_to(encoder, clip, pool):
    model = encoder(classes=5, head_pool=pool, pool_norm=True)
    tokens = model(clip).tokens_BLD
    feature = {"cls": 1, "avg": 0, "cls+avg": 1}[pool] * tokens[:, 0]
    if pool != "cls":
        feature = feature + tokens[:, 1:].mean(1)
    assert model.classify(tokens).shape == (3, 5)
    torch.testing.assert_close(model.classify(tokens), feature @ model.head.weight.T + model.head.bias)


def test_dropout_before_the_head_belongs_to_the_sample(encoder, clip):
    model = encoder(classes=5, head_dropout=0.4)
    torch.nn.init.eye_(model.head.weight)
    tokens, seeds = torch.ones(2000, 3, 32), torch.arange(2000)
    assert model.classify(tokens).equal(model.classify(tokens, seeds))
    model.train()
    drawn = model.classify(tokens, seeds)
    assert model.classify(tokens[:7], seeds[:7]).equal(drawn[:7])
    assert not drawn.equal(model.classify(tokens, seeds + 1))
    assert not drawn.equal(model.classify(tokens))
    assert set(drawn.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - torch.tensor(0.4)))}
    assert (drawn == 0).float().mean() == pytest.approx(0.4, abs=0.02)
