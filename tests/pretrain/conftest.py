"""A small real world for training tests: encoded clips and images in shards, a tiny CLIP, and run configs."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from configs.loader import validate
from pretrain.config import PretrainConfig
from pretrain.models.config import VisionConfig
from pretrain.models.videomamba import VideoMamba
from tests.tiny_clip import write_tiny_clip

ROOT = Path(__file__).parents[2]
SIDE, CLIPS, IMAGES, FRAMES = 32, 24, 12, 4
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "white": (240, 240, 240)}


def _frames(number: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    colour = list(COLOURS.values())[number % 4]
    frames = rng.integers(60, 90, (count, SIDE, SIDE, 3), dtype=np.uint8)
    for t in range(count):
        x = (t * 2) % (SIDE - 10) if number % 2 else (SIDE - 10) - (t * 2) % (SIDE - 10)
        frames[t, 8:20, x : x + 10] = colour
    return frames


def _caption(number: int) -> str:
    return f"a {list(COLOURS)[number % 4]} square moves {'right' if number % 2 else 'left'}, take {number}"


def _video(number: int) -> bytes:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in _frames(number, 12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _image(number: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_frames(number, 1)[0]).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of shards: `video` (24 clips of 32x32) and `image` (12)."""
    from data_pipeline.schema import Sample, content_digest
    from data_pipeline.shards import ShardWriter

    root = tmp_path_factory.mktemp("corpora")
    for kind, count, extension, make in (("video", CLIPS, "mp4", _video), ("image", IMAGES, "png", _image)):
        (root / kind).mkdir()
        with ShardWriter(root / kind, kind, 16) as writer:
            for number in range(count):
                media = make(number)
                frames = 12 if kind == "video" else 1
                probe = {
                    "width": SIDE, "height": SIDE, "frames": frames, "fps": 8.0, "duration": frames / 8, "codec": "x",
                    "rotation": 0,
                }  # fmt: skip
                key = f"{kind}{number:04d}"
                writer.write(
                    Sample(
                        key,
                        media,
                        extension,
                        kind,
                        (_caption(number),),
                        f"{key}.{extension}",
                        content_digest(media),
                        probe,
                    )
                )
    return {kind: str(root / kind) for kind in ("video", "image")}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained CLIP of 4x4 patches in a folder as open_clip writes it."""
    return str(write_tiny_clip(tmp_path_factory.mktemp("teacher"), SIDE))


@pytest.fixture(scope="session")
def stage1_tree(corpora: dict[str, str], teacher_folder: str) -> dict[str, Any]:
    """A stage-1 run of 8 steps; copy it and set `out`."""
    return {
        "task": "stage1",
        "steps": 8,
        "vision": {"depth": 2, "width": 32, "patch_size": 8, "tubelet": 2, "frames": FRAMES, "image_size": SIDE},
        "teacher": {"source": teacher_folder},
        "mask": {"kind": "attention", "ratio": 0.5},
        "data": {
            "train": [{"path": corpora["video"]}],
            "batch": 4,
            "image_size": SIDE,
            "frames": {"count": FRAMES},
            "workers": 0,
        },
        "optim": {"lr": 2e-3, "warmup_steps": 2, "clip_norm": 1.0},
        "device": "cpu",
        "threads": 1,
        "log": {"every_steps": 1, "tensorboard": False},
        "checkpoint": {"every_steps": 4},
    }


@pytest.fixture(scope="session")
def stage2_tree(stage1_tree: dict[str, Any], corpora: dict[str, str]) -> dict[str, Any]:
    """A masked stage-2 run on clips and images with all four losses and no dropout; copy it and set `out`."""
    return stage1_tree | {
        "task": "stage2",
        "embed": 16,
        "text": {
            "width": 32, "heads": 2, "layers": 1, "fusion_layers": 1, "intermediate": 64, "vocab_size": 256,
            "positions": 64, "max_tokens": 16, "dropout": 0.0,
        },
        "data": {
            **stage1_tree["data"],
            "train": [{"path": corpora["video"]}, {"path": corpora["image"], "kind": "image"}],
        },
    }  # fmt: skip


@pytest.fixture(scope="session")
def small_vision() -> Callable[..., VisionConfig]:
    """`small_vision(**options)`: a small encoder's config, with tubelets."""
    sizes = {"depth": 2, "width": 32, "patch_size": 8, "tubelet": 2, "frames": 4, "image_size": 32, "d_state": 4}
    return lambda **options: VisionConfig(**sizes | options)


@pytest.fixture(scope="session")
def encoder(small_vision: Callable[..., VisionConfig]) -> Callable[..., VideoMamba]:
    """`encoder(**options)`: such an encoder in eval mode, the same at every call."""

    def build(**options: Any) -> VideoMamba:
        torch.manual_seed(0)
        model = VideoMamba(small_vision(**options))
        # Zeros at the start would hide a temporal embedding or a cls token that is never added.
        torch.nn.init.normal_(model.cls_token)
        if model.temporal_pos_embedding is not None:
            torch.nn.init.normal_(model.temporal_pos_embedding)
        return model.eval()

    return build


@pytest.fixture
def clip() -> torch.Tensor:
    """Three normalised clips that fit it, (3, 3, 4, 32, 32)."""
    return torch.randn(3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))


RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@pytest.fixture(scope="session")
def process_group() -> Iterator[dict[str, str]]:
    """This process as the one rank of a run, once for the session; the variables that say so."""
    from pretrain import distributed

    with pytest.MonkeyPatch.context() as patch:
        for name in RANK_VARIABLES:
            patch.delenv(name, raising=False)
        distributed.init("cpu")
        said = {name: os.environ.pop(name) for name in RANK_VARIABLES}
    yield said
    distributed.finish()


@pytest.fixture
def alone(process_group: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Training works inside this test: the rank's variables are set, and gone afterwards."""
    for name, value in process_group.items():
        monkeypatch.setenv(name, value)


class Runs:
    """Starts `videomamba pretrain` on trees, as a user would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, tree: dict[str, Any], name: str) -> Path:
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree | {"out": tree.get("out", str(self.folder / name))}))
        return path

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def start(self, config: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "videomamba", "pretrain", str(config), *arguments],
            env=self.environment() | environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, config: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(config, *arguments, **environment)
        out, err = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def kill_when(self, process: subprocess.Popen[str], path: Path, number: int = signal.SIGKILL) -> None:
        """Send `number` to the process as soon as `path` exists."""
        deadline = time.monotonic() + 150
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.exists(), process.communicate()[1]
        process.send_signal(number)
        process.communicate(timeout=60)

    def log(self, name: str) -> list[dict[str, Any]]:
        lines = (self.folder / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def config(self, tree: dict[str, Any], name: str) -> PretrainConfig:
        """The validated config of a tree, its run in this test's folder."""
        return validate(tree | {"out": str(self.folder / name)}, PretrainConfig, name)


@pytest.fixture(scope="session")
def runs_in() -> type[Runs]:
    """`runs_in(folder)`: runs in a folder that outlives a test."""
    return Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    """Runs in this test's own folder."""
    return Runs(tmp_path)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors made inside it that are still alive; `peak` is the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size and address not in self._known:
            self._known.add(address)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


@pytest.fixture
def live_bytes() -> type[LiveBytes]:
    """`with live_bytes() as live:` counts what tensors hold; `live.peak` bytes."""
    return LiveBytes
