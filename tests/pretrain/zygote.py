"""Runs of training as forks of one process that has imported everything: a life begins in no time, and may be killed.

    python -P tests/pretrain/zygote.py

reads a JSON object a line: `config` (a YAML file), `ranks`, `keys` (a folder: each rank notes there what it is fed),
perhaps `full` (a rank whose files may not grow beyond 50 kB), and perhaps when to `kill -9` all ranks: as soon as the
path `when` exists, or `after` so many seconds, counted from when rank 0 was `fed` so many batches in this life.
It answers with the ranks' exit codes (-9: killed) and what they said, in a line of JSON.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path


def rank(number: int, ranks: int, port: int, order: dict) -> int:
    """One rank of one life; its exit code."""
    from configs.errors import UserError
    from configs.loader import load_config
    from pretrain import trainer
    from pretrain.config import PretrainConfig
    from pretrain.launch import World, rank_environment

    os.environ.update(rank_environment(World(number, number, ranks), "127.0.0.1", port))
    if order.get("full") == number:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    notes = Path(order["keys"]) / f"{number}.jsonl"

    class Noted(trainer.TrainLoader):
        def __iter__(self):
            for batch in super().__iter__():
                with notes.open("a") as file:
                    file.write(json.dumps([ranks, batch.step, batch.keys]) + "\n")
                yield batch

    trainer.TrainLoader = Noted
    try:
        return trainer.train(load_config(order["config"], PretrainConfig, []))
    except UserError as error:
        print(f"error: {error.cause}", file=sys.stderr)
        return error.exit_code
    except Exception:  # noqa: BLE001 - said, and told by the exit code
        traceback.print_exc()
        return 70


def live(order: dict) -> dict:
    """One life: fork the ranks, kill them when they are to be killed, and wait for their end."""
    from pretrain.launch import free_port

    ranks, port = order.get("ranks", 1), free_port()
    with tempfile.TemporaryFile() as said:
        children = []
        for number in range(ranks):
            child = os.fork()
            if child == 0:
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                code = rank(number, ranks, port, order)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            children.append(child)
        codes = wait(children, order)
        said.seek(0)
        return {"codes": codes, "said": said.read().decode(errors="replace")[-4000:]}


def wait(children: list[int], order: dict) -> list[int]:
    """The children's exit codes; where one fails, or their time has come, the rest is killed."""
    codes, fed = {}, None
    notes = Path(order["keys"]) / "0.jsonl"
    before = lines(notes)
    while len(codes) < len(children):
        for child in set(children) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
        if fed is None and lines(notes) - before >= order.get("fed", 0):
            fed = time.monotonic()
        came = "after" in order and fed is not None and time.monotonic() - fed > order["after"]
        if came or ("when" in order and Path(order["when"]).exists()) or any(codes.values()):
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[child] for child in children]


def lines(path: Path) -> int:
    """How many whole lines a file has."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    """Import what a run needs, which prints this and that, then serve."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import deepspeed  # noqa: F401

    import pretrain.trainer
    from data_pipeline.torchvision_shim import ensure_torchvision

    ensure_torchvision()
    import open_clip  # noqa: F401
    from tokenizers import Tokenizer  # noqa: F401

    assert pretrain.trainer
    for line in sys.stdin:
        print(json.dumps(live(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
