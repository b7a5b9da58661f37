"""Settings: defaults, ranges, overrides, and that a run's config reads back as it was."""

import math
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlad
from rlad.config.capabilities import TITLES, require_engine
from rlad.config.file import (
    changed_settings,
    dump_config,
    load_config,
    parse_config,
    parse_overrides,
)
from rlad.config.objective import OBJECTIVE_CONFIGS, TRRDConfig
from rlad.config.run import RunConfig
from rlad.config.teacher import single_teachers
from rlad.config.types import Annealed, Mark
from rlad.errors import UserError

MODELS = {"student": {"model": "s"}, "teacher": {"model": "t"}}
BASE: dict[str, Any] = MODELS | {"task": {"type": "knights_and_knaves"}}


def changed(*overrides: str, base: dict[str, Any] = BASE) -> RunConfig:
    table = {name: dict(section) for name, section in base.items()}
    return parse_config(parse_overrides(table, overrides))


def mistakes(*overrides: str) -> list[str]:
    with pytest.raises(ValueError) as error:
        changed(*overrides)
    return str(error.value).splitlines()


def test_defaults_of_the_papers():
    config = changed()
    assert config.objective.model_dump() == {
        "type": "trrd",
        "teacher_on": "all",
        "alpha": 0.5,
        "clip_low": 0.2,
        "clip_high": 0.28,
        "teacher_log_ratio_clip": 1.0,
        "ratio_level": "token",
        "dual_clip": None,
        # SRPO's weights by role: off.
        "evidence_weight": 0.0,
        "weight_clip": 0.2,
        "contrast_clip": 2.0,
        "patch_pixels": 14,
        "reasoning_template": "{prompt}",
    }
    assert (config.rollout.group_size, config.rollout.prompts_per_batch) == (8, 32)
    assert config.optimization.learning_rate == 1e-6
    assert config.optimization.aggregation == "sequence_mean"
    assert config.optimization.kl_coef == 0
    kdrl: Any = changed("objective=kdrl").objective
    assert (kdrl.kd_coef, kdrl.kd_estimator) == (2e-3, "k2")


def test_the_embedded_run_is_valid():
    config = load_config()
    assert (config.student.model, config.teacher and config.teacher.model) == (
        "embedded/student",
        "embedded/teacher",
    )
    assert config.objective.type == "trrd"


# --- overrides ------------------------------------------------------------------------------------


def test_a_setting_of_other_objectives_names_them() -> None:
    """Not one of the same section that is spelled alike, such as teacher_enters."""
    for objective in ("sdpo", "gkd", "opsd"):
        (sentence,) = mistakes(f"objective={objective}", "objective.teacher_on=all")
        assert sentence.startswith(
            "objective.teacher_on is an unknown key: it belongs to objective.type = 'trrd', 'kdrl'"
        )


@pytest.mark.parametrize(
    ("patience", "every", "num_steps", "steps_per_batch", "is_refused"),
    [
        (3, 20, 61, 1, False),
        (3, 20, 60, 1, True),
        (1, 1, 1, 1, True),
        # The rollout batch that is under way after step 4 ends with step 6.
        (2, 2, 7, 3, False),
        (2, 2, 6, 3, True),
    ],
)
def test_a_switch_that_no_validation_can_bring_is_refused(
    patience: int, every: int, num_steps: int, steps_per_batch: int, is_refused: bool
) -> None:
    config = {
        "student": {"model": "s"},
        "teacher": {"model": "t"},
        "task": {"type": "knights_and_knaves"},
        "objective": {"type": "opd_then_grpo", "opd_share": "auto", "auto_patience": patience},
        "evaluation": {"every_steps": every},
        "rollout": {"prompts_per_batch": 6},
        "optimization": {"num_steps": num_steps, "steps_per_rollout_batch": steps_per_batch},
    }
    if not is_refused:
        parse_config(config)
        return
    sentence = (
        f"after {patience} validations without a gain (objective.auto_patience); with "
        f"evaluation.every_steps = {every} that is step {patience * every} at the earliest, but "
        f"the run has optimization.num_steps = {num_steps}; lower auto_patience or every_steps"
    )
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_config(config)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optimization.num_steps=7", "optimization", "num_steps", 7),
        ("optimization.learning_rate=1e-5", "optimization", "learning_rate", 1e-5),
        ("optimization.learning_rate=1", "optimization", "learning_rate", 1.0),
        ("student.model=org/name", "student", "model", "org/name"),
        ("student.model='quoted name'", "student", "model", "quoted name"),
        ("student.model=a=b", "student", "model", "a=b"),
        ("task.num_people=[2, 3]", "task", "num_people", (2, 3)),
        ("task.instructions=false", "task", "instructions", False),
        ("objective.teacher_log_ratio_clip=off", "objective", "teacher_log_ratio_clip", "off"),
        ("objective.alpha=.25", "objective", "alpha", 0.25),
        ("objective.teacher_log_ratio_clip=5.", "objective", "teacher_log_ratio_clip", 5.0),
        ("optimization.betas=[.8, .9]", "optimization", "betas", (0.8, 0.9)),
        ("task.instructions=False", "task", "instructions", False),
        ("optimization.betas=[0.8, 0.9]", "optimization", "betas", (0.8, 0.9)),
    ],
)
def test_override(override, section, key, value):
    config = changed("objective=trrd", override)
    assert getattr(getattr(config, section), key) == value


def test_a_named_type_replaces_its_section_unless_it_is_there_already():
    base = BASE | {"objective": {"type": "trrd", "alpha": 0.25}}
    assert changed("objective=trrd", base=base).objective.model_dump()["alpha"] == 0.25
    assert changed("objective=grpo", base=base).objective.type == "grpo"
    assert (
        changed("objective=grpo", "objective=trrd", base=base).objective.model_dump()["alpha"]
        == 0.5
    )
    assert changed("teacher=local", base=base).teacher == changed(base=base).teacher
    assert (
        changed("task=jsonl", "task.path=p.jsonl", base=base).task.model_dump()["verifier"]
        == "exact"
    )


@pytest.mark.parametrize("text", ["123456", "2024-05-01", "true", "True", ".5", "[1]", '"quoted"'])
def test_a_text_setting_stays_a_text(text):
    assert load_config(None, [f"run_dir={text}"]).run_dir == text.strip('"')


@pytest.mark.parametrize(
    "text", ["None", "...", "b'a'", "{1, 2}", "1j", "007", "1-2", "5is", "9" * 5000]
)
def test_what_no_setting_can_be_stays_a_text(text):
    table = parse_overrides({}, [f"rollout.chat_template_kwargs.x={text}"])
    assert table["rollout"]["chat_template_kwargs"] == {"x": text}


def test_a_file_with_an_integer_too_long_for_python_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(f"seed = {'9' * 5000}")
    with pytest.raises(UserError, match="it is not valid TOML"):
        load_config(path)


def test_a_knob_alone_is_one_of_the_default_objective(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[student]\nmodel = "embedded/student"\n[teacher]\nmodel = "embedded/teacher"\n'
        '[task]\ntype = "knights_and_knaves"\n'
    )
    assert load_config(path, ["objective.alpha=0.3"]).objective == TRRDConfig(alpha=0.3)


@pytest.mark.parametrize("first", [True, False])
def test_a_type_begins_its_section_anew_wherever_it_comes(first):
    overrides = ["task.type=jsonl", "task.path=p.jsonl"][:: 1 if first else -1]
    task = load_config(None, overrides).task
    assert (task.type, task.model_dump()["path"]) == ("jsonl", "p.jsonl")


def test_the_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    overrides = ["run_dir=~/run", "student.model=~/model", "task=jsonl", "task.path=~/p.jsonl"]
    config = load_config(None, overrides)
    found = (config.run_dir, config.student.model, config.task.model_dump()["path"])
    assert found == tuple(f"/home/somebody/{name}" for name in ("run", "model", "p.jsonl"))


@given(st.text(max_size=30))
def test_any_text_is_an_override_or_a_sentence(text: str):
    try:
        parse_overrides({"seed": 0}, [text])
    except ValueError as error:
        assert str(error).startswith("override ")


# --- mistakes -------------------------------------------------------------------------------------


def test_every_mistake_gets_its_own_sentence():
    assert mistakes("optimization.num_steps=0", "rollout.groupsize=4", "seed=-1") == [
        "rollout.groupsize is an unknown key: did you mean 'group_size'?",
        "optimization.num_steps is 0: it must be greater than or equal to 1.",
        "seed is -1: it must be greater than or equal to 0.",
    ]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["objective=trrd", "objective.alpha=true"],
            "objective.alpha is True: it must be a valid number.",
        ),
        (
            ["objective=trrd", "objective.alpha={start=1, change_per_step=-1}"],
            "alpha.end is missing: add it to the config.",
        ),
        (
            ["objective=trrd", "objective.teacher_log_ratio_clip=on"],
            "it must be a valid number, or it must be 'off'.",
        ),
        (["objective=5"], "objective is 5: it must be a section, with keys of its own."),
        (
            ["task.num_people=[2, 9]"],
            "task.num_people[1] is 9: it must be less than or equal to 8.",
        ),
        (["task.num_people=[]"], "task.num_people is []: it must have at least 1 item."),
        (["task.num_people=3"], "task.num_people is 3: it must be a list."),
        (["student=5"], "student is 5: it must be a section, with keys of its own."),
        (
            ["student.dtype=float16"],
            "student.dtype is 'float16': it must be 'float32' or 'bfloat16'.",
        ),
        (
            ["teacher=serve"],
            "several, privileged, cached, ema, did you mean 'served'?",
        ),
        (
            ["teacher.type=served", "teacher.model=m"],
            "teacher.urls is missing: add it to the config.",
        ),
        (
            ["teacher={type='several',teachers={a={model='m',modle='m'}}}"],
            "teacher.teachers.a.modle is an unknown key: did you mean 'model'?",
        ),
        (
            ["optimization.num_steps=true"],
            "optimization.num_steps is True: it must be a valid integer.",
        ),
        (
            ["optimization.kl_coef={start=0.1,end=-1,change_per_step=-1}"],
            "optimization.kl_coef.end is -1: it must be greater than or equal to 0.",
        ),
        (["optimization.betas=[0.9]"], "optimization.betas[1] is missing: add it to the config."),
        (
            ["evaluation.temperature=-1"],
            "evaluation.temperature is -1: it must be greater than or equal to 0.",
        ),
    ],
)
def test_sentence(overrides, sentence):
    (found,) = mistakes(*overrides)
    assert found.endswith(sentence)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "key",
    [
        "optimization.learning_rate",
        "rollout.temperature",
        "objective.clip_high",
        "evaluation.temperature",
    ],
)
def test_no_number_may_be_infinite_or_nan(key, value):
    (sentence,) = mistakes("objective=trrd", f"{key}={value}")
    assert sentence == f"{key} is {float(value)}: it must be a finite number."


def test_missing_models_and_task():
    with pytest.raises(ValueError) as error:
        parse_config({})
    assert str(error.value).splitlines() == [
        "student is missing: add it to the config.",
        "task is missing: add it to the config.",
    ]


@pytest.mark.parametrize("objective", ["trrd", "kdrl", "opd"])
def test_an_objective_with_a_teacher_needs_one(objective):
    table = {
        "student": {"model": "s"},
        "task": {"type": "knights_and_knaves"},
        "objective": {"type": objective},
    }
    with pytest.raises(
        ValueError, match=f"objective '{objective}' needs a teacher; add a \\[teacher\\] section"
    ):
        parse_config(table)
    assert parse_config(table | {"objective": {"type": "grpo"}}).teacher is None


def test_mini_batches_are_of_equal_size():
    with pytest.raises(ValueError, match=r"rollout\.prompts_per_batch = 6 is not a multiple of"):
        changed("rollout.prompts_per_batch=6", "optimization.steps_per_rollout_batch=4")


# --- files ----------------------------------------------------------------------------------------

ANYTHING = [
    "objective=trrd",
    "objective.alpha={start=1, end=0.5, change_per_step=-0.01}",
    "objective.teacher_log_ratio_clip=off",
    "optimization.betas=[0.9, 0.95]",
    "rollout.max_prompt_tokens=100",
    "task.num_people=[2]",
    "seed=3",
    "student.model='a \"quoted\" näme'",
]


def test_a_dumped_config_reads_back_as_the_same_run(tmp_path: Path):
    config = changed(*ANYTHING)
    (tmp_path / "run.toml").write_text(dump_config(config))
    assert load_config(tmp_path / "run.toml") == config
    assert load_config(str(tmp_path / "run.toml")) == config


def test_the_dump_states_every_setting_with_a_value():
    table = tomllib.loads(dump_config(changed()))
    assert table["optimization"]["num_steps"] == 100 and table["rollout"]["temperature"] == 1.0
    assert next(iter(table["objective"])) == "type"


def test_changed_settings_are_what_differs_and_the_types():
    assert changed_settings(changed(*ANYTHING)) == {
        "student.model": 'a "quoted" näme',
        "teacher.model": "t",
        "task.type": "knights_and_knaves",
        "task.num_people": [2],
        "objective.type": "trrd",
        "objective.alpha.start": 1.0,
        "objective.alpha.end": 0.5,
        "objective.alpha.change_per_step": -0.01,
        "objective.teacher_log_ratio_clip": "off",
        "rollout.max_prompt_tokens": 100,
        "optimization.betas": [0.9, 0.95],
        "seed": 3,
    }


def test_changed_settings_are_overrides_that_give_the_run_again():
    config = changed(*ANYTHING)
    overrides = [
        f"{key}={value if isinstance(value, str) else str(value)}"
        for key, value in changed_settings(config).items()
    ]
    assert parse_config(parse_overrides({}, overrides)) == config


def test_a_run_directory_is_its_config_wherever_it_was_moved(tmp_path: Path):
    (tmp_path / "config.toml").write_text(dump_config(changed("run_dir=elsewhere")))
    assert load_config(tmp_path).directory == tmp_path
    assert load_config(tmp_path, ["run_dir=new"]).directory == Path("new")


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + dump_config(changed()).encode())
    assert load_config(tmp_path / "run.toml") == changed()


def test_where_a_run_is_stored():
    assert changed("seed=2", "objective=grpo").directory == Path(
        "runs/knights_and_knaves-grpo-seed2"
    )
    assert changed("run_dir=here").directory == Path("here")


# --- annealing ------------------------------------------------------------------------------------


def test_annealed_knob_by_hand():
    kdrl = Annealed(start=5e-3, end=1e-3, change_per_step=-5e-5)
    assert [kdrl.at(step) for step in (0, 1, 40)] == pytest.approx([5e-3, 4.95e-3, 3e-3], abs=1e-15)
    assert [kdrl.at(step) for step in (80, 1000)] == [1e-3, 1e-3]
    assert Annealed(start=0, end=1, change_per_step=0.25).at(3) == 0.75


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1e-6, 1), st.integers(0, 10**6))
def test_annealed_knob_stays_between_its_ends(start: float, end: float, size: float, step: int):
    if start == end:
        return
    knob = Annealed(start=start, end=end, change_per_step=math.copysign(size, end - start))
    assert min(start, end) <= knob.at(step) <= max(start, end)


def test_annealing_away_from_the_end_is_refused():
    with pytest.raises(ValueError, match="change_per_step"):
        Annealed(start=1, end=0, change_per_step=0.1)


def test_public_load_config():
    assert rlad.load_config(overrides=["seed=4"]).seed == 4


def test_a_privileged_teacher_anywhere_inside_another_is_refused():
    inner = "{type='privileged',teacher={model='m'}}"
    for holder in (
        inner,
        f"{{type='several',combine='mixture',teachers={{a={inner}}}}}",
        f"{{type='cached',teacher={inner}}}",
    ):
        (found,) = mistakes(f"teacher={{type='privileged',teacher={holder}}}")
        assert "its teacher is privileged too" in found


def test_how_a_teacher_is_reached_is_no_part_of_the_run_but_what_it_is():
    served = "teacher={{type='served',urls=['http://127.0.0.1:{port}/v1'],model='{model}',num_retries={retries}}}"
    first = changed(served.format(port=8000, model="m", retries=1)).digest
    assert changed(served.format(port=8001, model="m", retries=2)).digest == first
    assert changed(served.format(port=8000, model="n", retries=1)).digest != first
    assert changed("optimization.max_missing_teacher_share=0.5").digest == changed().digest


# --- marks, children, engines ---------------------------------------------------------------------

NESTED = {
    "type": "several",
    "teachers": {
        "logic": {"type": "cached", "teacher": {"model": "t"}, "directory": "elsewhere"},
        "a.b": {"type": "served", "urls": ["http://127.0.0.1:1/v1"], "model": "m"},
    },
}


def test_children_are_the_sections_inside_at_any_depth():
    teacher = parse_config(BASE | {"teacher": NESTED}).teacher
    assert teacher is not None
    assert list(teacher.children) == ["teachers.logic", "teachers.a.b"]
    assert [type(each).__name__ for each in teacher.walk()] == [
        "SeveralTeachersConfig",
        "CachedTeacherConfig",
        "LocalTeacherConfig",
        "ServedTeacherConfig",
    ]
    named = [(name, one.type) for name, one in single_teachers(teacher)]
    assert named == [("teacher logic", "local"), ("teacher a.b", "served")]
    assert list(single_teachers(None)) == []


def test_a_dump_without_marks_leaves_out_the_marked_settings_at_any_depth():
    config = parse_config(BASE | {"teacher": NESTED})
    assert config.dump() == config.model_dump(mode="json")
    table = config.dump(without=(Mark.NO_NUMBER, Mark.ROUNDING))
    assert not {"run_dir", "checkpoints", "logging"} & set(table)
    assert table["teacher"]["teachers"]["logic"] == {
        "type": "cached",
        "teacher": {
            "type": "local",
            "model": "t",
            "dtype": "float32",
            "quantization": "none",
            "random_weights": False,
        },
    }
    assert table["teacher"]["teachers"]["a.b"] == {
        "type": "served",
        "model": "m",
        "scoring": "auto",
    }
    assert "device" not in table["student"] and "dtype" in table["student"]


def test_every_objective_runs_on_the_native_engine_and_says_where_else():
    for section in OBJECTIVE_CONFIGS.values():
        require_engine("native", section())
        for engine in ("trl", "verl"):
            if engine not in section.engines:
                with pytest.raises(UserError, match=f"is not available on {TITLES[engine]}; use"):
                    require_engine(engine, section())


def test_what_other_sections_decide_is_no_setting_of_trl():
    (found,) = mistakes("engine.trl.learning_rate=1e-5")
    assert found == (
        "engine is wrong: trl.learning_rate is decided by optimization.learning_rate; leave it out "
        "of [engine.trl]."
    )
    assert load_config(None, ["engine.trl.use_vllm=true"]).engine.trl == {"use_vllm": True}


@pytest.mark.parametrize(
    ("objective", "is_refused"),
    [
        ({"type": "opd"}, False),
        ({"type": "gkd"}, True),
        ({"type": "gkd", "support": "sampled"}, False),
        ({"type": "kdrl"}, False),
        ({"type": "kdrl", "kd_estimator": "exact"}, True),
        ({"type": "sdpo"}, True),
        ({"type": "grpo"}, False),
    ],
)
def test_an_end_token_is_for_the_sampled_token(objective: dict[str, Any], is_refused: bool) -> None:
    """Of a distribution the two ends would have to change places, which nothing does."""
    inner = {"type": "local", "model": "embedded/teacher"}
    teacher = {"type": "privileged", "teacher": inner, "end_token": "<|im_end|>"}
    table = {
        "student": {"model": "embedded/student"},
        "task": {"type": "knights_and_knaves"},
        "teacher": teacher,
        "objective": objective,
    }
    with (
        pytest.raises(UserError, match=r"teacher\.end_token applies only to the sampled token")
        if is_refused
        else nullcontext()
    ):
        parse_config(table)


def test_a_sampled_divergence_without_weight_is_for_one_step() -> None:
    several = ["optimization.steps_per_rollout_batch=2", "objective=gkd"]
    (sentence,) = mistakes(*several, "objective.support=sampled")
    assert "set optimization.steps_per_rollout_batch = 1" in sentence
    assert changed(*several).objective.type == "gkd"
    assert changed("objective=gkd", "objective.support=sampled").objective.type == "gkd"
