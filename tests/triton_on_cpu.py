"""Triton's interpreter in place of a compiler for the CPU, for programs with vLLM.

vLLM's newer model runner needs Triton, and its build for the CPU comes without a backend that
compiles for it. A backend that is only there, with `TRITON_INTERPRET=1`, lets the runner start: its
kernels run in Python, slowly and exactly.
"""

import os
from pathlib import Path

MODULE = """
from triton.backends.{module} import {base}

class CPU{base}({base}):
    is_active = staticmethod(lambda: True)

CPU{base}.__abstractmethods__ = frozenset()
"""


def environment_with_triton(folder: Path) -> dict[str, str]:
    """Write a package with the backend. Returns the environment of a program that is to use it."""
    package = folder / "triton_on_cpu"
    about = folder / "triton_on_cpu-1.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    for module, base in (("driver", "DriverBase"), ("compiler", "BaseBackend")):
        (package / f"{module}.py").write_text(MODULE.format(module=module, base=base))
    (package / "__init__.py").touch()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: triton_on_cpu\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[triton.backends]\ncpu = triton_on_cpu\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    return os.environ | chosen | {"PYTHONPATH": os.pathsep.join(paths)}
