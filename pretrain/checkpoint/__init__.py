"""Checkpoints: complete, whole or not there, checked when read, and free of the ranks that wrote them.

A run folder holds `checkpoints/step-0000500/`, which has that name only when it is complete, and
`checkpoints/latest`, a file with the name of the newest. In a checkpoint:

    model.safetensors         the weights under their plain names, for anyone to read
    optimizer-0000.safetensors, ...   what the optimizer keeps of each parameter, by name (snapshot.py)
    ema.safetensors           the average of the weights, where the run keeps one
    config.yaml               the run's resolved config
    preprocess.json           what the model was fed: pixels, and captions where it reads them
    tokenizer/                in stage 2
    meta.json                 step, model, versions and the sha256 of every other file; written last

Random state needs no file: torch's generator is seeded at every step from (seed, step, rank), and everything else is
drawn from the samples' own seeds; the schedule is a function of the step.

meta.py      what meta.json and preprocess.json say       folder.py    which checkpoints there are, whole, kept
pieces.py    where DeepSpeed keeps a parameter's state    snapshot.py  the state as whole tensors by name
tensors.py   writing them                                 publish.py   giving a complete checkpoint its name
saver.py     all that beside training                     restore.py   putting it back
models.py    models out of checkpoints
"""

from pretrain.checkpoint.folder import checkpoints, latest, newest_whole, prune, read_meta, resolve, sha256, verify
from pretrain.checkpoint.meta import Imported, Meta, ModelMeta, Preprocess, versions
from pretrain.checkpoint.models import build_model, load_init, load_model, load_weights, tokenizer_of
from pretrain.checkpoint.publish import Surroundings, prepare, publish_weights, writing
from pretrain.checkpoint.restore import StoredTensors, restore, stored_ema
from pretrain.checkpoint.saver import Saver

__all__ = [
    "Imported",
    "Meta",
    "ModelMeta",
    "Preprocess",
    "Saver",
    "StoredTensors",
    "Surroundings",
    "build_model",
    "checkpoints",
    "latest",
    "load_init",
    "load_model",
    "load_weights",
    "newest_whole",
    "prepare",
    "prune",
    "publish_weights",
    "read_meta",
    "resolve",
    "restore",
    "sha256",
    "stored_ema",
    "tokenizer_of",
    "verify",
    "versions",
    "writing",
]
