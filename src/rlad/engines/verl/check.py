"""Does verl see our objectives? Asked in a fresh process, since verl hides the errors of plug-ins.
Imports no verl."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from rlad.engines.verl.objective import NAMES
from rlad.findings import Finding

OLDEST, BELOW = "0.9.1", "0.10"
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
    """One sentence when verl is missing or of a version that the plug-in was not written for."""
    wanted = f"pip install 'verl>={OLDEST},<{BELOW}' into an environment of its own, with rlad beside it (see docs/verl.md)"
    try:
        found = version("verl")
    except PackageNotFoundError:
        return f"verl is not installed beside rlad; {wanted}."
    if not _numbers(OLDEST) <= _numbers(found) < _numbers(BELOW):
        return f"verl {found} is installed, but the plug-in is written for >={OLDEST},<{BELOW}; {wanted}."
    return None


def check_verl() -> list[Finding]:
    """Whether a fresh process that imports verl knows our objectives by their names. Takes seconds;
    starts no Ray."""
    if problem := verl_version_problem():
        return [Finding("error", "verl", problem)]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [
            Finding(
                "error",
                "verl",
                f"importing verl took longer than {_TIMEOUT_SECONDS} s; try `python -c 'import "
                "verl'`.",
            )
        ]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return [
            Finding("error", "verl", f"verl cannot be imported ({last}); mend its installation.")
        ]
    return [_judge(json.loads(done.stdout.strip().splitlines()[-1]))]


def _judge(answer: dict) -> Finding:
    if answer["error"]:
        return Finding(
            "error",
            "verl",
            f"rlad's plug-in does not load ({answer['error']}); verl would go on without it.",
        )
    foreign = {
        name: answer["seen"].get(name)
        for name in NAMES
        if answer["seen"].get(name) != "rlad.engines.verl.plugin"
    }
    taken = [f"{name} (of {module})" for name, module in foreign.items() if module]
    if taken:
        return Finding("error", "verl", f"another plug-in has taken {', '.join(taken)}; remove it.")
    if foreign:
        return Finding(
            "error",
            "verl",
            f"verl does not know {', '.join(foreign)}: install rlad with pip, so that verl finds "
            "its entry point, and "
            "leave VERL_USE_EXTERNAL_PLUGINS unset or let it name rlad.",
        )
    return Finding("ok", "verl", f"verl {version('verl')} knows {', '.join(NAMES)}")


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 9, 1) of 0.9.1.dev2."""
    parts = []
    for part in text.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
