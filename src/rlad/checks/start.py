"""Make a first config for a student, a teacher, a task and a GPU: what `rlad init` writes.

The values are those of the paper recipes if the paper states them. Memory is counted from the
models' shapes; nothing is downloaded.
"""

import shlex
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from rlad.checks.devices import DEVICES, Device, estimate_hours
from rlad.checks.memory import MemoryEstimate, estimate_memory
from rlad.config.file import parse_config
from rlad.config.run import RunConfig
from rlad.errors import UserError
from rlad.models.known import KnownModel, known_pair
from rlad.models.sizes import num_parameters

_GIB = 1024**3
_PROMPT_TOKENS = 512
_MOST_OF_MEMORY = 0.9
"""Share of the GPU's memory that a run may take by the estimate."""


@dataclass(frozen=True, slots=True)
class StartTask:
    """A task of a first config."""

    title: str
    toml: str
    max_completion_tokens: int
    length_from: str = "ours"
    asks_for_a_box: bool = False


TASKS = {
    "gsm8k": StartTask(
        "GSM8K (its training set from the hub, tested on its test set)",
        "type = \"jsonl\"                       # needs pip install 'rlad[datasets]'\n"
        'path = "openai/gsm8k:main"           # fetched from the hub when the run begins\n'
        'test_path = "openai/gsm8k:main"      # its own test set\n'
        'prompt_field = "question"\n'
        'answer_field = "answer"\n'
        'answer_format = "gsm8k"              # what follows ####\n'
        'verifier = "number"\n',
        1024,
        asks_for_a_box=True,
    ),
    "knights_and_knaves": StartTask(
        "knights and knaves",
        'type = "knights_and_knaves"          # ours: our generator, the paper\'s kind of puzzle\n'
        "num_people = [2, 3, 4, 5, 6, 7, 8]   # paper\n"
        'reward = "exact"                     # ours\n',
        2048,
        "paper (2K; it has 8K too)",
    ),
    "countdown": StartTask(
        "countdown",
        "type = \"countdown\"                   # needs pip install 'rlad[reasoning-gym]'\n",
        1024,
    ),
    "arithmetic": StartTask(
        "sums and differences",
        "type = \"arithmetic\"                  # needs pip install 'rlad[reasoning-gym]'\n",
        512,
    ),
    "jsonl": StartTask(
        "your own problems",
        'type = "jsonl"\n'
        'path = "problems.jsonl"              # {"prompt": ..., "answer": ...} on each line\n'
        'verifier = "math"                    # or exact, number, my_module:my_function\n',
        2048,
    ),
}


@dataclass(frozen=True, slots=True)
class Choice:
    """The settings that are given up, step by step, until the run fits into memory."""

    rows: int
    checkpointing: bool = False
    keep_cpu: bool = False
    lora: bool = False
    int8: bool = False


_WAYS = (
    Choice(0),
    Choice(0, checkpointing=True),
    Choice(0, checkpointing=True, keep_cpu=True),
    Choice(0, checkpointing=True, lora=True),
    Choice(0, checkpointing=True, lora=True, keep_cpu=True),
    Choice(0, checkpointing=True, lora=True, keep_cpu=True, int8=True),
)
"""From the fastest to the smallest."""


def _choices() -> Iterator[Choice]:
    """Yield all choices with enough rows first, then those that decode few rows at once."""
    for rows_of_all in ((256, 128, 64, 32), (16, 8)):
        for way in _WAYS:
            for rows in rows_of_all:
                yield replace(way, rows=rows)


@dataclass(frozen=True, slots=True)
class Start:
    """A first config: its text, and the estimates for the run."""

    text: str
    config: RunConfig
    needed_gib: float
    device: Device
    hours: str
    hours_with_vllm: str


def plan_start(student: str, teacher: str | None, task: str, gpu: str, file: str) -> Start:
    """Choose the settings of a run that fits on a GPU.

    Raises `UserError` for unknown names, different tokenizers, and models that do not fit at all.
    """
    learner, guide = known_pair(student, teacher)
    device = DEVICES[gpu]
    problems = TASKS[task]
    command = ["rlad", "init", "--student", student, "--teacher", guide.name]
    values = {
        "student": learner,
        "teacher": guide,
        "task": problems,
        "device": device,
        "file": file,
        "command": shlex.join([*command, "--task", task, "--gpu", gpu]),
        "end_token": guide.family.end_token if guide.is_chat and not learner.is_chat else "",
        "pad": lambda token: " " * max(0, 16 - len(token)),
        "system_prompt": problems.asks_for_a_box and learner.has_chat_template,
        "pause": learner.family.pause if learner.is_chat else "",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folders = {m.name: m.write_config(_new(scratch, m)) for m in (learner, guide)}
        sizes = {name: num_parameters(folder) for name, folder in folders.items()}
        smallest: dict[Choice, float] = {}  # by way, with one row
        for choice in _choices():
            way = replace(choice, rows=1)
            if way not in smallest:
                smallest[way] = _peak(_estimate(values, way, folders)[1], way) / _GIB
            if smallest[way] > _MOST_OF_MEMORY * device.memory:
                continue
            config, needed = _estimate(values, choice, folders)
            total = _peak(needed, choice) / _GIB
            if total <= _MOST_OF_MEMORY * device.memory:
                break
        else:
            least = min(smallest.values())
            raise UserError(
                f"{learner.name} with teacher {guide.name} needs at least {least:.0f} GiB, and "
                f"one {device.title} has {device.memory:.0f}; use a smaller student or teacher, "
                "another --gpu, or several GPUs (docs/scaling.md)."
            )
    chosen = values | asdict(choice) | _learning_rate(learner, choice)
    own = (learner, sizes[learner.name])
    other = (guide, sizes[guide.name])

    def hours(with_vllm: bool) -> str:
        found = estimate_hours(config, device, own, other, _PROMPT_TOKENS, with_vllm=with_vllm)
        return _range(found)

    text = _render(
        chosen,
        needed=total,
        parts=_parts(needed),
        hours=hours(False),
        hours_vllm=hours(True),
    )
    return Start(text, config, total, device, hours(False), hours(True))


def _learning_rate(student: KnownModel, choice: Choice) -> dict[str, str]:
    if choice.lora:
        return {"rate": "1e-5", "rate_from": "ours: an adapter takes larger steps"}
    if student.tokenizer == "SmolLM2":
        return {"rate": "1e-5", "rate_from": "ours, measured with SmolLM2-135M on sums"}
    return {"rate": "1e-6", "rate_from": "paper"}


def _new(scratch: str, model: KnownModel) -> Path:
    return Path(scratch, model.name.replace("/", "-"))


def _estimate(
    values: dict[str, Any], choice: Choice, folders: dict[str, str]
) -> tuple[RunConfig, MemoryEstimate]:
    """Draft a config, and count the memory of its run on one device from the shapes in
    `folders`."""
    chosen = values | asdict(choice) | _learning_rate(values["student"], choice)
    draft = _render(chosen, needed=0.0, parts="", hours="", hours_vllm="")
    config = parse_config(tomllib.loads(draft))
    table = config.model_dump(mode="json", exclude_none=True)
    # The adapter is counted here, since PEFT, which could count it, is an optional package.
    lora = table["student"].pop("lora", None)
    for section in ("student", "teacher"):
        table[section]["model"] = folders[table[section]["model"]]
        table[section]["device"] = "cpu"
    needed = estimate_memory(parse_config(table), _PROMPT_TOKENS, device="cpu")
    if lora:
        num_trained = lora["rank"] * values["student"].widths_of_linear_layers
        needed = replace(
            needed,
            student_weights=4 * num_trained + needed.student_weights // 2,
            gradients_and_optimizer=12 * num_trained,
        )
    return config, needed


def _peak(needed: MemoryEstimate, choice: Choice) -> float:
    """Count the bytes at the peak. A teacher that is kept on the CPU is on the GPU only while the
    rollouts' cache is not."""
    unused = min(needed.teacher_weights, needed.sampler_cache) if choice.keep_cpu else 0
    return needed.total - unused


def _parts(needed: MemoryEstimate) -> str:
    parts = {
        "student, gradients, AdamW": needed.student_weights + needed.gradients_and_optimizer,
        "teacher": needed.teacher_weights,
        "rollouts' cache": needed.sampler_cache,
        "activations and logits": needed.activations + needed.logits,
    }
    return ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts.items())


def _range(hours: float) -> str:
    """Write a range from half to double, since the estimate is not more precise."""
    return f"{hours / 2:.1f} to {hours * 2:.1f} hours"


def _render(values: Mapping[str, Any], **estimates: object) -> str:
    environment = Environment(
        loader=PackageLoader("rlad.checks"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("run.toml.j2").render(**values, **estimates)
