"""The `[engine]` section. Imports no torch."""

from typing import Literal

from rlad.config.types import Section


class EngineConfig(Section):
    """What makes the optimiser steps."""

    type: Literal["native", "trl"] = "native"
    """our own loop for one device; `trl` is refused for now"""
