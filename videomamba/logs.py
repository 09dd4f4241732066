"""The one place where logging is set up: short coloured lines on a terminal, plain dated ones elsewhere."""

import logging
import os
import sys

OURS = ("configs", "data_pipeline", "pretrain", "retrieval_eval", "slurm", "videomamba")


def setup(verbose: bool = False) -> None:
    """Send our packages' messages to stderr, those of other ranks than 0 and of libraries from WARNING upwards."""
    rank = int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
    root = logging.getLogger()
    root.handlers[:] = [_handler(rank)]
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING
    for name in OURS:
        logging.getLogger(name).setLevel(level)


def _handler(rank: int) -> logging.Handler:
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S", markup=False)
    handler = logging.StreamHandler()
    who = f"rank {rank} " if "RANK" in os.environ else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s {who}%(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler
