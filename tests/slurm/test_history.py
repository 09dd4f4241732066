"""What status says of a failure: the rank that failed first, also where srun names several in one line."""

import os

from slurm.history import Attempt, History, first_failure, last_error


def test_ranks_that_srun_ended_are_not_the_cause():
    said = [
        "srun: error: n1: tasks 0,3: Terminated",
        "srun: error: n2: tasks 1-2,5: Exited with exit code 1",
        "srun: error: n1: task 0: Exited with exit code 9",
    ]
    assert first_failure(said) == ([1, 2, 5], "Exited with exit code 1")
    assert first_failure(said[:1]) is None


def test_of_ranks_that_fail_together_the_first_to_fall_silent_is_shown(tmp_path):
    logs = tmp_path / "logs" / "0"
    logs.mkdir(parents=True)
    (logs / "srun.log").write_text("srun: error: n1: tasks 0-1: Exited with exit code 1\n")
    for rank, word, when in ((0, "a peer has gone", 2000.5), (1, "the disk is on fire", 2000.25)):
        log = logs / f"rank{rank}.log"
        log.write_text(f"{word}\n")
        os.utime(log, (when, when))
    history = History([Attempt(0, "7", "n1", 0, 1990)._replace(code=1, reason="failed")], None)
    assert last_error(tmp_path, history) == [
        "last error, in attempt 0: rank 1, Exited with exit code 1",
        "  the disk is on fire",
    ]
