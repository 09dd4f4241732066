"""What a run's config asks of its surroundings: a number of ranks that fits, and the files that it names. No torch."""

from pathlib import Path

from configs.errors import ConfigError
from data_pipeline.remote import is_address
from pretrain.config import PretrainConfig


def micro_batch(config: PretrainConfig, share: int) -> int:
    """How many of a rank's `share` samples of a step it takes at once: as many as it may that divide them."""
    limit = min(config.micro_batch or share, share)
    return max(n for n in range(1, limit + 1) if share % n == 0)


def check_world(config: PretrainConfig, ranks: int) -> None:
    """Raise ConfigError unless the global batch divides among `ranks` ranks, and leaves each of them negatives."""
    kinds = {corpus.kind for corpus in config.data.train}
    for kind in sorted(kinds):
        key = "data.image_batch" if kind == "image" and config.data.image_batch is not None else "data.batch"
        batch = config.data.batch_of(kind)
        if batch % ranks:
            nearest = max(ranks, round(batch / ranks) * ranks)
            divisor = max(n for n in range(1, ranks + 1) if batch % n == 0)
            raise ConfigError(
                f"{key}: {batch} samples do not divide by {ranks} ranks.",
                f"Use {nearest}, or {divisor} rank{'s' if divisor > 1 else ''}.",
            )
        matching = config.losses.matching
        if config.task == "stage2" and matching.weight and matching.negatives == "local":
            _check_negatives(config, key, kind, micro_batch(config, batch // ranks), batch)


def _check_negatives(config: PretrainConfig, key: str, kind: str, micro: int, batch: int) -> None:
    """That the `micro` samples of a `batch` that a rank has in memory together are more than one."""
    if micro == 1:
        cure = f"Use a batch of {2 * batch} or more" if config.micro_batch is None else "Use micro_batch=2 or more"
        raise ConfigError(
            f"{key}: a rank takes {micro} {kind} at once, but losses.matching needs a negative beside it.",
            f"{cure}, losses.matching.negatives=global, or losses.matching.weight=0.",
        )


def check_inputs(config: PretrainConfig) -> None:
    """Raise ConfigError if a corpus, tokenizer, checkpoint or teacher that the config names is not there."""
    _check_corpora(config)
    if config.tokenizer is not None and not Path(config.tokenizer).is_dir():
        raise ConfigError(
            f"There is no tokenizer folder {config.tokenizer}.", "Mend the path, or leave `tokenizer` out to train one."
        )
    bert = config.text.init if config.text is not None else None
    if bert is not None and bert.startswith((".", "/", "~")) and not Path(bert).is_dir():
        raise ConfigError(f"There is no folder {bert} (text.init).", "Mend the path, or give null for random weights.")
    if config.init is not None and not Path(config.init).exists():
        raise ConfigError(
            f"There is no checkpoint {config.init} to start from.", "Run the earlier stage, or mend init."
        )
    if config.teacher is not None and config.teacher.weights is None:
        source = config.teacher.source
        if ("/" in source or source.startswith(".")) and ":" not in source and not Path(source).is_dir():
            raise ConfigError(
                f"There is no teacher folder {source}.", "Train one with `videomamba teacher`, or mend teacher.source."
            )


def _check_corpora(config: PretrainConfig) -> None:
    """All folders of shards that are missing, in one sentence."""
    missing = [
        (place, corpus.path)
        for place, corpus in enumerate(config.data.train)
        if not is_address(corpus.path) and not Path(corpus.path).is_dir()
    ]
    if not missing:
        return
    paths = [path for _, path in missing]
    seen = f"There is no folder of shards {paths[0]}" if len(paths) == 1 else f"There are no shards in {_listed(paths)}"
    keys = " ".join(f"data.train.{place}.path=FOLDER" for place, _ in missing)
    raise ConfigError(
        f"{seen}.", f"Build {'it' if len(paths) == 1 else 'each'} with `videomamba data build`, or mend: {keys}."
    )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"
