"""What a run needs before its first step: its device, its threads, its tokenizer; and `--check`, which stops there."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from pretrain import distributed
from pretrain.config import PretrainConfig
from pretrain.config_checks import check_world, micro_batch
from pretrain.run_folder import RunFolder
from pretrain.tasks import build_task
from pretrain.tokenizer import train_tokenizer


def pick_device(config: PretrainConfig) -> str:
    """cpu or cuda. Raises UserError if cuda is asked for and not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no GPU here.", "Use device=cpu, or see `videomamba doctor`.")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def check_compiler(config: PretrainConfig, device: str) -> None:
    """Raise UserError where the run compiles kernels and there is nothing here to compile them with.

    torch.compile does so for the encoder's blocks, and for DeepSpeed's Muon; on a CPU with a C++ compiler and Python's
    headers, on a GPU with Triton.
    """
    asked = "compile=true"
    if not config.compile:
        if config.optim.method != "muon" or config.zero_stage == 0:
            return
        asked = f"optim.method=muon with deepspeed={config.deepspeed}"
    if device == "cuda":
        missing, cure = [] if importlib.util.find_spec("triton") else ["Triton"], "Install triton"
    else:
        compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
        headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
        missing = [name for name, there in (("C++ compiler", compiler), ("Python.h", headers)) if not there]
        cure = "Install g++ and python3-dev"
    if missing:
        without = "leave compile out" if config.compile else "use deepspeed=zero0, whose Muon needs none"
        raise UserError(f"{asked} compiles, and there is no {' and no '.join(missing)} here.", f"{cure}, or {without}.")


def set_threads(config: PretrainConfig) -> None:
    """Torch's threads for this rank: as the config or OMP_NUM_THREADS says, else the cores shared by the ranks here."""
    if config.threads is None and "OMP_NUM_THREADS" in os.environ:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // here))


def find_tokenizer(config: PretrainConfig, folder: RunFolder) -> Any:
    """The folder of the run's tokenizer, trained by rank 0 from the corpora's captions where none is given."""
    if config.text is None:
        return None
    if config.tokenizer is not None:
        return Path(config.tokenizer)
    own, vocab_size = folder.path / "tokenizer", config.text.vocab_size

    def make() -> None:
        if not own.is_dir():
            from data_pipeline.shards import Corpus

            captions = (
                config.text_preprocess.clean_caption(caption)
                for corpus in config.data.train
                for meta in Corpus.open(corpus.path, config.data.remote).metas()
                for caption in meta["captions"]
            )
            train_tokenizer(captions, own, vocab_size)

    distributed.on_first(make)
    return own


def describe(config: PretrainConfig, ranks: int) -> list[str]:
    """What the run would train on, built and opened as it would be but not started; UserError where it could not."""
    from data_pipeline.loader import open_order

    check_world(config, ranks)
    check_compiler(config, pick_device(config))
    RunFolder(config).check()
    order = open_order(config.data, config.seed)
    order.batch(0)
    lines = [*_steps(config, ranks), _rates(config)]
    lines += [f"corpus {corpus.name}: {corpus.size} {corpus.kind}s" for corpus in order.corpora]
    if config.text is not None and config.tokenizer is None:
        return [*lines, "the tokenizer will be trained from the captions when the run starts"]
    task = build_task(config, torch.device("cpu"), None if config.tokenizer is None else Path(config.tokenizer))
    lines += [
        f"parameters {group['name']}: {sum(p.numel() for p in group['params']):,} ({group['method']}, "
        f"lr {group['lr']:g}, weight decay {group['weight_decay']:g})"
        for group in task.parameter_groups()
    ]
    return [*lines, "this run can start"]


def _steps(config: PretrainConfig, ranks: int) -> list[str]:
    """How a step's samples are spread over ranks and micro-batches, for each kind of medium."""
    lines = [f"{config.task}, {config.steps:,} steps, {config.precision}, {config.deepspeed}"]
    for kind in sorted({corpus.kind for corpus in config.data.train}):
        batch = config.data.batch_of(kind)
        micro = micro_batch(config, batch // ranks)
        lines.append(f"{batch} {kind}s a step: {ranks} rank(s) x {batch // ranks // micro} micro-batch(es) of {micro}")
    return lines


def _rates(config: PretrainConfig) -> str:
    """The schedule, and what the base rates were multiplied by."""
    optim = config.optim
    line = f"learning rates rise over {optim.warmup_steps:,} steps, fall to {optim.min_lr / optim.lr:.3g} of that"
    if optim.lr_base_batch is None:
        return f"{line}; taken as given (optim.lr_base_batch is null)"
    return f"{line}; times {config.rate_scale:g}, the batch of {config.data.batch} over one of {optim.lr_base_batch}"
