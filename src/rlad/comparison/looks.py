"""Colour, line and marker of each method. They depend on its name, so that a method looks the same
in every report, at any position."""

import zlib
from collections.abc import Sequence
from typing import Any

from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.config.presets import PRESETS

Looks = dict[str, dict[str, Any]]
_KNOWN = (*OBJECTIVE_CONFIGS, *PRESETS)
_NUM_COLOURS = 10
_NUM_LOOKS = 40
"""Number of looks until colour, line and marker repeat together."""


def looks_of(names: Sequence[str]) -> Looks:
    """Choose the look of each method. If two would have the same colour, the alphabetically later
    name gets the next free one."""
    taken: set[int] = set()
    looks: Looks = {}
    # Objectives and presets first: a user's own name never changes the colour of a method.
    for name in sorted(names, key=lambda name: (name not in _KNOWN, name)):
        place = _preferred(name)
        free = [p % _NUM_LOOKS for p in range(place, place + _NUM_LOOKS)]
        colours = {one % _NUM_COLOURS for one in taken}
        best = [p for p in free if p % _NUM_COLOURS not in colours]
        chosen = [*best, *(p for p in free if p not in taken), place][0]
        taken.add(chosen)
        looks[name] = {
            "color": f"C{chosen % _NUM_COLOURS}",
            "linestyle": ("-", "--", "-.", ":")[chosen % 4],
            "marker": "osD^vPX*"[chosen % 8],
            "linewidth": 2,
        }
    return looks


def _preferred(name: str) -> int:
    if name in _KNOWN:
        return _KNOWN.index(name)
    return zlib.crc32(name.encode(errors="replace")) % _NUM_LOOKS
