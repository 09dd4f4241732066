"""What a user asks of an import: what the weights shall become, and what shall differ from the file. Needs no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen

Target = Literal["stage1", "stage2", "classifier"]


class ImportConfig(Frozen):
    """The request. What is null is read from the file's shapes.

    `frames` and `image_size` resize the position tables (temporal linearly, spatial bicubically); an image model gets
    8 frames, or stays one where it is a classifier with its own head. `tubelet` gives a patch kernel of one frame so
    many: the frame in the middle (`inflate: center`) or a share each (`average`). `classes` puts a new head in place of
    the file's. `heads` are the text tower's, if not 64 wide each. `align_source` is `released` where the file's
    alignment decoder shall get what it was trained on.
    """

    target: Target
    frames: int | None = Field(None, ge=1)
    image_size: int | None = Field(None, ge=1)
    tubelet: int | None = Field(None, ge=1)
    inflate: Literal["center", "average"] = "center"
    classes: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    max_tokens: int = Field(32, ge=3)
    align_source: Literal["released", "output"] = "released"

    @model_validator(mode="after")
    def _a_head_is_a_classifiers(self) -> Self:
        if self.classes is not None and self.target != "classifier":
            raise ValueError(f"--classes makes a new head, and {self.target} has none. Use --as classifier.")
        return self
