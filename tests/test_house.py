"""The house rules that a machine can check: which way imports run, what is imported when, what is left undone."""

import ast
import re
import shutil
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "configs": set(),
    "data_pipeline": {"configs"},
    "pretrain": {"configs", "data_pipeline"},
    "retrieval_eval": {"configs", "data_pipeline", "pretrain"},
    "slurm": {"configs"},
    "videomamba": {"configs", "data_pipeline", "pretrain", "retrieval_eval", "slurm"},
}
HEAVY = ("torch", "torchvision", "transformers", "open_clip", "deepspeed", "faiss", "av", "webdataset", "tokenizers")
BROUGHT_WITH = {"pydantic_core": "pydantic"}  # pydantic's own other half
MODULES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))


def imported(path: Path) -> list[tuple[int, str]]:
    """Line and top package of every absolute import of a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node.lineno, node.module.partition(".")[0]))
    return found


def wrong_way(package: str, path: Path) -> list[str]:
    forbidden = MAY_IMPORT.keys() - MAY_IMPORT[package] - {package}
    return [f"{path}:{line} imports {name}" for line, name in imported(path) if name in forbidden]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_towards_the_ground(package):
    assert [fault for path in (ROOT / package).rglob("*.py") for fault in wrong_way(package, path)] == []


def test_a_wrong_import_is_noticed(tmp_path):
    (tmp_path / "bad.py").write_text("import os\n\ndef f():\n    from retrieval_eval.index import build\n")
    assert wrong_way("pretrain", tmp_path / "bad.py") == [f"{tmp_path / 'bad.py'}:4 imports retrieval_eval"]


def test_no_relative_and_no_star_imports():
    faults = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.level or any(alias.name == "*" for alias in node.names))
    ]
    assert faults == []


def test_what_every_command_imports_is_light(python):
    """A wrong key or path must be refused in the first second, before torch is imported."""
    light = [path for path in MODULES if path.name in ("cli.py", "config.py") or path.parent.name == "configs"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in light]
    done = python(
        "-c",
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = [h for h in {HEAVY!r} if h in sys.modules]\n"
        "    assert not heavy, f'{name} imports {heavy}'\n",
    )
    assert done.returncode == 0, done.stderr


def test_every_third_party_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    declared = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}
    distributions = packages_distributions()
    faults = set()
    for path in MODULES:
        for line, name in imported(path):
            if name in sys.stdlib_module_names or name in MAY_IMPORT:
                continue
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(name, [name])} | {
                BROUGHT_WITH.get(name, name)
            }
            if not owners & declared:
                faults.add(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert sorted(faults) == []


def test_every_module_says_what_it_is():
    faults = []
    for path in MODULES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if not docstring or docstring.startswith("TODO"):
            faults.append(str(path.relative_to(ROOT)))
    assert faults == []


@pytest.mark.parametrize("where", ["in the test", "at collection"])
@pytest.mark.parametrize(
    ("ci", "reason", "fails"),
    [
        ("true", "no ffmpeg on PATH", True),
        ("true", "triton is not installed", True),
        ("true", "no slurm here, and no apt to bring it", True),
        ("true", "needs a GPU", False),
        ("", "no ffmpeg on PATH", False),
    ],
)
def test_in_ci_nothing_skips_for_want_of_what_ci_brings(python, tmp_path, where, ci, reason, fails):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    skip = f"pytest.skip({reason!r}, allow_module_level=True)"
    body = f"{skip}\n" if where == "at collection" else f"def test_one():\n    {skip}\n"
    (tmp_path / "test_skips.py").write_text(f"import pytest\n\n{body}")
    (tmp_path / "test_passes.py").write_text("def test_two():\n    pass\n")
    done = python("-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", cwd=tmp_path, CI=ci)
    assert (done.returncode != 0) == fails, done.stdout
    assert (f"in CI this must not skip: Skipped: {reason}" in done.stdout) == fails
