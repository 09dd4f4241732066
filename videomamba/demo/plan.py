"""What a demo of so many minutes consists of: its sizes and its steps, as pure functions."""

from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError

FIXED_SECONDS = 80  # process starts, imports and checks, which do not shrink with --minutes
FULL_MINUTES = 10.0
FULL_WORLD = {"train": 6000, "val": 400, "test": 400, "images": 1500}
SMALLEST_WORLD = {"train": 600, "val": 60, "test": 100, "images": 200}
FULL_STEPS = {"teacher": 300, "stage1": 300, "stage2": 700, "stage2_unmasked": 400}
FEWEST_STEPS = 60  # above the warm-up of every demo config


@dataclass(frozen=True)
class Plan:
    """How large a demo is, where it goes, and its seed."""

    out: Path
    minutes: float
    seed: int
    ranks: int
    world: dict[str, int]
    steps: dict[str, int]

    @property
    def name(self) -> dict[str, object]:
        """What makes two demos in one folder the same one."""
        return {"minutes": self.minutes, "seed": self.seed, "ranks": self.ranks}


@dataclass(frozen=True)
class Step:
    """Public commands that belong together, what they are for, and their share of the time in seconds."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    budget: float


def make_plan(out: Path, minutes: float, seed: int = 0, ranks: int = 1) -> Plan:
    """The sizes for a budget: clips and steps shrink and grow with the time that the fixed costs leave.

    Raises UserError if the budget does not even hold the fixed costs.
    """
    share = (minutes * 60 - FIXED_SECONDS) / (FULL_MINUTES * 60 - FIXED_SECONDS)
    if share < 0.05:
        raise UserError(f"--minutes {minutes:g} leaves no time to train.", "Give 2 or more; 10 is the full demo.")
    world = {part: max(SMALLEST_WORLD[part], round(count * min(1.0, share))) for part, count in FULL_WORLD.items()}
    steps = {name: max(FEWEST_STEPS, round(count * share)) for name, count in FULL_STEPS.items()}
    return Plan(out, minutes, seed, ranks, world, steps)


def make_steps(plan: Plan) -> list[Step]:
    """The demo as public commands, in order; every path lies under `plan.out`."""
    out, share = plan.out, plan.minutes / FULL_MINUTES
    images = f"data.train.1.path={out / 'shards' / 'images'}"
    steps = f"steps={plan.steps['teacher']}"
    teacher = ("teacher", "demo/teacher", f"out={out / 'teacher'}", steps, *_data(plan), images)
    return [
        Step("world", "Render captioned clips with ffmpeg", (_world(plan),), 60 * share),
        Step("shards", "Build WebDataset shards, and verify them", _shards(plan), 50 * share),
        Step("teacher", "Train a tiny CLIP with open_clip, the teacher", (teacher,), 60 * share),
        Step("stage1", "Stage 1: masked video modelling with the teacher", (pretrain(plan, "stage1"),), 70 * share),
        Step("stage2", "Stage 2: video and text together, masked", (pretrain(plan, "stage2"),), 190 * share),
        Step(
            "stage2_unmasked",
            "Stage 2, second phase: unmasked, no teacher",
            (pretrain(plan, "stage2_unmasked"),),
            100 * share,
        ),
        Step("retrieval", "Zero-shot retrieval on clips never trained on", (retrieval(plan),), 40 * share),
        Step("export", "Export both encoders, load them in a fresh process", (_export(plan),), 20 * share),
    ]


def pretrain(
    plan: Plan, name: str, *, under: str = "", steps: int | None = None, more: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The command of a training run: the packaged config `demo/NAME`, its folder OUT/[UNDER/]NAME, its data."""
    folder = plan.out / under
    command = ["pretrain", f"demo/{name}", f"out={folder / name}", f"steps={steps or plan.steps[name]}", *_data(plan)]
    if name in ("stage1", "stage2"):
        command.append(f"teacher.source={plan.out / 'teacher'}")
    if name != "stage1":
        before = plan.out / "stage1" if name == "stage2" else folder / "stage2"
        command += [f"init={before}", f"tokenizer={plan.out / 'teacher' / 'tokenizer'}"]
        command.append(f"data.train.1.path={plan.out / 'shards' / 'images'}")
    command += more
    return (*command, "--ranks", str(plan.ranks)) if plan.ranks > 1 else tuple(command)


def retrieval(plan: Plan, *, under: str = "", split: str = "test") -> tuple[str, ...]:
    """The command that evaluates OUT/[UNDER/]stage2_unmasked on a split."""
    folder = plan.out / under
    return (
        "eval",
        "demo/retrieval",
        f"checkpoint={folder / 'stage2_unmasked'}",
        f"data.path={plan.out / 'shards' / split}",
        f"out={folder / 'retrieval'}",
    )


def _world(plan: Plan) -> tuple[str, ...]:
    sizes = [argument for part, count in plan.world.items() for argument in (f"--{part}", str(count))]
    return ("data", "synthetic", "--out", str(plan.out / "media"), "--seed", str(plan.seed), *sizes)


def _shards(plan: Plan) -> tuple[tuple[str, ...], ...]:
    commands: list[tuple[str, ...]] = []
    for part in plan.world:
        media, shards = plan.out / "media" / part, plan.out / "shards" / part
        commands.append(
            ("data", "build", str(media), str(shards), "--csv", str(media / "captions.csv"), "--name", part)
        )
        commands.append(("data", "verify", str(shards)))
    return tuple(commands)


def _data(plan: Plan) -> tuple[str, ...]:
    train = f"data.train.0.path={plan.out / 'shards' / 'train'}"
    return (f"seed={plan.seed}", train, f"data.cache={plan.out / 'cache'}")


def _export(plan: Plan) -> tuple[str, ...]:
    result = plan.out / "retrieval" / "result.json"
    return ("export", str(plan.out / "stage2_unmasked"), str(plan.out / "encoders"), "--result", str(result))
