"""The model card of an export, made from the run: what it is, how to load it, what it saw, what it reached."""

import json
from pathlib import Path
from typing import Any

from configs.loader import to_yaml
from pretrain.checkpoint import Meta
from pretrain.config import PretrainConfig

_LOAD = {
    "video": """```python
from videomamba import load_encoder

encoder = load_encoder("..")                       # the folder that holds video/ and text/
vectors = encoder.encode_video(["clip.mp4"])       # paths, or uint8 frames (T, H, W, 3)
```

or, with pixels normalised as `preprocessor_config.json` says, (B, 3, T, H, W):

```python
import pretrain.export_hf                          # AutoModel then knows the model
from transformers import AutoModel

model = AutoModel.from_pretrained("video")
model(pixel_values).embedding                      # unit vectors; .frame_embeddings has one a token frame
```

The published dual score of a clip and a text is `frame_embeddings.mean(1) @ text_embedding`.""",
    "text": """```python
from videomamba import load_encoder

encoder = load_encoder("..")                       # the folder that holds video/ and text/
vectors = encoder.encode_text(["a dog catches a frisbee"])
```

or, with captions cleaned as `preprocessor_config.json` says:

```python
import pretrain.export_hf                          # AutoModel then knows the model
from transformers import AutoModel, AutoTokenizer

model, tokenizer = AutoModel.from_pretrained("text"), AutoTokenizer.from_pretrained("text")
model(**tokenizer(["a dog catches a frisbee"], return_tensors="pt")).embedding
```""",
}


def model_card(part: str, config: PretrainConfig | None, meta: Meta, result: dict[str, Any] | None) -> str:
    """README.md of the `video` or `text` folder; `result` is what a result.json holds.

    `config` is the run's, None for an imported model.
    """
    embed = meta.model.joint.embed if meta.model.joint is not None else "unknown"
    return f"""---
license: apache-2.0
library_name: transformers
tags: [video-text-retrieval, videomamba]
---

# VideoMamba, {part} encoder

One half of a pair of encoders that put clips and sentences into one space of {embed} numbers (VideoMamba,
arXiv 2403.06977). Both halves come from one checkpoint and belong together.

## Use
{_LOAD[part]}

## Training
{_training(config, meta)}
Weights: sha256 `{meta.files.get("model.safetensors", "unknown")}`.

## Results
{_results(result)}
{"" if config is None else _run(config)}"""


def _training(config: PretrainConfig | None, meta: Meta) -> str:
    """The run that made the weights, or the file that they were imported from."""
    if config is None:
        source = meta.imported
        if source is None:
            return "Unknown."
        done = "\n".join(f"- {note}" for note in source.notes)
        return f"Not trained here: imported from `{source.file}` (sha256 `{source.sha256}`).\n\n{done}\n"
    data = "\n".join(f"- {_corpus(corpus.path, corpus.kind)}" for corpus in config.data.train)
    return f"""Task {meta.task}, step {meta.step} of {config.steps}, global batch {config.data.batch},
{meta.ranks} rank(s), seed {config.seed}, precision {config.precision}.

Data:
{data}
"""


def _run(config: PretrainConfig) -> str:
    return f"""
## The run's config
```yaml
{to_yaml(config).strip()}
```
"""


def _corpus(path: str, kind: str) -> str:
    try:
        card = json.loads((Path(path) / "dataset.json").read_text())
    except (OSError, ValueError):
        return f"{kind}s of `{Path(path).name}`"
    said = f"{kind}s of `{card.get('name') or Path(path).name}`: {card.get('samples')} samples"
    if "world" in card:
        from data_pipeline.world import DISCLAIMER

        version = card["world"].get("version", "unknown")
        said += f". {DISCLAIMER} World version {version}."
    return said


def _results(result: dict[str, Any] | None) -> str:
    if result is None:
        return "No result was given when this was exported."
    lines = ["| | R@1 | R@5 | R@10 | MedR |", "|---|---|---|---|---|"]
    for scoring, name in result["columns"].items():
        for direction, title in (("t2v", "text to video"), ("v2t", "video to text")):
            row = result["results"][scoring][direction]
            numbers = " | ".join(f"{row[measure]:.1f}" for measure in ("R@1", "R@5", "R@10", "MedR"))
            lines.append(f"| {title} ({name}) | {numbers} |")
    protocol = result["protocol"]
    lines.append(f"\nOn `{protocol.get('split') or Path(protocol['corpus']).name}`: {protocol['clips']} clips, "
                 f"{protocol['captions']} captions. {protocol.get('note', '')}")  # fmt: skip
    return "\n".join(lines).strip()
