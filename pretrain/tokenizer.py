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

START = "\u2581"


def train_tokenizer(captions: Iterable[str], folder: Path, vocab_size: int = 30522) -> Path:
    """Train a lower-casing WordPiece of at most `vocab_size` pieces on `captions` and write it as `folder`.

    The same captions give the same vocabulary, in every process (WordPieceTrainer's own depends on the order of
    a hash map). Raises UserError if there is no caption, or more characters than `vocab_size` has room for.
    """
    texts = [text for text in captions if text.strip()]
    if not texts:
        raise UserError(
            "There is no caption to train a tokenizer on.", "Build shards that have captions, or give `tokenizer`."
        )
    vocabulary = _pieces(texts, vocab_size)
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    tokenizer = _read_as_bert_does(Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]")))
    return save_tokenizer(tokenizer, folder)


def _pieces(texts: list[str], vocab_size: int) -> list[str]:
    """Special tokens, every character at a word's start and within, then merges by byte-pair encoding.

    START marks where a word begins while merging; what carries it becomes a piece that begins a word, and
    everything else a piece that goes on one, with `##`.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    characters = sorted(
        set(string.ascii_lowercase + string.digits).union(*(normalizer.normalize_str(t) for t in texts)) - {" "}
    )
    room = vocab_size - len(SPECIAL) - len(characters)
    if room < len(characters):
        raise UserError(
            f"The captions use {len(characters)} characters, which a vocabulary of {vocab_size} has no room for.",
            f"Use text.vocab_size={len(SPECIAL) + 4 * len(characters)} or more.",
        )
    merger = Tokenizer(models.BPE())
    merger.normalizer = normalizer
    merger.pre_tokenizer = pre_tokenizers.Sequence([splitter, pre_tokenizers.Metaspace(START, "always", split=False)])
    merger.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=room, initial_alphabet=[START, *characters], min_frequency=1, show_progress=False
        ),
    )
    learned = sorted(merger.get_vocab().items(), key=lambda item: item[1])
    merged = [word[1:] if word.startswith(START) else f"##{word}" for word, _ in learned if word != START]
    return list(dict.fromkeys([*SPECIAL, *characters, *(f"##{c}" for c in characters), *merged]))


def _read_as_bert_does(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    if cls is not None and sep is not None:
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
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
    """The tokenizer of a folder (`tokenizer.json`, or BERT's `vocab.txt` alone), or of a vocab.txt by its own path.

    Raises UserError if neither is there, or a special token of BERT's is not in it.
    """
    folder = Path(folder)
    if folder.is_file():
        tokenizer = _from_vocabulary(folder)
    elif (folder / "tokenizer.json").is_file():
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
    return _read_as_bert_does(Tokenizer(models.WordPiece(vocab=ids, unk_token="[UNK]")))


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
