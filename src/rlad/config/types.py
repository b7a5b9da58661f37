"""The building blocks of config sections: strict numbers, and settings that change with the step.
Imports no torch."""

import os
from collections.abc import Collection, Iterator
from enum import Enum
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from rlad.errors import UserError

# Strict: 1 is accepted as a float, but "1", true and 1.0 are refused as an int.
Number = Annotated[float, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
NonNegative = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]
LearningRate = Annotated[float, Field(strict=True, gt=0, le=1)]
Count = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]

Support = Literal["sampled", "student_top_k", "teacher_top_k", "full"]
"""The tokens of the vocabulary whose probabilities a teacher gives: the sampled one, the K most
likely under student or teacher, or all."""


def _location(text: str) -> str:
    longest = max(text.split("/"), key=len)
    if len(longest.encode()) > 255 or "\0" in text:
        raise UserError(
            f"{longest[:40]!r}... is longer than the 255 bytes that a file's name may have, or "
            "holds a NUL character; give another name"
        )
    return os.path.expanduser(text)


Location = Annotated[str, Field(min_length=1), AfterValidator(_location)]
"""A path or the name of a model. `~` is expanded to the home folder, which no shell does here."""


class Mark(Enum):
    """What changing a setting does to the numbers of a run. A setting without a mark may change all
    of them."""

    NO_NUMBER = "none: where things are, how they are reached, when a failing run stops"
    ROUNDING = "their rounding alone: devices, and how much is computed at once"
    LENGTH = "how many there are"
    BUDGET = "all of them, and all methods of a comparison share it"


class Section(BaseModel):
    """A table of a config file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each conflict between settings that are valid by themselves."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if problem := next(self.problems(), None):
            raise UserError(problem)
        return self

    @property
    def children(self) -> "dict[str, Section]":
        """The sections directly inside this one, by dotted key."""
        found: dict[str, Any] = {}
        for key, value in self:
            if isinstance(value, dict):
                found |= {f"{key}.{name}": one for name, one in value.items()}
            else:
                found[key] = value
        return {key: one for key, one in found.items() if isinstance(one, Section)}

    def walk(self) -> "Iterator[Section]":
        """Yield this section and all sections inside it, at any depth."""
        yield self
        for child in self.children.values():
            yield from child.walk()

    def dump(self, *, without: Collection[Mark] = ()) -> dict[str, Any]:
        """Return the settings as plain values for JSON, without those with one of these marks."""
        table = self.model_dump(mode="json")
        for key, child in self.children.items():
            *parents, last = key.split(".", 1)
            parent = table[parents[0]] if parents else table
            parent[last] = child.dump(without=without)
        for key in type(self).keys_with(*without):
            del table[key]
        return table

    @classmethod
    def keys_with(cls, *marks: Mark) -> list[str]:
        """Return the names of the settings with one of these marks."""
        fields = cls.model_fields.items()
        return [key for key, field in fields if any(mark in field.metadata for mark in marks)]


def sections_in(annotation: Any) -> list[type[Section]]:
    """Return the sections that a setting of this type may hold, directly or by name."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


class Annealed(Section):
    """A setting that changes with the step: start + change_per_step * step, until `end`."""

    start: Number
    end: Number
    change_per_step: Number

    def problems(self) -> Iterator[str]:
        change = self.change_per_step
        if change == 0 or self.end == self.start or (self.end > self.start) != (change > 0):
            yield (
                f"change_per_step {change} does not lead from start {self.start} to end {self.end}"
            )

    def at(self, step: int) -> float:
        value = self.start + self.change_per_step * step
        return max(value, self.end) if self.end < self.start else min(value, self.end)


def at_step(knob: Any, step: int) -> Any:
    """Return the value at a step of a setting that may be annealed."""
    return knob.at(step) if isinstance(knob, Annealed) else knob


class AnnealedShare(Annealed):
    """An annealed setting from 0 to 1."""

    start: Share
    end: Share


class AnnealedNonNegative(Annealed):
    """An annealed setting that is never below 0."""

    start: NonNegative
    end: NonNegative
