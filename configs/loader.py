"""YAML files become one frozen tree: `base:` inheritance, `key=value` overrides, the nearest valid key in errors.

A config argument is a path or, failing that, the name of a packaged config: `demo/stage1` is
`configs/demo/stage1.yaml` beside this file. `base:` names another config, relative to the file that says
it or packaged, or a list of them, each laid over the one before; mappings merge, every other value replaces.
Nothing here imports torch.
"""

import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from configs.errors import ConfigError

PACKAGED = Path(__file__).parent


class Frozen(BaseModel):
    """A node of a config tree: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


Schema = TypeVar("Schema", bound=Frozen)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, as YAML 1.2 does, and refuses a key that comes twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$|^[-+]?\d+\.$"),
    list("-+0123456789."),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' comes twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def packaged_names() -> list[str]:
    """The names of every config in the package, as a command takes them (`demo/stage1`)."""
    return sorted(str(path.relative_to(PACKAGED).with_suffix("")) for path in PACKAGED.rglob("*.yaml"))


def find_config(name: str | Path, beside: Path | None = None) -> Path:
    """The file that `name` means: a path (also relative to the folder `beside`), else a packaged name.

    Raises ConfigError naming the nearest packaged config.
    """
    asked = Path(name)
    candidates = [asked] if beside is None else [beside / asked, asked]
    candidates += [PACKAGED / asked, PACKAGED / f"{asked}.yaml"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate.resolve()
    names = packaged_names()
    near = difflib.get_close_matches(str(asked.with_suffix("")), names, n=1, cutoff=0.5)
    hint = f"Did you mean '{near[0]}'?" if near else f"Give a path, or one of: {', '.join(names) or 'none packaged'}."
    raise ConfigError(f"There is no config '{name}'.", hint)


def read_tree(name: str | Path) -> dict[str, Any]:
    """The plain tree of a config with its `base:` chain merged in, without validation."""
    return _read(find_config(name), ())


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        chain = " -> ".join(step.name for step in (*seen, path))
        raise ConfigError(
            f"The configs name one another as base in a circle: {chain}.", "Remove one of the `base:` lines."
        )
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not readable as YAML: {' '.join(str(error).split())}.", "Mend that line."
        ) from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}, not a mapping.", "Write it as `key: value` lines.")
    bases = tree.pop("base", None) or []
    below: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        below = merge(below, _read(find_config(base, beside=path.parent), (*seen, path)))
    return merge(below, tree)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`: mappings merge key by key, any other value replaces."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = merge(under, value) if isinstance(value, Mapping) and isinstance(under, Mapping) else value
    return merged


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`tree` with `a.b=value` assignments laid over it; a value is read as YAML, a list index is a number.

    Raises ConfigError for an argument without `=`, or a path that runs through a plain value.
    """
    changed = dict(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"'{override}' is not an assignment.", "Write overrides as key=value, such as optim.lr=1e-4."
            )
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"The value of '{override}' is not readable as YAML.", "Quote it for the shell."
            ) from error
        changed = _assign(changed, key.split("."), value, override)
    return changed


def _assign(node: Any, parts: list[str], value: Any, override: str) -> Any:
    head, rest = parts[0], parts[1:]
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise ConfigError(f"'{override}' needs a list index below {len(node)}, not '{head}'.", "Give that index.")
        copy = list(node)
        copy[int(head)] = _assign(copy[int(head)], rest, value, override) if rest else value
        return copy
    if node is None:
        node = {}
    if not isinstance(node, Mapping):
        raise ConfigError(f"'{override}' goes through a plain value at '{head}'.", "Shorten the key.")
    merged = dict(node)
    merged[head] = _assign(merged.get(head), rest, value, override) if rest else value
    return merged


def load_config(name: str | Path, schema: type[Schema], overrides: Sequence[str] = ()) -> Schema:
    """The validated, frozen tree of a config file (path or packaged name) with overrides laid over it."""
    return validate(apply_overrides(read_tree(name), overrides), schema, str(name))


def validate(tree: Mapping[str, Any], schema: type[Schema], name: str) -> Schema:
    """`tree` as a `schema`; raises ConfigError with the first fault, its path and the nearest valid key."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise _explain(error.errors()[0], len(error.errors()), schema, name) from error


def _explain(fault: ErrorDetails, count: int, schema: type[Frozen], name: str) -> ConfigError:
    path = ".".join(_as_written(schema, fault["loc"]))
    more = f" ({count - 1} more after it.)" if count > 1 else ""
    if fault["type"] == "extra_forbidden":
        valid = _keys_at(schema, fault["loc"][:-1])
        near = difflib.get_close_matches(str(fault["loc"][-1]), valid, n=1, cutoff=0.4)
        cure = f"Did you mean '{near[0]}'?" if near else f"Valid keys there: {', '.join(sorted(valid))}."
        return ConfigError(f"{name}: unknown key '{path}'.{more}", cure)
    if fault["type"] == "missing":
        return ConfigError(f"{name}: the key '{path}' is missing.{more}", f"Add it, or give {path}=VALUE.")
    if fault["type"] == "union_tag_invalid":
        context = fault["ctx"]
        field, valid = context["discriminator"].strip("'"), context["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(context["tag"], valid, n=1, cutoff=0.4)
        cure = f"Did you mean '{near[0]}'?" if near else f"Use one of {', '.join(valid)}."
        return ConfigError(f"{name}: there is no {path}.{field} '{context['tag']}'.{more}", cure)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":  # our own cross-field rules: already a cause and a cure
        return ConfigError(f"{name}: {path + ': ' if path else ''}{message}", more.strip())
    seen = repr(fault["input"])[:80]
    return ConfigError(f"{name}: {path} is {seen}: {message[0].lower() + message[1:]}.{more}", f"Change {path}.")


def _keys_at(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The valid keys of the node at `location`; list indices and union tags on the way do not change the node."""
    models: list[type[BaseModel]] = [schema]
    for part in location:
        models = _below(models, part) or models
    return sorted({key for model in models for key in model.model_fields})


def _as_written(schema: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The parts of `location` as they stand in the file: pydantic also names the member of a union it chose."""
    models: list[type[BaseModel]] = [schema]
    written = []
    is_key = False  # of a mapping from names to models, such as the steps of a pipeline
    for place, part in enumerate(location):
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if is_key or fields or isinstance(part, int) or place == len(location) - 1:
            written.append(str(part))
        is_key = any(typing.get_origin(field.annotation) is dict for field in fields)
        models = _below(models, part) or models
    return written


def _below(models: Sequence[type[BaseModel]], part: int | str) -> list[type[BaseModel]]:
    """The models that a field called `part` may hold; none where there is no such field, or it holds a plain value."""
    fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
    return [inner for field in fields for inner in _models_in(field.annotation)]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def to_yaml(config: Frozen) -> str:
    """The resolved tree as YAML, readable again by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(config: Frozen | Mapping[str, Any]) -> str:
    """First 16 hex digits of the sha256 of a config's canonical JSON."""
    tree = config.model_dump(mode="json") if isinstance(config, Frozen) else config
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
