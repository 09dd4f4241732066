"""A stand-in for a training run, light enough for tests of the script around it.

    stand_in.py RUN STEPS [--fault WHAT]

It keeps the contract: `checkpoints/latest` is what it goes on from, a stop-file makes it save and leave with 0 and
the unfinished file, done.json is written last. A step takes a tenth of a second.
"""

import argparse
import os
import signal
import time
from pathlib import Path

options = argparse.ArgumentParser()
options.add_argument("run", type=Path)
options.add_argument("steps", type=int)
options.add_argument("--fault", default="")
asked = options.parse_args()

rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
latest = asked.run / "checkpoints" / "latest"
step = int(latest.read_text().split("-")[1]) if latest.exists() else 0
print(f"rank {rank} of {ranks} from step {step}, meeting at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}")

if asked.fault == "deaf":  # neither the stop-file nor TERM is heard
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if asked.fault == "crash" and rank == ranks - 1:
    raise SystemExit(f"rank {rank} cannot go on: the disk is on fire")
if asked.fault == "refuse":
    raise SystemExit(2)


def save(name: str) -> None:
    part = latest.with_name(".latest")
    latest.parent.mkdir(exist_ok=True)
    part.write_text(name)
    part.rename(latest)


stopped = False
while step < asked.steps and not stopped:
    time.sleep(0.1)
    step += 1
    stopped = Path(os.environ["VIDEOMAMBA_STOP_FILE"]).exists()
if rank == 0:
    save(f"step-{step:07d}")
    if step < asked.steps:
        Path(os.environ["VIDEOMAMBA_UNFINISHED_FILE"]).touch()
    else:
        (asked.run / "done.json").write_text("{}")
