"""A corpus of small real clips and a stage-2 checkpoint with random weights, written as training writes it."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.schema import Sample, content_digest
from data_pipeline.shards import ShardWriter

SIDE, CLIPS, FRAMES = 32, 14, 4
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220), "white": (240, 240, 240)}
BROKEN = 5


def _video(number: int) -> bytes:
    import av

    noise = np.random.default_rng(number).integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for t in range(12):
            frame = noise.copy()
            x = 2 * t if number % 2 else 22 - 2 * t
            frame[6 + number : 18 + number, x : x + 10] = list(COLOURS.values())[number % 4]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def _captions(number: int) -> tuple[str, ...]:
    colour, way = list(COLOURS)[number % 4], "right" if number % 2 else "left"
    captions = (f"a {colour} square moves {way}, take {number}", f"take {number}: {colour} goes {way}")
    return captions[: 1 + number % 2]


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 14 clips of 32x32 with one or two captions, the sixth of which is no video."""
    folder = tmp_path_factory.mktemp("clips")
    with ShardWriter(folder, "clips", 6) as writer:
        for number in range(CLIPS):
            media = b"not a video " * 40 if number == BROKEN else _video(number)
            probe = {"width": SIDE, "height": SIDE, "frames": 12, "fps": 8.0, "duration": 1.5}
            key = f"clip{number:03d}"
            sample = Sample(key, media, "mp4", "video", _captions(number), f"{key}.mp4", content_digest(media), probe)
            writer.write(
                Sample(**{**sample.__dict__, "attributes": {"look": list(COLOURS)[number % 4], "motion": number % 2}})
            )
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pretrain.tokenizer import train_tokenizer

    texts = [caption for number in range(CLIPS) for caption in _captions(number)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer", 256)


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer_folder: Path, clips: Path) -> Callable[..., Path]:
    """`make_checkpoint(folder, seed=0, fusion_layers=2)` writes a run folder with one stage-2 checkpoint."""

    def make(folder: Path, seed: int = 0, fusion_layers: int = 2, task: str = "stage2") -> Path:
        import torch

        from configs.loader import to_yaml, validate
        from pretrain import checkpoint
        from pretrain.config import PretrainConfig
        from pretrain.models.config import JointConfig

        tree = {
            "task": task,
            "out": str(folder),
            "steps": 3,
            "vision": {"depth": 2, "width": 32, "patch_size": 8, "tubelet": 2, "frames": FRAMES, "image_size": SIDE},
            "data": {"train": [{"path": str(clips)}], "image_size": SIDE, "frames": {"count": FRAMES}},
            "optim": {"warmup_steps": 1},
        }
        if task == "stage2":
            tree |= {"embed": 16, "losses": {"alignment": {"weight": 0}, "mlm": {"weight": 0}}}
            tree["losses"] |= {} if fusion_layers else {"matching": {"weight": 0}}
            tree["text"] = {"width": 32, "heads": 2, "layers": 2, "fusion_layers": fusion_layers, "intermediate": 64,
                            "vocab_size": 256, "positions": 32, "max_tokens": 12, "dropout": 0.1}  # fmt: skip
        else:
            tree["teacher"] = {"source": "some-teacher"}
        config = validate(tree, PretrainConfig, "test")
        joint = None
        if config.text is not None:
            vision = config.vision.model_copy(update={"pool_norm": True})
            joint = JointConfig(vision=vision, text=config.text, embed=config.embed)
        meta = checkpoint.ModelMeta(kind="joint" if joint else "vision", vision=config.vision, joint=joint)
        torch.manual_seed(seed)
        model = checkpoint.build_model(meta)
        for name, weight in model.named_parameters():  # far from the small start, where every clip looks alike
            if weight.ndim > 1 and "A_log" not in name:
                weight.data.mul_(4)
        text = config.text_preprocess if joint else None
        final = folder / "checkpoints" / "step-0000003"
        aside = final.with_name(".step-0000003.part")
        checkpoint.prepare(final.parent, aside)
        told = checkpoint.Meta(step=3, task=task, config="test", ranks=1, zero_stage=0, model=meta, versions={})
        fed = checkpoint.Preprocess(visual=config.data.visual(), text=text)
        beside = checkpoint.Surroundings(to_yaml(config), fed, tokenizer_folder if joint else None)
        checkpoint.publish_weights(final, model.state_dict(), told, beside, aside)
        return folder

    return make


@pytest.fixture(scope="session")
def run_folder(make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of stage 2 with two fusion layers."""
    return make_checkpoint(tmp_path_factory.mktemp("runs") / "stage2")
