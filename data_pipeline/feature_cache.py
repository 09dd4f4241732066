"""Tensors made once of every sample of a corpus, kept in shards on disk: what each is, who made it, and at which width.

    DIR/<corpus>-fp16/cache.json              what the shards hold (a FeatureSpec)
    DIR/<corpus>-fp16/features-000000.safetensors   the rows of samples 0 to 63, in the corpus's own order, and so on

A shard appears whole or not at all, so that filling goes on where it stopped. "coarse" tensors are stored as fp16,
or as int8 with one scale for each of their last rows (the largest number of a row becomes 127); "fine" ones always
as fp16. A folder that was filled by another maker, or of another view, is refused: it would be wrong in silence.
Nothing here knows what the numbers mean.

n samples of a shard, B samples asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from configs.errors import UserError
from configs.files import write_whole

Width = Literal["fp16", "int8"]

ROWS = 64  # samples a shard
VERSION = 1  # of the layout
CARD = "cache.json"
_SCALE = ".scale"
_PRESENT = "present"
_WORDS = {"corpus": "corpus", "producer": "teacher", "view": "preprocessing or choice of frames", "samples": "corpus"}


@dataclass(frozen=True)
class FeatureSpec:
    """What a cache holds: digests of the corpus (of `samples`), of who made the tensors, and of what it looked at."""

    corpus: str
    samples: int
    producer: str
    view: str
    width: Width


class FeatureShards:
    """The cache of one corpus under `folder`, to be filled or read.

    Raises UserError if what is there was made otherwise than `spec` says. `cure` is what such an error advises.
    """

    def __init__(self, folder: Path, spec: FeatureSpec, cure: str) -> None:
        self.folder = folder / f"{spec.corpus[:16]}-{spec.width}"
        self.spec, self.cure = spec, cure
        card = self.folder / CARD
        if card.is_file():
            self._refuse_another(json.loads(card.read_text()))

    def _refuse_another(self, found: dict[str, Any]) -> None:
        wanted = self._card()
        words = dict.fromkeys(_WORDS.get(key, key) for key in wanted if found.get(key) != wanted[key])
        if words:
            raise UserError(
                f"The cache {self.folder} was filled with another {' and another '.join(words)}.",
                self.cure,
                exit_code=1,
            )

    def _card(self) -> dict[str, Any]:
        return {"version": VERSION, "rows": ROWS, **asdict(self.spec)}

    def __len__(self) -> int:
        return -(-self.spec.samples // ROWS)

    def span(self, shard: int) -> tuple[int, int]:
        """The first sample of a shard, and the one after its last."""
        return shard * ROWS, min((shard + 1) * ROWS, self.spec.samples)

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f"features-{shard:06d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there yet."""
        return [shard for shard in range(len(self)) if not self.path(shard).is_file()]

    def require_complete(self) -> None:
        """UserError unless every shard is there."""
        missing = len(self.missing())
        if missing:
            raise UserError(
                f"The cache {self.folder} holds {len(self) - missing} of {len(self)} shards.", self.cure, exit_code=1
            )

    def write(
        self, shard: int, index_B: Sequence[int], coarse: Mapping[str, Tensor], fine: Mapping[str, Tensor]
    ) -> None:
        """Keep a shard: row b of every tensor is of sample `index_B[b]`; samples that are lost are left out."""
        from safetensors.torch import save

        start, stop = self.span(shard)
        if not all(start <= index < stop for index in index_B):
            raise ValueError(f"shard {shard} holds samples {start} to {stop - 1}, not {list(index_B)}")
        rows = torch.tensor(index_B, dtype=torch.long) - start
        present = torch.zeros(stop - start, dtype=torch.uint8)
        present[rows] = 1
        held = {_PRESENT: present}
        for name, tensor in [*coarse.items(), *fine.items()]:
            for part, values in _stored(name, tensor.float().cpu(), name in coarse and self.spec.width == "int8"):
                held[part] = torch.zeros(stop - start, *values.shape[1:], dtype=values.dtype)
                held[part][rows] = values
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / CARD).is_file():
            write_whole(self.folder / CARD, (json.dumps(self._card(), indent=1) + "\n").encode())
        write_whole(self.path(shard), save(held))

    def read(self, index_B: Sequence[int], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Every tensor of these samples, float32 (B, ...), on `device`; UserError for one lost when it was filled."""
        rows = [self._row(index) for index in index_B]
        moved = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
        return {
            name: values.float() * moved[name + _SCALE] if name + _SCALE in moved else values.float()
            for name, values in moved.items()
            if not name.endswith(_SCALE)
        }

    def _row(self, index: int) -> dict[str, Tensor]:
        shard, place = divmod(index, ROWS)
        file = _opened(str(self.path(shard)))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        if not slices.pop(_PRESENT)[place].item():
            raise UserError(
                f"The cache {self.folder} lacks sample {index}, which could not be read when it was filled.",
                f"Remove {self.path(shard).name}, and then: {self.cure}",
                exit_code=1,
            )
        return {name: rows[place] for name, rows in slices.items()}


@lru_cache(maxsize=256)
def _opened(path: str) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt").__enter__()  # a view of the file; it is closed when it is forgotten


def _stored(name: str, values: Tensor, as_int8: bool) -> list[tuple[str, Tensor]]:
    """The parts under which a float32 tensor is stored."""
    if not as_int8:
        return [(name, values.half())]
    scale = values.abs().amax(-1, keepdim=True) / 127
    return [(name, (values / scale.clamp(min=1e-12)).round().to(torch.int8)), (name + _SCALE, scale)]
