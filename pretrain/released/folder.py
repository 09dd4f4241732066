"""A published file as a checkpoint folder of ours, for everything that takes one: init=, checkpoint=, export.

Beside what every checkpoint holds (model.safetensors, preprocess.json, meta.json), config.yaml is a part of a run's
config: the sizes of this model. A run that shall go on from these weights names it as its base, and the folder as init:

    base: released/m16/config.yaml
    init: released/m16
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from data_pipeline.preprocess import TextPreprocess, VisualPreprocess
from pretrain import checkpoint
from pretrain.checkpoint import Imported, Meta, ModelMeta, Preprocess
from pretrain.released.config import ImportConfig
from pretrain.released.fit import Fitted, fit
from pretrain.tokenizer import load_tokenizer, save_tokenizer
from pretrain.weight_files import read

CONFIG_HEADER = "# The sizes of an imported model; a run that goes on from it names this file as `base:`.\n"


@dataclass(frozen=True)
class ImportSummary:
    """Where the folder is, which file it was made from, the model, and what was done, a sentence each."""

    out: Path
    imported: Imported
    meta: ModelMeta
    parameters: int


def import_released(
    path: str | Path, out: str | Path, wanted: ImportConfig, tokenizer: Path | None = None
) -> ImportSummary:
    """Write the folder `out` from a published file, whole or not at all; an earlier import there is replaced.

    `tokenizer` is a folder or a vocab.txt; without it a joint model cannot read text. Raises UserError for a file
    that cannot be read or does not fit, a tokenizer that is not the model's, an `out` that holds something else.
    """
    target = Path(out).resolve()
    _check_target(target)
    source = read(path)
    fitted = fit(source.tensors, wanted)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, fitted)
    notes = [*fitted.notes]
    if source.beside:
        notes.append(f"not read: {', '.join(source.beside)} beside the weights")
    if source.unread:
        notes.append(f"not loaded: the classes {', '.join(source.unread)} that the file names")
    imported = Imported(
        file=source.path.name, sha256=checkpoint.sha256(source.path), layout=fitted.layout, target=wanted.target,
        notes=tuple(notes),
    )  # fmt: skip
    _write(fitted, imported, wanted, tokenizer, target)
    count = sum(parameter.numel() for parameter in fitted.model.parameters())
    return ImportSummary(target, imported, fitted.meta, count)


def describe(made: ImportSummary) -> list[str]:
    """What was done and what to do with it, line by line."""
    imported, vision = made.imported, made.meta.vision
    lines = [f"{imported.file} (sha256 {imported.sha256}) as {imported.target}", *imported.notes]
    sizes = (
        f"model: depth {vision.depth}, width {vision.width}, {vision.frames} frames of {vision.image_size}, patch "
        f"{vision.patch_size}, tubelet {vision.tubelet}, state {vision.d_state}"
    )
    if vision.align_width:
        sizes += f", alignment decoder {vision.align_width} wide (align_source {vision.align_source})"
    if vision.classes:
        sizes += f", {vision.classes} classes"
    lines.append(f"{sizes}; {made.parameters:,} parameters")
    joint = made.meta.joint
    if joint is not None:
        text = joint.text
        lines.append(
            f"text: width {text.width}, {text.heads} heads, {text.layers} text and {text.fusion_layers} fusion layers, "
            f"{text.vocab_size} words, {text.max_tokens} tokens a caption; joint width {joint.embed}"
        )
        if not (made.out / "tokenizer").is_dir():
            lines.append("no tokenizer: this model cannot read text until it is imported again with --tokenizer")
    tokenizer = f" tokenizer={made.out}/tokenizer" if (made.out / "tokenizer").is_dir() else ""
    if imported.target != "classifier":
        lines.append(f"go on from it: base: {made.out}/config.yaml in a run's config, and init={made.out}{tokenizer}")
    return [*lines, f"written: {made.out}"]


def _check_target(target: Path) -> None:
    if not target.exists():
        return
    ours = (target / "meta.json").is_file() and checkpoint.read_meta(target).imported is not None
    if not ours and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty and holds no import.", "Give another folder, or empty it yourself.")


def _check_tokenizer(path: Path, fitted: Fitted) -> None:
    if fitted.meta.joint is None:
        raise UserError("--tokenizer is given, but what is made has no text tower.", "Leave --tokenizer out.")
    words, rows = load_tokenizer(path).get_vocab_size(), fitted.meta.joint.text.vocab_size
    if words != rows:
        raise UserError(
            f"The tokenizer {path} has {words} pieces and the model {rows} word vectors.",
            "Give the one it was trained with; the published joint models use bert-base-uncased's (30522 pieces).",
        )


def preprocess_of(meta: ModelMeta, layout: str, wanted: ImportConfig) -> Preprocess:
    """What the published model was tested with: a stretched square for retrieval, a centre crop for classes.

    The release crops after resizing an image's short side to 8/7 of the square; ours crops the short side itself.
    """
    vision = meta.vision
    crop = wanted.target == "classifier"
    visual = VisualPreprocess(
        frames=vision.frames,
        image_size=vision.image_size,
        resize="crop" if crop else "stretch",
        interpolation="bilinear" if crop and layout == "video" else "bicubic",
    )
    text = None if meta.joint is None else TextPreprocess(max_tokens=meta.joint.text.max_tokens, clean="released")
    return Preprocess(visual=visual, text=text)


def run_tree(meta: ModelMeta) -> dict[str, Any]:
    """The part of a run's config that this model decides."""
    vision = meta.vision.model_dump(mode="json", exclude={"align_width"})
    tree: dict[str, Any] = {
        "vision": vision,
        "data": {"image_size": meta.vision.image_size, "frames": {"count": meta.vision.frames}},
    }
    if meta.joint is not None:
        tree |= {"text": meta.joint.text.model_dump(mode="json"), "embed": meta.joint.embed}
    return tree


def _write(fitted: Fitted, imported: Imported, wanted: ImportConfig, tokenizer: Path | None, target: Path) -> None:
    aside = target.with_name(f".{target.name}.part")
    meta = Meta(
        step=0, task=f"imported as {wanted.target}", config=imported.file, ranks=1, zero_stage=0, model=fitted.meta,
        versions=checkpoint.versions(), imported=imported,
    )  # fmt: skip
    with checkpoint.writing(target):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        try:
            if tokenizer is not None:
                save_tokenizer(load_tokenizer(tokenizer), aside / "tokenizer")
            config_yaml = CONFIG_HEADER + yaml.safe_dump(run_tree(fitted.meta), sort_keys=False)
            beside = checkpoint.Surroundings(config_yaml, preprocess_of(fitted.meta, fitted.layout, wanted))
            checkpoint.publish_weights(target, fitted.model.state_dict(), meta, beside, aside)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
