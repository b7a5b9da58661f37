"""Whether verl sees our objectives.

A fresh process is asked, since verl hides the errors of plug-ins. Imports no verl.
"""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import takewhile

from rlad.engines.verl.objective import NAMES
from rlad.findings import Finding

OLDEST = "0.9.1"
BELOW = "0.10"
_TIMEOUT_SECONDS = 600
_SCRIPT = """
import importlib, json
import verl
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
seen = {name: function.__module__ for name, function in DISTILLATION_LOSS_REGISTRY.items()}
error = ""
try:
    importlib.import_module("rlad.engines.verl.plugin")
except Exception as problem:
    error = f"{type(problem).__name__}: {problem}"
print("\\n" + json.dumps({"seen": seen, "error": error}))
"""


def verl_version_problem() -> str | None:
    """Return one sentence when verl is missing, or not of the version that the plug-in needs."""
    wanted = (
        f"pip install 'verl>={OLDEST},<{BELOW}' into an environment of its own, together with rlad "
        "(see docs/verl.md)"
    )
    try:
        found = version("verl")
    except PackageNotFoundError:
        return f"verl is not installed in this environment; {wanted}."
    if _numbers(OLDEST) <= _numbers(found) < _numbers(BELOW):
        return None
    return f"verl {found} is installed, but the plug-in needs >={OLDEST},<{BELOW}; {wanted}."


def check_verl() -> list[Finding]:
    """Ask a fresh process that imports verl whether it knows our objectives by their names.

    Takes seconds; starts no Ray.
    """
    problem = verl_version_problem() or _problem_of_a_fresh_process()
    if problem:
        return [Finding("error", "verl", problem)]
    return [Finding("ok", "verl", f"verl {version('verl')} knows {', '.join(NAMES)}")]


def _problem_of_a_fresh_process() -> str | None:
    command = [sys.executable, "-c", _SCRIPT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"importing verl took over {_TIMEOUT_SECONDS} s; try `python -c 'import verl'`."
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"verl cannot be imported ({last}); fix its installation."
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found["error"]:
        return f"rlad's plug-in does not load ({found['error']}); verl would continue without it."
    # A name may be registered by us, by another package, or not at all.
    modules = {name: found["seen"].get(name) for name in NAMES}
    foreign = {name: one for name, one in modules.items() if one != "rlad.engines.verl.plugin"}
    taken = [f"{name} (of {module})" for name, module in foreign.items() if module]
    if taken:
        return f"another plug-in has taken {', '.join(taken)}; remove it."
    if foreign:
        return (
            f"verl does not know {', '.join(foreign)}: install rlad with pip, so that verl finds "
            "its entry point, and leave VERL_USE_EXTERNAL_PLUGINS unset or let it name rlad."
        )
    return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: (0, 9, 1) of 0.9.1.dev2."""
    return tuple(int(part) for part in takewhile(str.isdigit, text.split(".")))
