"""The other end of export's check: `python -m pretrain.export_check FOLDER GIVEN TAKEN`, in a process of its own.

Loads the exported encoders as a user would, embeds the frames and captions of GIVEN, writes TAKEN.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pretrain.encoder import load_encoder


def main(folder: Path, given: Path, taken: Path) -> None:
    """Embed what is in `given` and write `frames` (B, K, E) and `texts` (B, E) to `taken`."""
    encoder = load_encoder(folder)
    with safe_open(given, framework="pt") as file:
        frames_BCTHW = file.get_tensor("frames")
        captions = json.loads(file.metadata()["captions"])
    with torch.inference_mode():
        made = encoder.video.model(encoder.video.visual.normalise(frames_BCTHW))
    texts = torch.from_numpy(encoder.encode_text(captions))
    save_file({"frames": made.frame_embeddings.contiguous(), "texts": texts}, taken)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
