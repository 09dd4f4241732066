"""The config loader: inheritance, overrides, the nearest key, and errors that name the cure."""

from pathlib import Path

import pytest
from pydantic import Field, model_validator

from configs.errors import ConfigError
from configs.loader import Frozen, digest, find_config, load_config, packaged_names, to_yaml


class Corpus(Frozen):
    path: str
    weight: float = 1.0


class Optim(Frozen):
    lr: float = Field(1e-4, gt=0)
    warmup_steps: int = 0


class Run(Frozen):
    out: str
    steps: int = Field(gt=0)
    optim: Optim = Optim()
    train: tuple[Corpus, ...] = ()
    extra: Optim | None = None

    @model_validator(mode="after")
    def _warmup_fits(self) -> "Run":
        if self.optim.warmup_steps > self.steps:
            raise ValueError("the warm-up is longer than the run. Lower optim.warmup_steps.")
        return self


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_base_merges_key_by_key_and_overrides_come_last(tmp_path: Path) -> None:
    write(tmp_path, "ground.yaml", "out: a\nsteps: 10\noptim: {lr: 1e-3, warmup_steps: 2}\n")
    write(tmp_path, "middle.yaml", "base: ground.yaml\nsteps: 20\n")
    top = write(tmp_path, "top.yaml", "base: middle.yaml\noptim: {lr: 5e-4}\ntrain: [{path: x}, {path: y}]\n")
    run = load_config(top, Run, ["optim.warmup_steps=3", "train.1.weight=0.5", "out=runs/b"])
    assert (run.out, run.steps, run.optim.lr, run.optim.warmup_steps) == ("runs/b", 20, 5e-4, 3)
    assert [corpus.weight for corpus in run.train] == [1.0, 0.5]


def test_of_several_bases_each_lies_over_the_one_before(tmp_path: Path) -> None:
    write(tmp_path, "size.yaml", "out: a\nsteps: 10\noptim: {lr: 1e-3, warmup_steps: 2}\n")
    write(tmp_path, "phase.yaml", "steps: 5\noptim: {lr: 1e-5}\n")
    run = load_config(write(tmp_path, "both.yaml", "base: [size.yaml, phase.yaml]\nout: b\n"), Run)
    assert (run.out, run.steps, run.optim.lr, run.optim.warmup_steps) == ("b", 5, 1e-5, 2)


def test_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, "a.yaml", "out: a\nsteps: 1\ntrain: [{path: é}]\n"), Run)
    again = load_config(write(tmp_path, "b.yaml", to_yaml(run)), Run)
    assert again == run
    assert digest(again) == digest(run)
    assert digest(run) != digest(load_config(tmp_path / "a.yaml", Run, ["steps=2"]))


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("out: a\nsteps: 1\nsteos: 2\n", [], "Did you mean 'steps'?"),
        ("out: a\nsteps: 1\noptim: {lrr: 1}\n", [], "Did you mean 'lr'?"),
        ("out: a\nsteps: 1\ntrain: [{path: x, wieght: 2}]\n", [], "Did you mean 'weight'?"),
        ("out: a\nsteps: 1\nextra: {warm_steps: 2}\n", [], "Did you mean 'warmup_steps'?"),
        ("out: a\n", [], "'steps' is missing"),
        ("out: a\nsteps: many\n", [], "steps is 'many'"),
        ("out: a\nsteps: 1\n", ["optim.warmup_steps=5"], "longer than the run"),
        ("out: a\nsteps: 1\n", ["steps"], "is not an assignment"),
        ("out: a\nsteps: 1\n", ["steps.x=1"], "goes through a plain value"),
        ("out: a\nsteps: 1\ntrain: [{path: x}]\n", ["train.3.path=y"], "list index below 1"),
        ("out: a\nout: b\nsteps: 1\n", [], "comes twice"),
        ("- 1\n", [], "not a mapping"),
        ("a: [\n", [], "not readable as YAML"),
    ],
)
def test_wrong_input_names_cause_and_cure(tmp_path: Path, text: str, overrides: list[str], expected: str) -> None:
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, Run, overrides)
    assert expected in f"{caught.value.cause} {caught.value.cure}"
    assert caught.value.exit_code == 2


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    path = write(tmp_path, "b.yaml", "base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(path, Run)


def test_missing_config_names_the_nearest_packaged_one() -> None:
    assert "demo/stage1" in packaged_names()
    assert find_config("demo/stage1").is_file()
    with pytest.raises(ConfigError, match="demo/stage1"):
        find_config("demo/stag1")
    with pytest.raises(ConfigError) as error:  # nothing is near it: a path was meant
        find_config("mine.yaml")
    assert error.value.cure.startswith("Give a path, or one of: ")


def test_frozen() -> None:
    run = Run(out="a", steps=1)
    with pytest.raises(ValueError, match="frozen"):
        run.steps = 2  # type: ignore[misc]
