"""One line of a check: what was checked, and the result."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check. An `error` makes training impossible, a `warning` makes it doubtful."""

    level: Literal["ok", "warning", "error"]
    subject: str
    message: str
