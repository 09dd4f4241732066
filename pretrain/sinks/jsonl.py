"""log.jsonl: every line of a run, to be read by anything; the truth that plots are drawn from."""

import json
from pathlib import Path

from configs.files import disk_errors, write_whole
from pretrain.sinks import Line

NAME = "log.jsonl"


class Jsonl:
    """Appends to log.jsonl, after the lines of the steps that will be taken again are gone."""

    def __init__(self, folder: Path, start: int) -> None:
        self.path = folder / NAME
        drop_after(self.path, start)
        self.file = self.path.open("a", encoding="utf-8")

    def advance(self, step: int) -> None:
        """Nothing: a line is written when there is one."""

    def write(self, line: Line) -> None:
        """One line, on the disk's way at once."""
        with disk_errors(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def read_log(folder: Path) -> list[Line]:
    """The lines of a run's log.jsonl; a last line that a crash cut short is left out."""
    path = folder / NAME
    lines: list[Line] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of steps beyond `step`, which a resumed run takes again."""
    if path.is_file():
        kept = [line for line in read_log(path.parent) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
