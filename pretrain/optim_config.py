"""The optimizer and its schedule as a value: rates, what they are relative to, decay, warm-up. No torch here."""

from typing import Literal, Self

from pydantic import Field, model_validator

from configs.loader import Frozen


class ModuleConfig(Frozen):
    """What one module's parameters take instead of the run's: base rates (scaled as the run's are) and weight decay."""

    lr: float | None = Field(None, gt=0)
    muon_lr: float | None = Field(None, gt=0)
    weight_decay: float | None = Field(None, ge=0)


class OptimConfig(Frozen):
    """Optimizer and schedule. `muon_lr` is the base rate of block matrices where `method` is muon.

    With `lr_base_batch` the rates (`lr`, `min_lr`, `muon_lr`, those of `modules`) are those of a global batch of so
    many samples and grow in proportion with `data.batch`; null takes them as they are. The schedule multiplies every
    base rate by one factor: a linear warm-up of so many steps, samples or epochs (give one), then a cosine that ends
    at `min_lr / lr`. `modules` maps a module's name, such as text_encoder or vision_encoder.layers.0, to rates of its
    own; the longest name that fits wins. `layer_decay` multiplies a layer's rates once for every layer above it,
    embeddings lowest, heads and final norms not at all (0.75 is usual for fine-tuning).

    `decay` says what weight decay reaches: `weights` spares A_log, cls and every table of positions; `released` spares
    what the release's code spares, which decays A_log, and in stage 2 all the others too. `ema_decay` keeps an average
    of the weights beside them, of which a step changes the share 1 - ema_decay.
    """

    method: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(1.5e-4, gt=0)
    min_lr: float = Field(0.0, ge=0)
    muon_lr: float = Field(0.02, gt=0)
    lr_base_batch: int | None = Field(None, ge=1)
    modules: dict[str, ModuleConfig] = {}
    layer_decay: float | None = Field(None, gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    momentum: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.05, ge=0)
    decay: Literal["weights", "released"] = "weights"
    warmup_steps: int = Field(0, ge=0)
    warmup_samples: int | None = Field(None, ge=1)
    warmup_epochs: float | None = Field(None, gt=0)
    clip_norm: float | None = Field(None, gt=0)
    ema_decay: float | None = Field(None, gt=0, lt=1)

    def scale(self, batch: int) -> float:
        """What every base rate is multiplied by for a global batch of so many samples."""
        return 1.0 if self.lr_base_batch is None else batch / self.lr_base_batch

    @model_validator(mode="after")
    def _floor_below_base(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}. Lower min_lr, or leave it out for 0.")
        return self

    @model_validator(mode="after")
    def _one_warmup(self) -> Self:
        names = ("warmup_steps", "warmup_samples", "warmup_epochs")
        given = [name for name in names if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how long the warm-up is. Give one (null or 0 for none).")
        return self

    @model_validator(mode="after")
    def _muon_rates_have_a_muon(self) -> Self:
        unused = [name for name, module in self.modules.items() if module.muon_lr is not None]
        if unused and self.method != "muon":
            raise ValueError(
                f"modules.{unused[0]}.muon_lr is given, and method is {self.method}. Use method: muon, or give lr."
            )
        return self
