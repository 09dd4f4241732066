"""What the commands of this room share: a path that has to be there, and bars of progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from configs.errors import UserError

if TYPE_CHECKING:
    from retrieval_eval.embed import Tell


def must_exist(path: Path, what: str, cure: str) -> None:
    """Raise UserError, with this cure, where there is no such path."""
    if not path.exists():
        raise UserError(f"There is no {what} {path}.", cure)


@contextmanager
def progress(shown: bool = True) -> "Iterator[Tell]":
    """A bar a kind of work on a terminal, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        bars: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in bars or (progress.finished and done < total):
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=min(done, total), total=total)

        yield tell
