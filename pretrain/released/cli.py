"""`videomamba import-released`; torch is imported only when the work begins."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from configs.errors import UserError
from configs.loader import validate
from pretrain.released.config import ImportConfig, Target

app = typer.Typer(add_completion=False)


@app.command(
    "import-released",
    epilog="Example: videomamba import-released videomamba_m16_25M_f8_res224.pth --as stage2 --tokenizer vocab.txt m16",
)
def import_released(
    file: Annotated[Path, typer.Argument(help="A published .pth or .safetensors; its layout is found out.")],
    out: Annotated[Path, typer.Argument(help="The checkpoint folder to write.")],
    target: Annotated[Target, typer.Option("--as", help="What the weights are to become.")],
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer's folder or a vocab.txt, for stage2.")] = None,
    frames: Annotated[int | None, typer.Option(help="Resize the temporal table; the default is the file's.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Resize the spatial table to frames of this side.")] = None,
    classes: Annotated[int | None, typer.Option(help="A new head of so many classes.")] = None,
    tubelet: Annotated[int | None, typer.Option(help="Inflate a patch kernel of one frame to so many.")] = None,
    inflate: Annotated[
        Literal["center", "average"], typer.Option(help="Into the middle frame, or a share into each.")
    ] = "center",
    heads: Annotated[int | None, typer.Option(help="Attention heads of the text tower, if not 64 wide.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a caption, [CLS] and [SEP] included.")] = 32,
    align_source: Annotated[
        Literal["released", "output"],
        typer.Option(help="What a decoder in the file gets: as it was trained, or the true output."),
    ] = "released",
) -> None:
    """A published checkpoint as one of ours, strictly; says what was renamed, resized and dropped."""
    asked = {
        "target": target, "frames": frames, "image_size": image_size, "classes": classes, "tubelet": tubelet,
        "inflate": inflate, "heads": heads, "max_tokens": max_tokens, "align_source": align_source,
    }  # fmt: skip
    wanted = validate(asked, ImportConfig, "import-released")
    if tokenizer is not None and not tokenizer.exists():
        raise UserError(f"There is no tokenizer {tokenizer}.", "Give a tokenizer's folder, or a vocab.txt.")
    from pretrain.released.folder import describe
    from pretrain.released.folder import import_released as write

    for line in describe(write(file, out, wanted, tokenizer)):
        typer.echo(line)
