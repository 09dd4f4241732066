"""Every choice behind the numbers, as lists to read: what was measured on what, the rest of the protocol, versions."""

from collections.abc import Mapping
from html import escape
from typing import Any

FIRST = ("checkpoint", "checkpoint_digest", "checkpoint_step", "split", "corpus", "corpus_digest", "queries_digest",
         "clips", "captions")  # fmt: skip


def protocol_lists(result: Mapping[str, Any]) -> str:
    """The protocol of a result, its hashes first, then every choice, then the versions of what computed it."""
    protocol = dict(result.get("protocol", {}))
    if not protocol:
        return ""
    versions = protocol.pop("versions", {})
    first = {name: protocol.pop(name) for name in FIRST if protocol.get(name) is not None}
    made = {"created": result["created"]} if "created" in result else {}
    spent = {f"seconds, {stage}": value for stage, value in result.get("seconds", {}).items()}
    pairs = {"pairs re-ranked": result["pairs_reranked"]} if result.get("pairs_reranked") else {}
    return (
        facts(_flat(made | first))
        + _closed("Every choice behind the numbers", _flat(protocol))
        + _closed("Versions and time", _flat(versions | pairs | spent))
    )


def facts(named: Mapping[str, str]) -> str:
    """A list of names and values."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in named.items())
    return f"<dl>{rows}</dl>" if rows else ""


def _closed(title: str, named: Mapping[str, str]) -> str:
    return f"<details><summary>{escape(title)}</summary>{facts(named)}</details>" if named else ""


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested mappings as `name, inner`; underscores as blanks."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        said = f"{above}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            found |= _flat(value, f"{said}, ")
        else:
            found[said] = _words(value)
    return found


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
