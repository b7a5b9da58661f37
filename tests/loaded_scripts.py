"""Scripts of recipes, benchmarks and examples as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_script(path: Path) -> ModuleType:
    """Import a script by its path, under a name that nothing else has."""
    name = f"script of {path.parent.name}: {path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its data classes look for it there
    spec.loader.exec_module(module)
    return module
