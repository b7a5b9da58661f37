"""Check whether verl sees our objectives.

The check runs in a new process, since verl hides the errors of plug-ins. Imports no verl.
"""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from rlad.engines.verl.objective import NAMES
from rlad.findings import Finding

VERSIONS = ">=0.9.1,<0.10"
_TIMEOUT_SECONDS = 600
_PLUGIN = "rlad.engines.verl.plugin"
# verl's own registry is read before the plug-in is imported; the import shows why it did not load.
_SCRIPT = f"""
import json
from verl.trainer.distillation.losses import DISTILLATION_LOSS_REGISTRY
seen = {{name: function.__module__ for name, function in DISTILLATION_LOSS_REGISTRY.items()}}
import {_PLUGIN}
print("\\n" + json.dumps(seen))
"""


def verl_version_problem() -> str | None:
    """Return a sentence if verl is missing, or is not a version that the plug-in supports."""
    wanted = (
        f"pip install 'verl{VERSIONS}' into an environment of its own, together with rlad (see "
        "docs/verl.md)"
    )
    try:
        found = version("verl")
    except PackageNotFoundError:
        return f"verl is not installed in this environment; {wanted}."
    if SpecifierSet(VERSIONS).contains(found, prereleases=True):
        return None
    return f"verl {found} is installed, but the plug-in needs {VERSIONS}; {wanted}."


def check_verl() -> list[Finding]:
    """Check in a new process that imports verl whether it knows our objectives by name.

    This takes seconds and does not start Ray.
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
        return f"verl with rlad's plug-in cannot be imported ({last}); fix its installation."
    # A name may be registered by us, by another package, or not at all.
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    missing = [name for name in NAMES if name not in seen]
    taken = [f"{name} (of {seen[name]})" for name in NAMES if seen.get(name, _PLUGIN) != _PLUGIN]
    if taken:
        return f"another plug-in has taken {', '.join(taken)}; remove it."
    if missing:
        return (
            f"verl does not know {', '.join(missing)}: install rlad with pip, so that verl finds "
            "its entry point, and leave VERL_USE_EXTERNAL_PLUGINS unset or let it name rlad."
        )
    return None
