"""The `videomamba` command: names and one-line helps here, everything else imported when it is called."""

import os
import sys
from typing import Annotated

import typer

from videomamba import __version__
from videomamba.errors import end_rank
from videomamba.joined import Joined
from videomamba.lazy import Entry, LazyGroup

COMMANDS = {
    "demo": Entry("videomamba.demo.cli", "Everything once, small and real: from clips to encoders and a page.", "demo"),
    "data": Entry("data_pipeline.cli", "Build, verify and describe shards of clips and captions."),
    "teacher": Entry("pretrain.cli", "Train a tiny CLIP with open_clip, as the demo's teacher."),
    "teacher-cache": Entry("pretrain.cli", "Keep what a run's teacher makes of every clip."),
    "pretrain": Entry("pretrain.cli", "Train stage 1 or stage 2 as a config says."),
    "plan": Entry("pretrain.cost.cli", "What a run needs and how long it takes, before it is submitted.", "plan"),
    "checkpoint": Entry("pretrain.cli", "Look into a checkpoint, or write it in a published layout."),
    "eval": Entry("retrieval_eval.cli", "Zero-shot retrieval of a checkpoint, with its controls."),
    "embed": Entry("retrieval_eval.cli", "Embed clips or texts with a checkpoint or an exported encoder."),
    "index": Entry("retrieval_eval.cli", "Embed a collection and build the index that search asks."),
    "search": Entry("retrieval_eval.cli", "Find clips by a sentence in a folder of embeddings."),
    "serve": Entry("retrieval_eval.cli", "A page on this machine: find clips by a sentence or a clip, and play them."),
    "export": Entry("retrieval_eval.cli", "Write the video and text encoders as folders that load elsewhere."),
    "import-released": Entry("pretrain.released.cli", "A published checkpoint as one of ours, strictly."),
    "submit": Entry("slurm.cli", "Submit a run to Slurm: checked, snapshotted, restarted until it is done."),
    "status": Entry("slurm.cli", "Where a submitted run is: queue, restarts, progress, the last error."),
    "cancel": Entry("slurm.cli", "End a submitted run; it saves first."),
    "run": Entry("slurm.pipeline.cli", "Run a chain of commands here, from a pipeline file; what is done is skipped."),
    "plot": Entry("videomamba.plot.cli", "Draw what one or several runs logged, as a PNG and a page.", "plot"),
    "doctor": Entry("videomamba.doctor", "What this machine can run, and the command that mends the rest.", "doctor"),
    "bench": Entry("videomamba.bench", "Ours against a named baseline, interleaved: a table of medians."),
}

DEBUG = "VIDEOMAMBA_DEBUG"


class _Commands(LazyGroup):
    entries = COMMANDS


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Begin with: videomamba doctor, then: videomamba demo --minutes 3",
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"videomamba {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show our own packages' debug messages.")] = False,
    _debug: Annotated[bool, typer.Option("--debug", envvar=DEBUG, help="Show the traceback of every error.")] = False,
    _version: Annotated[bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Pretrain VideoMamba: raw clips in, video and text encoders for zero-shot retrieval out."""
    from videomamba import logs

    logs.setup(verbose)


def main() -> None:
    """Entry point of the console script; `--debug` is understood anywhere on the line."""
    arguments = sys.argv[1:]
    # Read by OpenMP when torch is imported: how long a thread spins before it sleeps. Its own default starves
    # other processes on shared cores; sleeping at once makes small steps a third slower on free ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if "--debug" in arguments:
        os.environ[DEBUG] = "1"  # ranks and steps that this process starts inherit it
        arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(arguments, prog_name="videomamba", obj=Joined())
    except BaseException as end:
        end_rank(end)
        raise
