"""docs/losses.md names tests and options that exist."""

import re
from pathlib import Path

from data_pipeline.config import DataConfig
from pretrain.config import LossConfig, TeacherConfig
from pretrain.models.config import VisionConfig

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
TREES = {"losses": LossConfig, "teacher": TeacherConfig, "vision": VisionConfig, "data": DataConfig}


def test_the_tests_it_names_are_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    assert [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()] == []


def test_the_options_it_names_are_there():
    named = re.findall(r"`((?:losses|teacher|vision|data)\.[\w.]+)`", PAGE)
    assert len(named) > 15
    for option in named:
        first, *rest = option.split(".")
        tree = TREES[first]
        for key in rest:
            assert key in tree.model_fields, option
            tree = tree.model_fields[key].annotation
