"""`videomamba bench NAME`: ours against a named baseline, in the same run, interleaved, as a table of medians.

Both are first checked to give the same result. Rows, table and JSON: bench_table.py; baselines: baselines.py.
"""

import typer

from videomamba.bench_checkpoint import checkpoint
from videomamba.bench_decode import decode
from videomamba.bench_encoder import encoder
from videomamba.bench_loader import loader
from videomamba.bench_plan import plan
from videomamba.bench_retrieval import retrieval
from videomamba.bench_scan import scan
from videomamba.bench_serve import serve
from videomamba.bench_teacher import teacher_cache
from videomamba.bench_trainer import trainer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _benches() -> None:
    """Measure ours and a named baseline in the same run, interleaved: a table of medians.

    Example: videomamba bench scan --json scan.json
    """


app.command("scan", epilog="Example: videomamba bench scan --json scan.json")(scan)
app.command("encoder", epilog="Example: videomamba bench encoder --json encoder.json --plot encoder.html")(encoder)
app.command("loader", epilog="Example: videomamba bench loader --json loader.json")(loader)
app.command("retrieval", epilog="Example: videomamba bench retrieval --json retrieval.json")(retrieval)
app.command("trainer", epilog="Example: videomamba bench trainer --json trainer.json")(trainer)
app.command("plan", epilog="Example: videomamba bench plan --json plan.json")(plan)
app.command("checkpoint", epilog="Example: videomamba bench checkpoint --model base --folder /scratch")(checkpoint)
app.command("serve", epilog="Example: videomamba bench serve --json serve.json")(serve)
app.command("trainer", epilog="Example: videomamba bench trainer --json trainer.json")(trainer)
app.command("decode", epilog="Example: videomamba bench decode --clip a.mp4 --clip b.webm")(decode)
app.command(
    "teacher-cache",
    epilog="Example: videomamba bench teacher-cache stage1.yaml data.crop_scale=[1,1] data.frames.rule=middle",
)(teacher_cache)
