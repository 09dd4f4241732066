"""The folder of a run: whose it is, whether it is finished, and that only one process trains in it. No torch here.

config.yaml    the resolved config; a run of another config is refused
done.json      written last, when every step was taken
.lock          held by rank 0 while it trains; the system lets go of it when the process dies
stop           put there by somebody who wants the run to save and leave (stopping.py)
log.jsonl, lost.csv, tensorboard/, checkpoints/, tokenizer/
"""

import json
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from configs.errors import UserError
from configs.files import lock_folder, write_whole
from configs.loader import digest, read_tree, to_yaml
from pretrain.config import PretrainConfig

OURS = (
    "config.yaml",
    "done.json",
    "log.jsonl",
    "lost.csv",
    "tensorboard",
    "wandb",
    "wandb_id",
    "checkpoints",
    "tokenizer",
    "stop",
)

FREE = (
    "out", "device", "threads", "micro_batch", "deepspeed", "nonfinite", "max_skips", "log", "checkpoint",
    "evaluate",
    "data.workers", "data.prefetch", "data.max_bad_fraction", "data.decode_timeout",
    "data.remote",
)  # fmt: skip
"""Keys that may differ when a run goes on: they change where, how fast and how patiently, but not what is computed."""


def identity(config: PretrainConfig) -> dict[str, Any]:
    """What makes a run this run: its config without the FREE keys, as one flat mapping of dotted keys."""
    flat = _flat(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if not _is_free(key)}


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def run_digest(config: PretrainConfig) -> str:
    """16 hex digits of `identity`."""
    return digest(identity(config))


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict) and tree:
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(value, (dict, list)) for value in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


class RunFolder:
    """The folder `config.out`; as a context it lets go of the lock at the end, whatever happened."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config, self.path = config, Path(config.out)
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def done(self) -> dict[str, Any] | None:
        """done.json of a finished run, or None."""
        marker = self.path / "done.json"
        return dict(json.loads(marker.read_text())) if marker.is_file() else None

    def check(self) -> None:
        """Raise UserError if the folder holds a run of another config; the first few keys that differ are named."""
        stored = self.path / "config.yaml"
        if not stored.is_file():
            return
        theirs = {key: value for key, value in _flat(read_tree(stored)).items() if not _is_free(key)}
        ours = identity(self.config)
        differ = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
        if differ:
            said = "; ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in differ[:3])
            more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise UserError(
                f"{self.path} holds a run of another config ({said}{more}).",
                "Give another out=, or --fresh to remove that run and begin again.",
            )

    def clear(self) -> None:
        """Remove what a run wrote here, and nothing else; UserError if another process trains in it."""
        if not self.path.is_dir():
            return
        self.lock()
        for name in OURS:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.release()

    def lock(self) -> None:
        """Be the only process that trains in this folder, until `release` or death; UserError if there is another."""
        self._lock = lock_folder(self.path)
        if self._lock is None:
            raise UserError(
                f"Another process is training in {self.path}.",
                "Wait for it, stop it, or give another out=.",
                exit_code=1,  # the request was right: later it may go, so a job that meets this is started again
            )

    def release(self) -> None:
        """Let another process train in this folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def claim(self) -> None:
        """Lock the folder and write config.yaml into it."""
        self.lock()
        write_whole(self.path / "config.yaml", to_yaml(self.config).encode())

    def finish(self, record: dict[str, Any]) -> None:
        """Write done.json: every step was taken and saved."""
        write_whole(self.path / "done.json", json.dumps(record, indent=2).encode())
