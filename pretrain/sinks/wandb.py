"""Weights & Biases, where a config asks for it; a resumed run goes on in the same wandb run.

The run's id is kept in the run folder (wandb_id), so that it is the same after every kill. wandb wants its own steps
to rise, which those of a run that went back to a checkpoint do not: our step is a value that its charts have as x.
"""

import uuid
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import write_whole
from pretrain.config import PretrainConfig
from pretrain.sinks import Line, flatten

ID = "wandb_id"


class Wandb:
    """Sends lines to wandb, or with `mode: offline` keeps them in the run folder's wandb/ for `wandb sync`."""

    def __init__(self, folder: Path, config: PretrainConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "log.wandb is given, but wandb is not installed.",
                "Run: pip install 'videomamba[wandb]', or set log.wandb=null.",
            ) from error
        asked = config.log.wandb
        assert asked is not None  # asked by the caller
        path = folder / ID
        if not path.is_file():
            write_whole(path, uuid.uuid4().hex[:12].encode())
        self.run: Any = wandb.init(
            project=asked.project,
            entity=asked.entity,
            name=asked.name or folder.name,
            mode=asked.mode,
            id=path.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        self.run.define_metric("*", step_metric="step")

    def advance(self, step: int) -> None:
        """Nothing: a line is sent when there is one."""

    def write(self, line: Line) -> None:
        """One point on every curve."""
        self.run.log(flatten(line) | {"step": line["step"]})

    def close(self) -> None:
        """Send what is left."""
        self.run.finish()
