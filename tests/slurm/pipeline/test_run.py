"""`videomamba run`: steps in order, each once; faults said beforehand; stopped or killed, the same command goes on."""

import os
import re
import signal
from pathlib import Path

import pytest

from tests.slurm.pipeline.conftest import wait_for


def test_steps_run_in_order_once_and_go_on_after_a_failure(runs):
    file = runs.write(
        {
            "first": {"command": "probe {folder}/order --say one"},
            "second": {"command": "probe {folder}/order --say two --reads {folder}/input"},
            "third": {"command": "probe {folder}/order --say three"},
        }
    )
    said = runs(file, code=1)
    assert "No such file or directory" in said
    assert "error: The step 'second' failed with exit code 1." in said
    assert [row.split("│")[1:3] for row in said.splitlines() if row.startswith("│")] == [
        [" first  ", " done        "], [" second ", " failed      "], [" third  ", " not started "]
    ]  # fmt: skip
    status = runs(runs.folder / "run", command="status")
    assert re.findall(r"│ (\w+) +│ ([\w ()]*\w\)?)", status) == [
        ("first", "done here"), ("second", "failed here (exit code 1)"), ("third", "not run")
    ]  # fmt: skip
    (runs.folder / "run" / "input").write_text("now")
    again = runs(file)
    assert "first: finished before" in again
    assert runs.lines("order") == ["one", "two", "two", "three"]
    assert (runs.folder / "run" / "logs" / "second.log").read_text().count("$ videomamba probe") == 2
    assert runs(file).count("finished before") == 3
    assert runs.lines("order") == ["one", "two", "two", "three"]


def test_the_exit_code_and_the_last_lines_are_those_of_the_step(runs):
    file = runs.write({"only": {"command": ["probe {folder}/a --say kept", "probe {folder}/b --say gone --code 37"]}})
    said = runs(file, code=37)
    assert said.rstrip().splitlines()[-4:-2] == [
        f"$ videomamba probe {runs.folder}/run/b --say gone --code 37",
        "gone",
    ]
    assert runs.record("only")["exit_code"] == 37


def test_parts_run_one_by_one_or_several_at_once(runs):
    # Every part waits for what the next one says, so that they end only if all of them run at once.
    steps = {
        "parts_of_it": {
            "command": "probe {folder}/part-{part} --say {part}/{parts} --wait {folder}/go",
            "array": 3,
        },
        "merge": {"command": "probe {folder}/merged --say all"},
    }
    process = runs.start(runs.write(steps), "--jobs", "3")
    wait_for(lambda: all(runs.lines(f"part-{part}") for part in (1, 2, 3)), "three parts at once")
    assert runs.lines("merged") == []
    (runs.folder / "run" / "go").touch()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert "parts_of_it-2-of-3: 2/3" in said
    assert runs.lines("merged") == ["all"]


def test_a_part_that_failed_is_the_only_one_that_runs_again(runs):
    file = runs.write(
        {
            "pieces": {
                "command": "probe {folder}/order --say {part} --reads {folder}/input-{part}",
                "array": 3,
            }
        }
    )
    (runs.folder / "run").mkdir()
    for part in (1, 3):
        (runs.folder / "run" / f"input-{part}").touch()
    assert "'pieces-2-of-3' failed" in runs(file, code=1)
    (runs.folder / "run" / "input-2").touch()
    runs(file)
    assert runs.lines("order") == ["1", "2", "2", "3"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_stop_is_passed_on_and_the_same_command_goes_on(runs, number, code):
    file = runs.write(
        {
            "long": {"command": "probe {folder}/long --say begun --wait {folder}/go"},
            "after": {"command": "probe {folder}/after --say ran"},
        }
    )
    process = runs.start(file)
    wait_for(lambda: runs.lines("long"), "the step")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert "Traceback" not in said
    assert runs.record("long")["state"] == ("stopped" if number == signal.SIGINT else "unfinished")
    assert runs.lines("after") == []
    (runs.folder / "run" / "go").touch()
    runs(file)
    assert runs.lines("long") == ["begun", "begun"]
    assert runs.lines("after") == ["ran"]


def test_a_step_that_left_with_0_before_its_work_was_done_is_not_done(runs):
    file = runs.write(
        {
            "early": {"command": "probe {folder}/early --early"},
            "after": {"command": "probe {folder}/after --say ran"},
        }
    )
    assert "'early' was asked to stop and left before its work was done" in runs(file, code=1)
    assert runs.record("early")["exit_code"] == 0
    assert runs.lines("after") == []


def test_a_runner_that_is_killed_takes_its_step_along_and_leaves_no_lock(runs):
    file = runs.write({"long": {"command": "probe {folder}/long --wait {folder}/go"}})
    process = runs.start(file)
    ran = runs.folder / "run" / "long"
    wait_for(lambda: ran.exists() and ran.read_text(), "the step")
    step = int(ran.read_text().split()[0])
    other = runs(file, code=2)
    assert "Another `videomamba run` or `submit` is at work in" in other
    process.kill()
    process.communicate(timeout=60)
    wait_for(lambda: not _alive(step), "the end of the step")
    (runs.folder / "run" / "go").touch()
    runs(file)


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_step_that_the_system_kills_has_failed(runs):
    file = runs.write({"long": {"command": "probe {folder}/long --wait {folder}/go", "title": "[a]"}})
    process = runs.start(file)
    ran = runs.folder / "run" / "long"
    wait_for(lambda: ran.exists() and ran.read_text(), "the step")
    os.kill(int(ran.read_text().split()[0]), signal.SIGKILL)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 137
    assert "The step 'long' failed with exit code 137 (ended by SIGKILL)." in said
    assert "1/1 [a]" in said


def test_a_changed_step_runs_again_and_so_does_what_needs_it(runs):
    file = runs.write(
        {
            "first": {"command": "probe {folder}/order --say {word}"},
            "second": {"command": "probe {folder}/order --say then"},
            "aside": {"command": "probe {folder}/order --say aside", "needs": []},
        },
        variables={"word": "one"},
    )
    runs(file)
    runs(file, "word=two")
    assert runs.lines("order") == ["one", "then", "aside", "two", "then"]
    assert "word: two" in (runs.folder / "run" / "pipeline.yaml").read_text()
    assert runs(runs.folder / "run" / "pipeline.yaml").count("finished before") == 3


def test_ranks_are_started_here(runs):
    file = runs.write({"train": {"command": "pretrain demo/stage1 out={out}", "ranks": 2, "inputs": ["{out}/nothing"]}})
    assert "reads" in runs(file, code=2)
    file = runs.write({"train": {"command": "pretrain demo/stage1 out={out} data.train.0.path=.", "ranks": 3}})
    assert "data.batch: 64 samples do not divide by 3 ranks" in runs(file, code=2)


WRONG = [
    ({"a": {"command": "prbe x"}}, "`videomamba prbe x` is no request: No such command 'prbe'. Did you mean 'probe'?"),
    ({"a": {"command": "probe x --sai y"}}, "No such option: --sai (Possible options: --say"),
    ({"a": {"command": "probe"}}, "is no request: Missing argument"),
    ({"a": {"command": "data buidl x"}}, "No such command 'buidl'. Did you mean 'build'?"),
    ({"a": {"command": "--version"}}, "is no request: It does not begin with a command"),
    ({"a": {"command": "pretrain demo/stage1 optim.l=1"}}, "steps.a: demo/stage1: unknown key 'optim.l'"),
    (500, "is no pipeline: it has no `steps` that are named"),
    ({"a": {"command": "eval demo/retrievl"}}, "steps.a: There is no config 'demo/retrievl'."),
    ({"a": {"command": "probe x", "inputs": ["/not/there"]}}, "The step 'a' reads /not/there, which is not there."),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "says"), WRONG, ids=[str(number) for number in range(len(WRONG))])
def test_what_is_wrong_is_said_before_anything_runs(runs, steps, says):
    said = runs(runs.write(steps), code=2)
    assert says in said.replace("\n", " ")
    assert not (runs.folder / "run").exists()


def test_dry_run_shows_and_starts_nothing(runs):
    said = runs(runs.write({"a": {"command": "probe x --say {what}"}}, variables={"what": "two words"}), "--dry-run")
    assert "videomamba probe x --say 'two words'" in said
    assert not (runs.folder / "run").exists()


def test_check_asks_every_step_that_has_its_inputs(runs):
    (runs.folder / "input").write_text("spring water")
    file = runs.write(
        {
            "ready": {"command": "probe {out} --reads input"},
            "later": {"command": "probe {out} --reads {ready}/nothing"},
        }
    )
    said = runs(file, "--check")
    assert "would read input: spring water" in said
    assert "its inputs come from ready" in said
    (runs.folder / "input").unlink()
    assert "error: steps.ready: " in runs(file, "--check", code=1)
    assert not (runs.folder / "run").exists()


def test_some_steps_only(runs):
    file = runs.write({name: {"command": f"probe {{folder}}/order --say {name}"} for name in ("a", "b", "c")})
    runs(file, "--until", "a")
    runs(file, "--from", "b", "--until", "b")
    assert runs.lines("order") == ["a", "b"]
    assert "--only stands alone" in runs(file, "--from", "a", "--only", "b", code=2)
