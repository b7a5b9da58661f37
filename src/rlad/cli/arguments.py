"""Arguments and options that several commands share."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlad.errors import UserError

if TYPE_CHECKING:
    from rlad.config.run import RunConfig

CONFIG_ARGUMENTS = click.argument("arguments", nargs=-1, metavar="[RUN] [KEY=VALUE]...")
AT_LEAST_1 = click.IntRange(min=1)
NEW_FOLDER = click.Path(file_okay=False, path_type=Path)
JSON_OPTION = click.option("--json", "as_json", is_flag=True, help="Print as JSON.")


def load(arguments: Sequence[str]) -> "RunConfig":
    """Load the config that a command's arguments name, with its overrides."""
    from rlad.config.file import load_config

    path, overrides = path_and_overrides(arguments)
    # A user's own verifier is a module in the working directory or next to the config. These
    # folders come last, so that such a module hides no package.
    sys.path += ["", *([str(Path(path).absolute().parent)] if path else [])]
    return load_config(path, overrides)


def path_and_overrides(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split arguments into the path of a config and overrides."""
    overrides = [a for a in arguments if "=" in a and not os.path.exists(a)]
    paths = [a for a in arguments if a not in overrides]
    if len(paths) > 1:
        raise UserError(
            f"got {len(paths)} configs, {', '.join(paths)}; give one, and overrides of the form "
            "key.path=value."
        )
    return (paths[0] if paths else None), overrides
