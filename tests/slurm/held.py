"""The real `videomamba`, held in its first attempt: rank 0 waits at step HOLD until the run is asked to stop.

    HELD_AT=4 [HELD_FAULT=raise] held.py pretrain CONFIG

So a test can do its deed between two known steps, however fast the machine is. With HELD_FAULT=raise the last rank
raises an error there instead, while the others are in a collective. A requeued job runs as if nothing were here.
"""

import os
import time
from typing import Any

from pretrain.stopping import StopRequests
from videomamba.cli import main

HOLD = int(os.environ["HELD_AT"])
FAULT = os.environ.get("HELD_FAULT", "")
rank, ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"])
told = StopRequests.told
looks = 0


def held(self: StopRequests) -> dict[str, Any]:
    global looks
    looks += 1  # the first is before step 0
    if looks == HOLD + 2:
        if FAULT == "raise" and rank == ranks - 1:
            raise RuntimeError("a rank of this test fails here")
        while rank == 0 and FAULT != "raise" and not any(told(self).values()):
            time.sleep(0.05)
    return told(self)


if __name__ == "__main__":  # data workers import this file too
    if not int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        StopRequests.told = held  # type: ignore[method-assign]
    main()
