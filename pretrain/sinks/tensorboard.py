"""TensorBoard: every number of every line as a curve, in the run folder's tensorboard/."""

from pathlib import Path

from pretrain.sinks import Line, flatten


class TensorBoard:
    """Writes events; a resumed run hides what an earlier one wrote beyond its step."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start or None)

    def advance(self, step: int) -> None:
        """Nothing: a line is written when there is one."""

    def write(self, line: Line) -> None:
        """A point on every curve."""
        for name, value in flatten(line).items():
            self.writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
