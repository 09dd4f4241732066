"""How long a run is: samples or epochs, of the run and of its warm-up, as steps."""

from typing import Any

from configs.errors import ConfigError
from configs.loader import validate
from pretrain.config import PretrainConfig


def resolve_length(config: PretrainConfig) -> PretrainConfig:
    """The same run with its length and its warm-up in steps; corpora are opened only where epochs are asked for.

    An epoch is as many whole batches as every corpus has, times the corpus's own `epochs`. Raises ConfigError where
    samples are no unit, since clips and images come in batches of two sizes.
    """
    optim, batch = config.optim, config.data.batch
    if config.steps and not optim.warmup_samples and not optim.warmup_epochs:
        return config
    if config.samples or optim.warmup_samples:
        _check_one_size(config)
    epoch = steps_per_epoch(config) if config.epochs or optim.warmup_epochs else 0.0
    steps, warmup = config.steps, optim.warmup_steps
    if config.samples:
        steps = config.samples // batch
    elif config.epochs:
        steps = round(config.epochs * epoch)
    if optim.warmup_samples:
        warmup = round(optim.warmup_samples / batch)
    elif optim.warmup_epochs:
        warmup = round(optim.warmup_epochs * epoch)
    if not steps:
        raise ConfigError(
            f"samples is {config.samples} and epochs {config.epochs}, less than one batch of {batch}.",
            "Ask for more, or use a smaller data.batch.",
        )
    return _with_steps(config, steps, warmup)


def steps_per_epoch(config: PretrainConfig) -> float:
    """Steps in which every corpus comes round as often as its `epochs` says."""
    from data_pipeline.loader import open_order

    order = open_order(config.data, config.seed)
    return sum(order.steps_per_epoch(place) * corpus.epochs for place, corpus in enumerate(order.corpora))


def _check_one_size(config: PretrainConfig) -> None:
    sizes = {config.data.batch_of(corpus.kind) for corpus in config.data.train}
    if len(sizes) > 1:
        raise ConfigError(
            f"samples and optim.warmup_samples count batches of one size, and here are {sorted(sizes)}.",
            "Give steps or epochs (warmup_steps or warmup_epochs), or leave data.image_batch out.",
        )


def _with_steps(config: PretrainConfig, steps: int, warmup: int) -> PretrainConfig:
    tree: dict[str, Any] = config.model_dump(mode="json")
    tree |= {"steps": steps, "samples": None, "epochs": None}
    tree["optim"] |= {"warmup_steps": warmup, "warmup_samples": None, "warmup_epochs": None}
    return validate(tree, PretrainConfig, "the run")
