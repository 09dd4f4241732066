"""A killed run goes on as if nothing had happened: with as many ranks to the last digit, with others to rounding.

Every life of a run is a fork of a process that has imported everything (zygote.py), so that there can be many.
"""

import copy
import json
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pretrain.metrics_log import read_log
from tests.pretrain.conftest import ROOT, Runs

HALF = 3
RANKS, STAGES = (1, 2), ("zero0", "zero1", "zero2", "zero3")


class Lives(Runs):
    """Runs in one folder, each life a fork of one process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("zygote.py"))],
            env=self.environment() | {"DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        self.trees: dict[str, dict[str, Any]] = {}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def live(self, tree: dict[str, Any], name: str, ranks: int, **until: Any) -> dict[str, Any]:
        """One life of the run `name`: to its end, or `until` it is killed (zygote.py says when)."""
        (self.folder / f"{name} keys").mkdir(exist_ok=True)
        order = {"config": str(self.write(tree, name)), "ranks": ranks, "keys": str(self.folder / f"{name} keys")}
        print(json.dumps(order | until), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def whole(self, tree: dict[str, Any], name: str, ranks: int) -> None:
        """One life that reaches the end."""
        lived = self.live(tree, name, ranks)
        assert lived["codes"] == [0] * ranks, lived["said"]

    def newest(self, name: str) -> int:
        """The step of the newest complete checkpoint; 0 without one."""
        names = [path.name for path in (self.folder / name / "checkpoints").glob("step-*")]
        return max((int(name.removeprefix("step-")) for name in names), default=0)

    def checkpoint(self, name: str) -> Path:
        """The newest complete checkpoint."""
        return self.folder / name / "checkpoints" / f"step-{self.newest(name):07d}"

    def weights(self, name: str) -> dict[str, str]:
        """The hash of every file of tensors in the newest checkpoint."""
        files = json.loads((self.checkpoint(name) / "meta.json").read_text())["files"]
        return {file: digest for file, digest in files.items() if file.endswith(".safetensors")}

    def keys(self, name: str) -> dict[int, list[str]]:
        """What each step was fed, all ranks in a row; a step that several lives took was fed the same in all."""
        fed: dict[tuple[int, int], dict[int, list[str]]] = defaultdict(dict)
        for path in sorted((self.folder / f"{name} keys").glob("*.jsonl")):
            for ranks, step, keys in map(json.loads, path.read_text().splitlines()):
                assert fed[step, ranks].setdefault(int(path.stem), keys) == keys
        rows: dict[int, list[str]] = {}
        for (step, ranks), by_rank in fed.items():
            if len(by_rank) == ranks:  # or it was killed before all of them had noted it
                row = [key for rank in range(ranks) for key in by_rank[rank]]
                assert rows.setdefault(step, row) == row
        return rows


def numbers(lines: list[dict[str, Any]]) -> list[list[Any]]:
    return [[line[key] for key in ("step", "loss", "losses", "grad_norm", "lr")] for line in lines]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    made = Lives(tmp_path_factory.mktemp("lives"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def trees(stage1_tree, stage2_tree, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Both stages, twice HALF steps, saved in the middle and at the end; float32, so that rounding is small."""
    from pretrain.tokenizer import train_tokenizer

    captions = [
        f"a {colour} square moves {way}, take {n}"
        for colour in ("red", "blue")
        for way in ("left", "right")
        for n in range(9)
    ]
    words = train_tokenizer(captions, tmp_path_factory.mktemp("words") / "tokenizer", 256)
    more = {"precision": "fp32", "steps": 2 * HALF, "checkpoint": {"every_steps": HALF, "keep": 9}}
    stage2 = {"losses": {"matching": {"negatives": "global"}}, "tokenizer": str(words)}
    return {"stage1": copy.deepcopy(stage1_tree) | more, "stage2": copy.deepcopy(stage2_tree) | more | stage2}


def halves(lives: Lives, tree: dict[str, Any], name: str, first: tuple[int, str], second: tuple[int, str]) -> None:
    """The run `name`, killed when its checkpoint in the middle is there, and ended, each with (ranks, ZeRO)."""
    middle = lives.folder / name / "checkpoints" / f"step-{HALF:07d}"
    lived = lives.live(tree | {"deepspeed": first[1]}, name, first[0], when=str(middle))
    assert lived["codes"] == [-9] * first[0], lived["said"]
    assert lives.newest(name) == HALF
    assert not (lives.folder / name / "done.json").exists()
    lives.whole(tree | {"deepspeed": second[1]}, name, second[0])


def test_a_killed_run_goes_on_with_other_ranks_and_another_zero_stage(lives, trees):
    tree = trees["stage1"]
    lives.whole(tree, "fast straight", 1)
    halves(lives, tree, "fast", (2, "zero2"), (1, "zero0"))
    ours, theirs = lives.log("fast"), lives.log("fast straight")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], rel=1e-5)
    assert lives.keys("fast") == lives.keys("fast straight")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_rank_stops_all_of_them(lives, trees, rank):
    """In the background: one of the ranks alone can write no more, while training goes on."""
    tree, name = trees["stage1"] | {"deepspeed": "zero1"}, f"full {rank}"
    lived = lives.live(tree, name, 2, full=rank)
    assert lived["codes"] == [1, 1], lived["said"]
    assert lived["said"].count("step-0000003 grew past the size that this system allows a file") == 2
    assert lives.newest(name) == 0
    assert not list((lives.folder / name / "checkpoints").iterdir())
    lives.whole(tree, name, 2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["stage1", "stage2"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("zero", STAGES)
def test_killed_and_resumed_equals_uninterrupted_to_the_last_digit(lives, trees, task, ranks, zero):
    tree, name = trees[task], f"{task} {ranks} {zero}"
    lives.whole(tree | {"deepspeed": zero}, f"{name} straight", ranks)
    halves(lives, tree, name, (ranks, zero), (ranks, zero))
    assert numbers(lives.log(name)) == numbers(lives.log(f"{name} straight"))
    assert lives.weights(name) == lives.weights(f"{name} straight")
    assert len(lives.weights(name)) == 1 + ranks
    assert lives.keys(name) == lives.keys(f"{name} straight")


@pytest.mark.slow
@pytest.mark.parametrize(
    "first, second", [((1, "zero0"),) * 2, ((2, "zero2"),) * 2, ((2, "zero3"),) * 2, ((2, "zero2"), (1, "zero3"))]
)
def test_so_it_does_with_muon_an_average_of_weights_bf16_and_micro_batches(lives, trees, first, second):
    tree, name = trees["stage2"] | {"precision": "bf16", "micro_batch": 1}, f"muon {first} {second}"
    tree["optim"] = {"method": "muon", "lr": 2e-3, "muon_lr": 0.01, "warmup_steps": 2, "ema_decay": 0.9}
    lives.whole(tree | {"deepspeed": first[1]}, f"{name} straight", first[0])
    halves(lives, tree, name, first, second)
    assert "ema.safetensors" in lives.weights(name)
    assert lives.keys(name) == lives.keys(f"{name} straight")
    if first == second:
        assert numbers(lives.log(name)) == numbers(lives.log(f"{name} straight"))
        assert lives.weights(name) == lives.weights(f"{name} straight")
    for ours, theirs in zip(lives.log(name), lives.log(f"{name} straight"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-2)


CHANGES = [
    ((1, "zero0"), (2, "zero2")),
    ((2, "zero2"), (1, "zero0")),
    ((2, "zero1"), (1, "zero2")),
    ((1, "zero1"), (2, "zero0")),
    ((1, "zero2"), (1, "zero1")),
    ((2, "zero0"), (2, "zero3")),
    ((2, "zero3"), (1, "zero0")),
]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["stage1", "stage2"])
@pytest.mark.parametrize("first, second", CHANGES)
def test_with_other_ranks_or_another_stage_it_equals_to_rounding(lives, trees, task, first, second):
    """Same samples at every step; losses and weights as those of one rank without ZeRO."""
    tree, straight, name = trees[task], f"{task} 1 zero0 straight", f"{task} {first} {second}"
    if not (lives.folder / straight / "done.json").exists():
        lives.whole(tree, straight, 1)
    halves(lives, tree, name, first, second)
    assert lives.keys(name) == lives.keys(straight)
    for ours, theirs in zip(lives.log(name), lives.log(straight), strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-4)
    ours, theirs = (load_file(lives.checkpoint(one) / "model.safetensors") for one in (name, straight))
    for parameter, value in ours.items():
        # An Adam step of a gradient near zero has the size of the rate and a sign that rounding decides.
        assert (value - theirs[parameter]).abs().quantile(0.99) < 1e-4, parameter


@pytest.mark.slow
@pytest.mark.parametrize("ranks, zero", [(1, "zero0"), (2, "zero2")])
def test_killed_while_it_saves_a_run_has_the_checkpoint_of_before(lives, trees, ranks, zero):
    """The disk is so slow that the save lasts for seconds, while training would go on."""
    tree, name = copy.deepcopy(trees["stage1"]) | {"deepspeed": zero, "steps": 8}, f"saving {ranks} {zero}"
    tree["checkpoint"] = {"every_steps": 2, "keep": 9}
    lives.whole(tree, f"{name} straight", ranks)
    root = lives.folder / name / "checkpoints"
    for step in (2, 4):
        slow = {**tree, "checkpoint": {**tree["checkpoint"], **({"write_mb_s": 0.2} if step == 4 else {})}}
        part = root / f".step-{step:07d}.part" / f"optimizer-{ranks - 1:04d}.safetensors"
        lived = lives.live(slow, name, ranks, when=str(part if step == 4 else root / "step-0000002"))
        assert lived["codes"] == [-9] * ranks, lived["said"]
    assert part.exists()
    assert lives.newest(name) == 2
    taken = lives.log(name)[-1]["step"]
    assert 4 <= taken < 8
    lives.whole(tree, name, ranks)
    assert numbers(lives.log(name)) == numbers(lives.log(f"{name} straight"))
    assert lives.weights(name) == lives.weights(f"{name} straight")
    assert not list(root.glob(".*"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills_lose_no_step_beyond_the_last_checkpoint(lives, trees):
    """At random moments of runs of both stages, one rank and two, ZeRO 0 to 2: start, step or save."""
    every, steps, chance = 2, 24, random.Random(5)
    variants = [("stage1", 1, "zero0"), ("stage2", 1, "zero1"), ("stage1", 2, "zero2"), ("stage2", 2, "zero0")]
    kills = saving = repeated = number = 0
    while kills < 50:
        task, ranks, zero = variants[number % len(variants)]
        slow = {"every_steps": every, "keep": 2, "write_mb_s": 3.0}  # saving for most of the time
        tree = trees[task] | {"deepspeed": zero, "steps": steps, "checkpoint": slow}
        straight, name = f"soak {task} {ranks} {zero}", f"soak {number}"
        if number < len(variants):
            lives.whole(tree, straight, ranks)
        before, codes = 0, []
        while codes != [0] * ranks:
            fed = chance.randint(0, 12)
            lived = lives.live(tree, name, ranks, fed=fed, after=chance.uniform(0, 0.4 if fed else 1.5))
            codes, newest = lived["codes"], lives.newest(name)
            taken = [line["step"] for line in read_log(lives.folder / name)]
            assert newest >= before  # a complete checkpoint is never lost,
            assert taken == list(range(1, len(taken) + 1))  # and the next life goes on from it
            if codes != [0] * ranks:
                assert codes == [-9] * ranks, lived["said"]
                kills += 1
                saving += any((lives.folder / name / "checkpoints").glob(".step-*.part"))
                assert len(taken) - newest <= 2 * every  # those since the last one, the next being written
                repeated += len(taken) - newest
            before = newest
        assert numbers(lives.log(name)) == numbers(lives.log(straight))
        assert lives.weights(name) == lives.weights(straight)
        number += 1
    print(f"{kills} kills, {saving} of them during a save, {repeated} steps taken again, in {number} runs of {steps}")
    assert saving >= 5
