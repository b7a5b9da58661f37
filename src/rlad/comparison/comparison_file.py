"""`comparison.json`: how `rlad compare` names the runs below it, for `rlad report`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rlad.errors import UserError

COMPARISON = "comparison.json"


class ComparisonFile(BaseModel):
    """The names of a comparison's methods, how they were tuned, and what they are compared with."""

    model_config = ConfigDict(strict=True, frozen=True, use_attribute_docstrings=True)

    methods: dict[str, str]
    """folder below `runs` -> name of the method, in the order of the report"""
    notes: Sequence[str] = ()
    """how a search on the validation split chose the learning rates; empty when there was none"""
    baseline: str | None = None


def write_comparison_file(
    root: Path, methods: Mapping[str, str], notes: Sequence[str], baseline: str | None
) -> None:
    """Write `root/comparison.json` at once, whole. `methods`: folder below `root/runs` -> name of
    the method.

    Raises `UserError` when it cannot be written.
    """
    content = ComparisonFile(methods=dict(methods), notes=list(notes), baseline=baseline)
    aside = root / f".{COMPARISON}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        aside.write_text(content.model_dump_json(indent=2), encoding="utf-8")
        os.replace(aside, root / COMPARISON)
    except OSError as error:
        raise UserError(
            f"{root / COMPARISON} cannot be written ({error.strerror}); choose another folder."
        ) from None


def read_comparison_file(root: Path) -> ComparisonFile | None:
    """Read `root/comparison.json`; None when there is no such file. `UserError` when it cannot be
    read."""
    path = root / COMPARISON
    try:
        return ComparisonFile.model_validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValidationError):
        raise UserError(
            f"{path} cannot be read as what a comparison writes; let `rlad compare` write it "
            "again, or delete it, and methods get the names of their folders."
        ) from None
