from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from pretrain.tokenizer import SPECIAL, load_tokenizer, tokenize, train_tokenizer

CAPTIONS = ["A red disc moves left", "a blue square spins", "two red squares, growing", "a disc is still"] * 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer") / "made", vocab_size=160)


def test_special_tokens_come_first(folder):
    tokenizer = load_tokenizer(folder)
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2, 3, 4]
    assert tokenizer.get_vocab_size() <= 160
    assert (folder / "vocab.txt").read_text().splitlines()[:5] == list(SPECIAL)


def test_rows_are_padded_cut_and_masked(folder):
    tokenizer = load_tokenizer(folder)
    ids_BL, mask_BL = tokenize(tokenizer, ["a red disc", "a blue square spins", "x " * 50], max_tokens=14)
    assert ids_BL.shape == mask_BL.shape == (3, 14)
    assert ids_BL.dtype == torch.int64
    assert (ids_BL[:, 0] == 2).all()
    assert ids_BL[2, -1] == 3  # cut, and still ended
    assert mask_BL.sum(1).tolist() == [5, 6, 14]
    assert torch.equal(ids_BL == 0, mask_BL == 0)
    short_BL, _ = tokenize(tokenizer, ["a red disc"], max_tokens=14)
    assert short_BL.shape == (1, 8)  # the longest, rounded up to a multiple of 4
    assert tokenize(tokenizer, ["a red disc"], max_tokens=14, length=12)[0].shape == (1, 12)


def test_equals_what_transformers_reads_from_the_folder(folder):
    from data_pipeline.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    captions = ["A Red disc, moving LEFT", "zebra", "two squares"]
    ids_BL, mask_BL = tokenize(load_tokenizer(folder), captions, max_tokens=16)
    expected = theirs(captions, padding="max_length", max_length=ids_BL.shape[1], truncation=True, return_tensors="pt")
    assert torch.equal(ids_BL, expected["input_ids"])
    assert torch.equal(mask_BL, expected["attention_mask"])
    assert theirs.mask_token_id == 4


def test_bert_vocabulary_alone_is_enough(folder, tmp_path):
    (tmp_path / "vocab.txt").write_text((folder / "vocab.txt").read_text())
    a, _ = tokenize(load_tokenizer(folder), CAPTIONS, 16)
    b, _ = tokenize(load_tokenizer(tmp_path), CAPTIONS, 16)
    assert torch.equal(a, b)


def test_training_is_repeatable(folder, tmp_path):
    again = train_tokenizer(CAPTIONS, tmp_path / "again", vocab_size=160)
    assert (again / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no caption"):
        train_tokenizer(["", "  "], tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n")
    with pytest.raises(UserError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(tmp_path)
