"""The command line: quick to answer, exact about exit codes, and never a traceback for what a user can mend."""

import json
import re
import textwrap

import pytest

from videomamba.cli import COMMANDS

HEAVY = ("torch", "transformers", "open_clip", "deepspeed", "faiss", "av", "pydantic_core", "data_pipeline", "pretrain")
FAULTS = """
    import os, pathlib, signal
    import typer
    from configs.errors import UserError
    app = typer.Typer()

    @app.command()
    def wrong_request():
        raise UserError("The sky\\nis green.", "Look again.")

    @app.command()
    def failed_work():
        raise UserError("The shard is cut.", "Build it again.", exit_code=1)

    @app.command()
    def interrupted():
        signal.raise_signal(signal.SIGINT)

    @app.command()
    def full_disk():
        pathlib.Path("/dev/full").write_text("something")

    @app.command()
    def forbidden():
        raise PermissionError(13, "Permission denied", "/root/secret")

    @app.command()
    def no_package():
        import not_there

    @app.command()
    def bug():
        raise ZeroDivisionError("our own fault")

    @app.command()
    def quiet():
        print(os.environ.get("VIDEOMAMBA_DEBUG"))
"""


@pytest.fixture
def faulty(tmp_path, python):
    """Runs the real command with one more sub-command, `faulty`, whose own sub-commands fail in every way."""
    (tmp_path / "faults.py").write_text(textwrap.dedent(FAULTS))
    start = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from videomamba import cli, lazy\n"
        "cli.COMMANDS['faulty'] = lazy.Entry('faults', 'Fails.')\n"
        "cli.main()\n"
    )
    return lambda *arguments, **options: python("-c", start, *arguments, cwd=tmp_path, **options)


def test_help_imports_nothing_heavy(python):
    done = python(
        "-c",
        "import sys\n"
        "from videomamba.cli import main\n"
        "sys.argv = ['videomamba', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"sys.exit(repr([name for name in {HEAVY!r} if name in sys.modules]))\n",
    )
    assert done.stderr.strip() == "[]"
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", done.stdout)


def test_the_public_names_import_nothing_by_themselves(python):
    done = python("-c", "import sys, videomamba; assert 'torch' not in sys.modules; videomamba.no_such_thing")
    assert "has no attribute 'no_such_thing'; it offers __version__, " in done.stderr


def test_the_public_names_are_there():
    import videomamba

    assert all(callable(getattr(videomamba, name)) for name in videomamba.__all__ if name != "__version__")


def test_create_model_knows_the_published_sizes():
    from videomamba import create_model

    model = create_model("tiny", classes=1000, frames=1)
    assert sum(weight.numel() for weight in model.parameters()) == 7_148_008


def test_create_model_builds_any_size_too():
    from configs.errors import ConfigError
    from videomamba import create_model

    model = create_model(None, depth=2, width=48, frames=4, image_size=32, scan_order=["st_half", "st_full"])
    assert (len(model.layers), model.cls_token.shape[2], model.config.orders) == (2, 48, ("st_half", "st_full"))
    with pytest.raises(ConfigError, match="create_model: the key 'depth' is missing"):
        create_model(None, width=48)
    with pytest.raises(ConfigError, match="name is 'huge'"):
        create_model("huge")


def test_create_model_names_the_nearest_option():
    from configs.errors import ConfigError
    from videomamba import create_model

    with pytest.raises(ConfigError, match=r"unknown key 'frame'.*Did you mean 'frames'"):
        create_model("tiny", frame=4)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, videomamba):
    done = videomamba(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"videomamba {name}" in done.stdout
    assert "Example" in done.stdout or "Commands" in done.stdout


def test_a_wrong_command_names_the_nearest(videomamba):
    done = videomamba("pretrian")
    assert done.returncode == 2
    assert "No such command 'pretrian'" in done.stderr
    assert "'pretrain'" in done.stderr


def test_a_wrong_option_is_a_wrong_request(videomamba):
    done = videomamba("doctor", "--jsn")
    assert done.returncode == 2
    assert "--jsn" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_arguments_show_the_help(videomamba):
    done = videomamba()
    assert "Usage: videomamba" in done.stdout + done.stderr


CAUSE_AND_CURE = {
    "wrong-request": (2, "error: The sky is green.", "Look again."),
    "failed-work": (1, "error: The shard is cut.", "Build it again."),
    "interrupted": (130, "Interrupted.", "What was finished is kept; the same command goes on from there."),
    "full-disk": (1, "error: The disk is full.", "Free some space and run the same command again."),
    "forbidden": (2, "error: /root/secret cannot be opened: Permission denied.", "Give a path you may use."),
    "no-package": (1, "error: The Python package 'not_there' is missing.", "Install again: `make install`."),
}


@pytest.mark.parametrize("fault", CAUSE_AND_CURE)
def test_what_a_user_can_mend_is_a_cause_and_a_cure(faulty, fault):
    exit_code, cause, cure = CAUSE_AND_CURE[fault]
    done = faulty("faulty", fault)
    assert (done.returncode, done.stderr.splitlines()) == (exit_code, [cause, f"  cure: {cure}"])


@pytest.mark.parametrize("arguments", [("--debug", "faulty", "full-disk"), ("faulty", "full-disk", "--debug")])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(faulty, arguments):
    done = faulty(*arguments)
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.splitlines()[-2] == "error: The disk is full."


def test_debug_reaches_the_processes_that_a_command_starts(faulty):
    assert faulty("faulty", "quiet", "--debug").stdout == "1\n"
    assert faulty("faulty", "quiet").stdout == "None\n"


def test_our_own_fault_keeps_its_traceback(faulty):
    done = faulty("faulty", "bug")
    assert done.returncode == 1
    assert "ZeroDivisionError: our own fault" in done.stderr


def test_a_compiled_writers_full_disk_is_recognised():
    from videomamba.errors import explain

    error = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert explain(error).exit_code == 1
    assert explain(RuntimeError("something else")) is None


def test_an_optional_package_is_named_with_its_extra():
    from videomamba.errors import explain

    error = ModuleNotFoundError("No module named 'onnx'", name="onnx.helper")
    assert explain(error).cure == "Install it with: pip install 'videomamba[onnx]'."


def test_other_ranks_speak_up_for_warnings_only(python):
    code = (
        "import logging\nfrom videomamba import logs\nlogs.setup()\n"
        "logging.getLogger('pretrain.trainer').info('step 1')\nlogging.getLogger('pretrain').warning('slow')\n"
    )
    first, other = python("-c", code, RANK="0").stderr, python("-c", code, RANK="3").stderr
    assert "rank 0 INFO step 1" in first
    assert "step 1" not in other
    assert "rank 3 WARNING slow" in other


def test_bench_measures_and_writes_json(videomamba, tmp_path):
    result = tmp_path / "scan.json"
    done = videomamba("bench", "scan", "--quick", "--json", str(result))
    assert done.returncode == 0, done.stderr
    told = json.loads(result.read_text())
    assert told.keys() == {"bench", "device", "versions", "command", "rows"}
    kinds = ("train", "bf16", "forward", "train-unbound", "train-chunked", "train-doubling", "both", "conv", "memory")
    assert [row["name"] for row in told["rows"]] == [f"{kind}/2x257x128" for kind in kinds]
    assert {row["baseline_name"] for row in told["rows"][:3]} == {"eager"}
    for row in told["rows"]:
        assert row["ratio"] == pytest.approx(row["baseline"] / row["ours"], rel=0.05)


def test_a_bench_names_a_shape_that_is_none(videomamba):
    done = videomamba("bench", "scan", "--shape", "8x257")
    assert (done.returncode, done.stderr.split("\n")[0]) == (2, "error: '8x257' is no shape.")


def test_an_unknown_bench_names_the_nearest(videomamba):
    done = videomamba("bench", "scna")
    assert done.returncode == 2
    assert "No such command 'scna'" in done.stderr
    assert "'scan'" in done.stderr
