"""`rlad init`: the first config of a run, with estimates of its memory and time."""

import re
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from rlad.cli.printing import print_line, print_table
from rlad.errors import RunFailedError, UserError
from rlad.models.known import FAMILIES, MODELS, known_pair

_MODULES = {"quantization": "torchao"}
"""modules of extras whose names differ"""


def write_start(
    *, student: str, teacher: str | None, task: str, gpu: str, output: Path, overwrite: bool
) -> None:
    """Write the config, and print the estimated memory and time of the run."""
    if output.exists() and not overwrite:
        raise UserError(
            f"--output {output} exists already; give another file, or --overwrite to replace it."
        )
    known_pair(student, teacher)  # before the next import, which takes seconds
    console = Console(highlight=False)
    with Console(stderr=True).status("counting the models' weights"):
        from rlad.checks.start import plan_start

        start = plan_start(student, teacher, task, gpu, str(output))
    try:
        output.write_text(start.text, encoding="utf-8")
    except OSError as error:
        raise RunFailedError(
            f"{output} cannot be written ({error.strerror}); give another --output."
        ) from None
    device = start.device
    print_line(console, f"wrote {output}: its comments say where each value comes from\n")
    rows = [
        ("GPU memory", f"about {start.needed_gib:.0f} of {device.memory:.0f} GiB ({device.title})"),
        ("time", f"about {start.hours}; with vLLM {start.hours_with_vllm}"),
        ("based on", "the models' shapes and the GPU's data sheet; not measured"),
    ]
    print_table(console, rows)
    print_line(console, "")
    for found in re.finditer(r"needs pip install 'rlad\[([\w-]+)\]'", start.text):
        extra = found[1]
        module = _MODULES.get(extra, extra.replace("-", "_"))
        if find_spec(module) is None:
            print_line(console, f"pip install 'rlad[{extra}]'   # not installed yet")
    print_line(console, f"rlad check {output}   # tokenizers, prompts, memory, a measured step")
    print_line(console, f"rlad train {output}")


def print_known_models() -> None:
    """Print the models that `rlad init` knows, by family."""
    console = Console(highlight=False)
    for tokenizer, family in FAMILIES.items():
        print_line(console, f"{tokenizer} (teacher by default {family.teacher})", "bold")
        for name, model in MODELS.items():
            if model.tokenizer == tokenizer:
                print_line(console, f"  {name}")
