"""The text tower against transformers' own BERT, what it attends to, its initialisation and its refusals."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from data_pipeline.torchvision_shim import ensure_torchvision
from pretrain.models import text as text_module
from pretrain.models.config import TextConfig
from pretrain.models.text import TextTower


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


def real_bert(kind="BertForMaskedLM", layers=3, **options):
    """A BERT as transformers makes it, its weights far enough from zero to matter."""
    ensure_torchvision()
    import transformers

    torch.manual_seed(1)
    shape = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    bert = getattr(transformers, kind)(shape).eval()
    with torch.no_grad():
        for value in bert.parameters():
            value.copy_(torch.randn_like(value) * 0.3)
    return bert


@pytest.fixture
def bert_folder(tmp_path):
    bert = real_bert()
    bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert", bert


def rewritten(folder, out, rename, suffix="bin"):
    """The same BERT in another form: names through `rename` (None drops), as a torch file or safetensors."""
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    state = {rename(name): value for name, value in load_file(folder / "model.safetensors").items() if rename(name)}
    if suffix == "bin":
        torch.save(state, out / "pytorch_model.bin")
    else:
        save_file(state, out / "model.safetensors")
    return out


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


@pytest.mark.parametrize("split", [1, 2])
def test_hidden_states_where_the_tower_is_split(words, bert_folder, split):
    """What `encode` gives is BERT's own hidden state after that many layers."""
    folder, bert = bert_folder
    ids, attention = words
    ours = TextTower(config(layers=split, fusion_layers=3 - split, init=str(folder)), vision_width=10).eval()
    theirs = bert.bert(input_ids=ids, attention_mask=attention, output_hidden_states=True).hidden_states[split]
    kept = attention.bool()
    torch.testing.assert_close(ours.encode(ids, attention)[kept], theirs[kept], rtol=1e-4, atol=1e-5)


def test_fusion_layers_are_a_decoders_that_reads_both_ways(words):
    """transformers' own cross-attention layers, given a mask that hides padding and nothing that comes later."""
    ids, attention = words
    bert = real_bert("BertModel", layers=2, is_decoder=True, add_cross_attention=True, attn_implementation="eager")
    ours = TextTower(config(layers=0, fusion_layers=2), vision_width=16).eval()
    ours.bert.load_state_dict({name: value for name, value in bert.state_dict().items() if "pooler" not in name})
    vision = torch.randn(2, 5, 16)
    both_ways = torch.zeros(2, 1, 7, 7).masked_fill(attention[:, None, None, :] == 0, torch.finfo(torch.float32).min)
    theirs = bert(
        input_ids=ids, attention_mask=both_ways, encoder_hidden_states=vision, use_cache=False
    ).last_hidden_state
    fused = ours.fuse(ours.encode(ids, attention), attention, vision)
    kept = attention.bool()
    torch.testing.assert_close(fused[kept], theirs[kept], rtol=1e-4, atol=1e-5)


def test_a_bert_fills_text_and_fusion_layers_but_not_cross_attention(bert_folder, caplog):
    folder, bert = bert_folder
    caplog.set_level("INFO")
    ours = TextTower(config(init=str(folder)), vision_width=10)
    given = bert.state_dict()
    for name, value in ours.state_dict().items():
        if ".crossattention." in name:
            assert name not in given
            assert value.abs().max() < 0.2 or "LayerNorm" in name  # as initialised: normal(0.02) or constant
        else:
            assert value.equal(given[name]), name
    assert "cross-attention is new" in caplog.text


def old_names(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize(
    ("form", "head"),
    [
        (lambda name: name, True),
        (old_names, True),
        (lambda name: name.removeprefix("bert.") if name.startswith("bert.") else None, False),
        (lambda name: old_names(name) if not name.startswith("cls.") else None, False),
    ],
)
def test_every_form_of_a_bert(words, bert_folder, tmp_path, form, head, suffix, caplog):
    folder, bert = bert_folder
    other = rewritten(folder, tmp_path / "other", form, suffix)
    ours = TextTower(config(layers=3, fusion_layers=0, init=str(other)), vision_width=10).eval()
    ids, attention = words
    hidden = ours.encode(ids, attention)
    theirs = bert.bert(input_ids=ids, attention_mask=attention).last_hidden_state
    torch.testing.assert_close(hidden[attention.bool()], theirs[attention.bool()], rtol=1e-4, atol=1e-5)
    dense = ours.state_dict()["cls.predictions.transform.dense.weight"]
    assert dense.equal(bert.state_dict()["cls.predictions.transform.dense.weight"]) == head
    assert ("no word head" in caplog.text) == (not head)


@pytest.mark.parametrize("kind", ["BertModel", "BertForPreTraining"])
def test_poolers_and_other_heads_are_dropped_by_name(tmp_path, kind):
    bert = real_bert(kind)
    bert.save_pretrained(tmp_path / "bert")
    ours = TextTower(config(init=str(tmp_path / "bert")), vision_width=10)
    inner = bert if kind == "BertModel" else bert.bert
    assert ours.bert.embeddings.word_embeddings.weight.equal(inner.embeddings.word_embeddings.weight)


def test_what_a_bert_lacks_or_has_too_much_is_listed_at_once(bert_folder, tmp_path):
    lost = "bert.encoder.layer.1.output.dense.weight"
    other = rewritten(
        bert_folder[0],
        tmp_path / "other",
        lambda name: (
            None if name == lost else name.replace("layer.0.attention.self.query", "layer.0.attention.self.quary")
        ),
    )
    with pytest.raises(UserError) as error:
        TextTower(config(init=str(other)), vision_width=10)
    for said in (
        "missing 3",
        lost,
        "left over 2",
        "self.quary.weight (nearest: bert.encoder.layer.*.attention.self.query",
    ):
        assert said in error.value.cause


def test_a_bert_of_another_size_is_refused(bert_folder):
    with pytest.raises(UserError) as error:
        TextTower(config(init=str(bert_folder[0]), vocab_size=51, heads=4, layers=1), vision_width=10)
    for said in ("text.vocab_size is 51, there 50", "text.heads is 4, there 2", "text.fusion_layers is 2, there 3"):
        assert said in error.value.cause


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "roberta"}, "a roberta model"),
        ({"hidden_act": "relu"}, "hidden_act is relu, here always gelu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05"),
    ],
)
def test_models_that_compute_something_else_are_refused(bert_folder, change, said):
    path = bert_folder[0] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        TextTower(config(init=str(bert_folder[0])), vision_width=10)


def test_where_there_is_no_bert(tmp_path, bert_folder):
    with pytest.raises(UserError, match=r"holds no BERT: config\.json") as error:
        TextTower(config(init=str(tmp_path)), vision_width=10)
    assert "null" in error.value.cure
    with pytest.raises(UserError, match="There is no folder"):
        TextTower(config(init=str(tmp_path / "none")), vision_width=10)
    (bert_folder[0] / "model.safetensors").write_bytes(b"<html>")
    with pytest.raises(UserError, match="not fetched whole"):
        TextTower(config(init=str(bert_folder[0])), vision_width=10)


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/bert_uncased_L-2_H-128_A-2"])
def test_a_hub_name_without_a_network(name):
    """HF_HUB_OFFLINE is set for all tests."""
    with pytest.raises(UserError, match=f"{name} is no folder here, and the hub does not give it") as error:
        TextTower(config(init=name), vision_width=10)
    assert "hf download" in error.value.cure
    assert "\n" not in error.value.cause


def test_a_hub_name_that_was_fetched_before(bert_folder, tmp_path, monkeypatch):
    """What `hf download` leaves is found by its name, without a network."""
    commit = "0" * 40
    snapshot = tmp_path / "cache" / "models--lab--small-bert" / "snapshots" / commit
    shutil.copytree(bert_folder[0], snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    ours = TextTower(config(init="lab/small-bert"), vision_width=10)
    theirs = bert_folder[1].bert.embeddings.word_embeddings.weight
    assert ours.bert.embeddings.word_embeddings.weight.equal(theirs)


@pytest.mark.parametrize(
    ("name", "layers", "fusion", "count"), [("base", 9, 3, 109_514_298), ("large", 19, 5, 335_174_458)]
)
def test_named_sizes_have_the_published_counts(name, layers, fusion, count):
    """BERT with its word head as published, and a cross-attention in every fusion layer."""
    shape = TextConfig(name=name)
    assert (shape.layers, shape.fusion_layers) == (layers, fusion)
    with torch.device("meta"):
        built = TextTower(shape, vision_width=576)
    D = shape.width
    cross = 2 * (D * D + D) + 2 * (576 * D + D) + 2 * D  # query and output, key and value, norm
    assert sum(value.numel() for value in built.parameters()) == count + fusion * cross
    if name == "base":
        assert cross == 2_068_992
    assert TextConfig(name=name, layers=6, fusion_layers=6).width == D


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_layers_changes_no_gradient(words, dropout):
    ids, attention = words
    vision, gradients, calls = torch.randn(2, 5, 10), [], []
    for again in (False, True):
        built = tower(checkpoint_layers=again, dropout=dropout).train()
        passed = []
        for layer in built.bert.encoder.layer:
            layer.attention.register_forward_hook(lambda *_, passed=passed: passed.append(1))
        torch.manual_seed(3)
        fused = built.fuse(built.encode(ids, attention), attention, vision)
        built.mlm_logits(fused).square().mean().backward()
        gradients.append({name: value.grad for name, value in built.named_parameters()})
        calls.append(len(passed))
    assert calls == [3, 6]
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, msg=name)


@pytest.mark.parametrize("version", ["4.57.1", "6.0.0"])
def test_an_unknown_transformers_is_refused(monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(UserError, match=version):
        text_module._bert_module()


def test_layers_that_take_something_else_are_refused(monkeypatch):
    ensure_torchvision()
    from transformers.models.bert import modeling_bert

    monkeypatch.setattr(modeling_bert.BertLayer, "forward", lambda self, hidden_states, head_mask: hidden_states)
    with pytest.raises(UserError, match="layers take hidden_states, attention_mask, encoder_hidden_states"):
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
