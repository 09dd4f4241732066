"""Words to numbers: a WordPiece vocabulary trained from captions, or a folder that holds one.

The folder is what `transformers.AutoTokenizer.from_pretrained` reads (`tokenizer.json`, `tokenizer_config.json`)
with `vocab.txt` beside it. Here the `tokenizers` library reads it alone, which starts in milliseconds.

Letters: B captions, L tokens.
"""

import json
import logging
import os
import shutil
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

from configs.errors import UserError

log = logging.getLogger(__name__)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The special tokens, in the order of their ids in a vocabulary trained here."""

CLS, SEP = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")


def train_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int = 30522) -> Path:
    """Train a lower-casing WordPiece of at most `vocab_size` pieces on `captions` and write it as `folder`.

    The same captions in the same order give the same vocabulary. Raises UserError if there is no caption.
    """
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=list(string.ascii_lowercase + string.digits),
        min_frequency=1,
        show_progress=False,
    )
    tokenizer = _read_as_bert_does(Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100)))
    texts = list(captions)
    if not any(text.strip() for text in texts):
        raise UserError(
            "There is no caption to train a tokenizer on.", "Build shards that have captions, or give `tokenizer`."
        )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    return save_tokenizer(tokenizer, folder)


def _read_as_bert_does(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write `tokenizer` as a folder that transformers loads as a BertTokenizer; whole or not at all."""
    aside = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tokenizer.save(str(aside / "tokenizer.json"))
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    (aside / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in vocabulary), encoding="utf-8")
    named = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL}
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **named}
    (aside / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return folder


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a folder: `tokenizer.json`, or BERT's `vocab.txt` alone. UserError if neither is there."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").is_file():
        tokenizer = _from_vocabulary(folder / "vocab.txt")
    else:
        raise UserError(
            f"{folder} holds no tokenizer (no tokenizer.json, no vocab.txt).",
            "Give a tokenizer's folder, or train one.",
        )
    missing = [token for token in SPECIAL if tokenizer.token_to_id(token) is None]
    if missing:
        raise UserError(f"The tokenizer {folder} lacks {', '.join(missing)}.", "Give one with BERT's special tokens.")
    tokenizer.no_padding()
    return tokenizer


def _from_vocabulary(path: Path) -> Tokenizer:
    words = path.read_text(encoding="utf-8").splitlines()
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = _read_as_bert_does(Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]")))
    if "[CLS]" in ids and "[SEP]" in ids:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return tokenizer


def tokenize(
    tokenizer: Tokenizer, captions: Sequence[str], max_tokens: int, multiple: int = 4, length: int | None = None
) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) int64 and their mask (B, L) int64, 1 on tokens and 0 on padding.

    Captions are cut at `max_tokens`, [CLS] and [SEP] included. L is the longest caption's length rounded up to
    `multiple` (and at most `max_tokens`), or `length` where that is given.
    """
    tokenizer.enable_truncation(max_tokens)
    rows = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(captions))]
    longest = max(len(row) for row in rows)
    width = length or min(max_tokens, -(-longest // multiple) * multiple)
    pad = tokenizer.token_to_id("[PAD]")
    ids_BL = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.int64)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BL, (torch.arange(width)[None, :] < lengths_B[:, None]).long()
