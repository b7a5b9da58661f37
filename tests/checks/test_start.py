"""`rlad init`: what it writes is a run that loads, fits and says where its values come from."""

import tomllib
from pathlib import Path

import pytest

from rlad.checks.devices import DEVICES, Device, estimate_hours
from rlad.checks.start import TASKS, plan_start
from rlad.config.file import load_config, parse_config
from rlad.errors import UserError
from rlad.models.known import FAMILIES, MODELS
from rlad.models.sizes import num_parameters

ROOT = Path(__file__).parents[2]
STUDENTS = {
    "Qwen3": "Qwen/Qwen3-0.6B",
    "Llama 3": "meta-llama/Llama-3.2-1B-Instruct",
    "Gemma 3": "google/gemma-3-270m-it",
    "SmolLM2": "HuggingFaceTB/SmolLM2-135M",
}
# As the models' cards and files count them.
PARAMETERS = {
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-it": 999_885_952,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_number_of_weights(name, tmp_path):
    assert num_parameters(MODELS[name].write_config(tmp_path)) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("family", "task"),
    [("SmolLM2", task) for task in TASKS] + [(family, "gsm8k") for family in FAMILIES],
)
def test_the_file_loads_and_is_what_was_planned(family, task, tmp_path):
    start = plan_start(STUDENTS[family], None, task, "h100", "run.toml")
    path = tmp_path / "run.toml"
    path.write_text(start.text)

    config = load_config(path)
    assert config == start.config
    assert config.student.model == STUDENTS[family]
    assert config.teacher is not None and config.teacher.title == FAMILIES[family].teacher
    assert start.needed_gib < 0.9 * 80 and start.hours in start.text


def test_every_value_that_is_marked_as_the_papers_is_in_a_paper_recipe():
    start = plan_start("Qwen/Qwen3-0.6B", None, "knights_and_knaves", "h100", "run.toml")
    recipe = tomllib.loads((ROOT / "recipes/paper/kk-qwen3-0.6b-8k/run.toml").read_text())
    recipe["rollout"]["max_completion_tokens"] = 2048  # of the recipe's second command
    table = tomllib.loads(start.text)
    section, found = {}, []
    for line in start.text.splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line.partition("# ")[2].startswith("paper"):
            key = line.partition("=")[0].strip()
            found.append(key)
            assert table[section][key] == recipe[section][key], key
    assert {"alpha", "clip_low", "clip_high", "learning_rate", "group_size"} <= set(found)


def test_a_small_gpu_gets_what_fits_and_one_that_is_too_small_is_refused():
    large = plan_start("Qwen/Qwen3-0.6B", None, "gsm8k", "h200", "run.toml").config
    small = plan_start("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", "gsm8k", "l4", "run.toml")
    assert small.needed_gib < 0.9 * 24
    assert small.config.student.gradient_checkpointing
    assert small.config.rollout.max_batch_rows < large.rollout.max_batch_rows

    lora = plan_start("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "gsm8k", "l40s", "run.toml").config
    assert lora.student.lora is not None and lora.optimization.learning_rate == 1e-5

    with pytest.raises(UserError, match=r"needs at least \d+ GiB, and one L4 has 24"):
        plan_start("Qwen/Qwen3-0.6B", "Qwen/Qwen3-32B", "gsm8k", "l4", "run.toml")


def test_another_tokenizer_and_an_unknown_name_are_one_sentence():
    with pytest.raises(UserError, match=r"^google/gemma-3-4b-it has the tokenizer of Gemma 3"):
        plan_start("Qwen/Qwen3-0.6B", "google/gemma-3-4b-it", "gsm8k", "h100", "run.toml")
    with pytest.raises(UserError, match=r"did you mean 'Qwen/Qwen3-0\.6B'\?"):
        plan_start("Qwen/Qwen3-0.6", None, "gsm8k", "h100", "run.toml")


def test_a_base_student_ends_as_its_chat_teacher_does():
    start = plan_start("meta-llama/Llama-3.2-1B", None, "gsm8k", "h100", "run.toml")
    assert start.config.student.end_tokens == ("<|eot_id|>",)
    assert start.config.rollout.system_prompt is None  # it has no chat template


def test_hours_are_the_arithmetic_that_the_file_names():
    """One row that is decoded at once, and no evaluation: by hand."""
    device = Device("test", memory=80, teraflops=1e-12 / 0.35, gigabytes_per_second=2e-9)
    model = MODELS["Qwen/Qwen3-0.6B"]
    config = parse_config(
        {
            "student": {"model": model.name},
            "teacher": {"model": model.name},
            "task": {"type": "knights_and_knaves"},
            "rollout": {"prompts_per_batch": 1, "group_size": 2, "max_completion_tokens": 10}
            | {"max_batch_rows": 2},
            "optimization": {"num_steps": 1},
            "evaluation": {"num_test_problems": 2},
        }
    )
    # A mean row of 5 + 3 / 2 tokens of cache, 1 row on average, 4 bytes a weight, 1 byte a second.
    cache = (3 + 5 / 2) * 4 * 28 * 1024
    decoding = 10 * (4 * 100 + cache)
    # 2 rollouts of 3 + 5 tokens; 6 FLOP a weight of the student and 2 of the teacher, 1 a second.
    update = 2 * 8 * (6 * 100 + 2 * 50)
    expected = (decoding + update + 2 * decoding) / 3600
    hours = estimate_hours(config, device, (model, 100), (model, 50), 3, with_vllm=False)
    assert hours == pytest.approx(expected)
    assert set(DEVICES) >= {"h100", "a100", "l4"}
