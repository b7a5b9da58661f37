"""The objective for verl's processes, in the environment variable RLAD_OBJECTIVE that `rlad export
verl` writes.

verl's config of a distillation loss has no field for our settings. Ray passes the variable to every
worker of the run (`ray_kwargs.ray_init.runtime_env.env_vars`). Its value is the section
`[objective]` of a run's config as JSON, such as {"type": "trrd", "alpha": 0.5}; omitted settings
have their defaults. Imports no verl.
"""

import json
import os
from typing import Any

from rlad.config.capabilities import require_engine
from rlad.config.file import parse_objective
from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.errors import UserError

VARIABLE = "RLAD_OBJECTIVE"
NAMES = tuple(
    name
    for name, objective in OBJECTIVE_CONFIGS.items()
    if "verl" in objective.engines and objective.needs_teacher
)
"""The objectives that we register with verl. Its own `grpo` needs no teacher, and `topd` needs
whole groups at once."""


def objective_json(objective: Any) -> str:
    """Return the value of RLAD_OBJECTIVE for an objective's config."""
    return json.dumps(objective.model_dump(mode="json", exclude_none=True))


def objective_knobs_from_environment(name: str) -> dict[str, Any]:
    """Return the keyword arguments of objective `name` from RLAD_OBJECTIVE ("off" is None).

    Raises `UserError` if the variable is missing, cannot be read, or is for another objective.
    """
    try:
        section = json.loads(os.environ.get(VARIABLE, ""))
    except json.JSONDecodeError as error:
        raise UserError(
            f"the environment variable {VARIABLE} of this process is not JSON ({error}); start "
            "verl with the command of `rlad export verl`, or add "
            f'+ray_kwargs.ray_init.runtime_env.env_vars.{VARIABLE}=\'{{"type": "{name}"}}\' to '
            "yours."
        ) from None
    objective = parse_objective(section)
    if objective.type != name:
        raise UserError(
            f"{VARIABLE} describes objective {objective.type!r} but "
            f"distillation.distillation_loss.loss_mode is {name!r}; make them the same."
        )
    require_engine("verl", objective)
    return objective.knobs_at(step=0)
