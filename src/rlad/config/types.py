"""What the sections of a config are made of: strict numbers, knobs that move with the step. Imports
no torch."""

from collections.abc import Callable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rlad.errors import UserError

# Strict: 1 is a float, but "1", true and 1.0 are no int.
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]
Count = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Annealed(Section):
    """A knob that moves with the step: start + change_per_step * step, until it reaches `end`."""

    start: Number
    end: Number
    change_per_step: Number

    @model_validator(mode="after")
    def _moves_towards_end(self) -> "Annealed":
        if (
            self.change_per_step == 0
            or self.end == self.start
            or (self.end > self.start) != (self.change_per_step > 0)
        ):
            raise UserError(
                f"change_per_step {self.change_per_step} does not lead from start {self.start} to "
                f"end {self.end}"
            )
        return self

    def at(self, step: int) -> float:
        value = self.start + self.change_per_step * step
        return max(value, self.end) if self.end < self.start else min(value, self.end)


def _between(low: float, high: float) -> Callable[[Annealed], Annealed]:
    def check(knob: Annealed) -> Annealed:
        for name, value in (("start", knob.start), ("end", knob.end)):
            if not low <= value <= high:
                raise UserError(f"its {name} is {value}; it must lie in [{low:g}, {high:g}]")
        return knob

    return check


AnnealedShare = Annotated[Annealed, AfterValidator(_between(0, 1))]
AnnealedNonNegative = Annotated[Annealed, AfterValidator(_between(0, float("inf")))]
