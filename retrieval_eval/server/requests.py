"""What a request says, taken from its address and checked: nothing reaches the index that was not looked at here."""

from dataclasses import dataclass
from urllib.parse import parse_qsl

from starlette.requests import Request

from retrieval_eval.server.limits import Limits
from retrieval_eval.server.refusals import Refused


@dataclass(frozen=True)
class Page:
    """Which hits are asked for: the `number`-th page, from 1, of `size`."""

    number: int
    size: int

    @property
    def first(self) -> int:
        """How many hits stand before it."""
        return (self.number - 1) * self.size

    @property
    def last(self) -> int:
        """How many hits there are up to its end."""
        return self.number * self.size


def parameters(request: Request, *allowed: str) -> dict[str, str]:
    """The query string as names and values; Refused (400) for one that is unknown, doubled, or not UTF-8."""
    raw = request.scope["query_string"]
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=16)
    except UnicodeDecodeError:
        raise Refused(400, "not_utf8", "The query string is not UTF-8, percent-encoded.") from None
    except ValueError:
        raise Refused(400, "too_many_parameters", "The query string has too many parameters.") from None
    found: dict[str, str] = {}
    for name, value in pairs:
        if name not in allowed:
            shown = ", ".join(allowed) or "none"
            raise Refused(400, "unknown_parameter", f"There is no parameter {name[:40]!r} here; there are: {shown}.")
        if name in found:
            raise Refused(400, "doubled_parameter", f"The parameter {name!r} is given twice.")
        found[name] = value
    return found


def text_query(text: str, limits: Limits) -> str:
    """A sentence to search by; Refused (422) where it is empty or too long."""
    if not text.strip():
        raise Refused(422, "empty_query", "The query is empty: give a sentence.")
    if len(text) > limits.query_characters:
        reason = f"The query has {len(text)} characters; at most {limits.query_characters} are read."
        raise Refused(422, "query_too_long", reason)
    return text


def page_of(given: dict[str, str], limits: Limits) -> Page:
    """`page` and `per_page`; Refused where they are no numbers (400) or out of bounds (422)."""
    size = _number(given.get("per_page", str(limits.per_page)), "per_page", limits.most_per_page)
    number = _number(given.get("page", "1"), "page", limits.deepest // size)
    return Page(number, size)


def _number(value: str, name: str, most: int) -> int:
    if not (value.isascii() and value.isdigit()) or len(value) > 9:
        raise Refused(400, "not_a_number", f"{name} is {value[:20]!r}: give a whole number from 1 to {most}.")
    if not 1 <= int(value) <= most:
        raise Refused(422, "out_of_bounds", f"{name} is {int(value)}: give 1 to {most}.")
    return int(value)
