"""The text tower against transformers' own BERT, what it attends to, its initialisation and its refusals."""

import pytest
import torch

from configs.errors import UserError
from pretrain.models import text as text_module
from pretrain.models.config import TextConfig
from pretrain.models.text import TextTower, bert_config


def config(**options) -> TextConfig:
    settings = {
        "width": 16, "heads": 2, "layers": 2, "fusion_layers": 1, "intermediate": 32, "vocab_size": 50,
        "positions": 24, "max_tokens": 12, "dropout": 0.0,
    }  # fmt: skip
    return TextConfig(**settings | options)


@pytest.fixture
def words():
    ids = torch.tensor([[2, 7, 8, 9, 3, 0, 0], [2, 30, 31, 32, 33, 34, 3]])
    return ids, (ids != 0).long()


def tower(**options) -> TextTower:
    torch.manual_seed(0)
    built = TextTower(config(**options), vision_width=10).eval()
    with torch.no_grad():
        for value in built.parameters():
            value.copy_(torch.randn_like(value) * 0.3)
    return built


@pytest.fixture
def bert_folder(tmp_path):
    from transformers import BertForMaskedLM

    torch.manual_seed(1)
    shape = bert_config(config(layers=3, fusion_layers=0), fusion=False)
    shape._attn_implementation = "sdpa"
    bert = BertForMaskedLM(shape).eval()
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", bert


def test_text_layers_are_berts(words, bert_folder):
    folder, bert = bert_folder
    ids, attention = words
    ours = TextTower(config(layers=3, fusion_layers=0, init=str(folder)), vision_width=10).eval()
    hidden = ours.encode(ids, attention)
    theirs = bert.bert(input_ids=ids, attention_mask=attention).last_hidden_state
    kept = attention.bool()
    torch.testing.assert_close(hidden[kept], theirs[kept], rtol=1e-4, atol=1e-5)
    logits = bert(input_ids=ids, attention_mask=attention).logits
    torch.testing.assert_close(ours.mlm_logits(hidden)[kept], logits[kept], rtol=1e-4, atol=1e-5)


def test_a_bert_fills_text_and_fusion_layers_but_not_cross_attention(bert_folder):
    folder, bert = bert_folder
    ours = TextTower(config(init=str(folder)), vision_width=10)
    given = bert.state_dict()
    for name, value in ours.state_dict().items():
        if ".crossattention." in name:
            assert name not in given
        else:
            assert value.equal(given[name]), name


def test_a_bert_of_another_size_is_refused(bert_folder):
    with pytest.raises(UserError, match=r"other shape: bert\.embeddings\.word_embeddings\.weight"):
        TextTower(config(init=str(bert_folder[0]), vocab_size=51), vision_width=10)
    with pytest.raises(UserError, match=r"left over: bert\.encoder\.layer\.2"):
        TextTower(config(init=str(bert_folder[0]), layers=1), vision_width=10)


def test_a_folder_without_a_bert_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no BERT") as error:
        TextTower(config(init=str(tmp_path)), vision_width=10)
    assert "null" in error.value.cure


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_an_unknown_transformers_is_refused(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(UserError, match=version):
        text_module._bert_module()


def test_padding_is_not_attended_to_by_text_or_fusion(words):
    ids, attention = words
    built, vision = tower(), torch.randn(2, 5, 10)
    hidden = built.encode(ids, attention)
    other = ids.clone()
    other[0, 5:] = 44
    kept = attention.bool()
    torch.testing.assert_close(built.encode(other, attention)[kept], hidden[kept])
    torch.testing.assert_close(
        built.fuse(built.encode(other, attention), attention, vision)[kept], built.fuse(hidden, attention, vision)[kept]
    )
    short = built.encode(ids[:1, :5], attention[:1, :5])
    torch.testing.assert_close(short, hidden[:1, :5], rtol=1e-4, atol=1e-5)


def test_fusion_reads_the_text_both_ways_and_the_video(words):
    ids, attention = words
    built, vision = tower(), torch.randn(2, 5, 10)
    hidden = built.encode(ids, attention)
    fused = built.fuse(hidden, attention, vision)
    moved = hidden.clone()
    moved[1, -1] += 1
    assert not torch.allclose(built.fuse(moved, attention, vision)[1, 0], fused[1, 0])
    seen = vision.clone()
    seen[0, 4] += 1
    again = built.fuse(hidden, attention, seen)
    assert not torch.allclose(again[0], fused[0])
    torch.testing.assert_close(again[1], fused[1])
    torch.testing.assert_close(built.fuse(hidden, attention, vision.flip(1)), fused, rtol=1e-4, atol=1e-5)


def test_eager_and_sdpa_agree(words):
    ids, attention = words
    vision = torch.randn(2, 5, 10)
    results = []
    for kind in ("sdpa", "eager"):
        built = tower(attention=kind)
        results.append(built.fuse(built.encode(ids, attention), attention, vision))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_the_word_head_is_tied_and_the_padding_word_starts_at_zero():
    built = TextTower(config(), vision_width=10)
    predictions, embedding = built.cls.predictions, built.bert.embeddings.word_embeddings
    assert predictions.decoder.weight is embedding.weight
    assert predictions.decoder.bias is predictions.bias
    assert not embedding.weight[0].any()
    assert built.bert.encoder.layer[1].output.dense.weight.detach().std().item() == pytest.approx(0.02, rel=0.2)
    assert built.bert.encoder.layer[2].crossattention.self.key.weight.detach().std().item() == pytest.approx(
        0.02, rel=0.3
    )
    names = [name for name, _ in built.named_parameters()]
    assert len(names) == len(set(names))
    assert not [name for name in built.state_dict() if "position_ids" in name or "pooler" in name]
