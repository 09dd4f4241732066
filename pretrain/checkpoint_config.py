"""What a run says about its checkpoints: how often, which stay, and how they are written. No torch here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen


class CheckpointConfig(Frozen):
    """A checkpoint every so many steps (null: at the end alone), of which the last `keep` stay.

    Beside those stay, for ever, every one whose step is a multiple of `keep_every`, and the one best by `keep_best`,
    the name of a number in the log or of an evaluation (such as `loss`), `best` telling whether `lowest` or `highest`
    is good. `background` copies the state to memory at the step's edge and writes it while training goes on; without
    it training waits, and needs no memory for a copy. `write_mb_s` is the most that one rank writes in a second, in
    MB, where others share the disk.
    """

    every_steps: int | None = Field(None, ge=1)
    keep: int = Field(2, ge=1)
    keep_every: int | None = Field(None, ge=1)
    keep_best: str | None = None
    best: Literal["lowest", "highest"] = "highest"
    background: bool = True
    write_mb_s: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _kept_ones_are_written(self) -> Self:
        if self.keep_every and self.every_steps and self.keep_every % self.every_steps:
            near = self.every_steps * max(1, round(self.keep_every / self.every_steps))
            raise ValueError(
                f"checkpoint.keep_every is {self.keep_every}, but checkpoints come every {self.every_steps} steps, so "
                f"most of those would never be written. Use {near}."
            )
        return self
