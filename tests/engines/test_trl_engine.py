"""Our objectives in the real TRL's GRPO trainer: against TRL's own loss, the native engine, and
numbers by hand."""

import inspect
import json
import math
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.trl
trl = pytest.importorskip("trl", reason="needs the optional package trl")

from datasets import Dataset
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from parity_cases import OBJECTIVES
from rlad.config.objective import OBJECTIVE_CONFIGS
from rlad.engines.trl.config import AGGREGATION, REPLACED, RLADConfig
from rlad.engines.trl.trainer import RLADTrainer
from rlad.errors import RunFailedError
from rlad.tasks import Problem
from rlad.teachers.base import SynchronousTeacher, TeacherRequest
from tiny_models import tiny_tokenizer
from trl_runs import (
    ARGUMENTS,
    distance,
    few_high_words,
    first_inputs,
    loss_and_gradient,
    make_trainer,
    move,
    nearby,
    prompts,
    steps_of,
    student,
    student_logprobs,
)

SAME_CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
GRPO: dict[str, Any] = {"type": "grpo", **SAME_CLIP}
WITH_TEACHER = [
    name for name, one in OBJECTIVE_CONFIGS.items() if "trl" in one.engines and one.needs_teacher
]
ONE_OR_SEVERAL = pytest.mark.parametrize(
    "steps_per_generation", [2, 4], ids=["one step", "two steps"]
)
ALL_MODES = pytest.mark.parametrize("loss_type", AGGREGATION)


def two_windows(inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The micro-batches of the last optimiser step on a generation batch."""
    return inputs[-ARGUMENTS["gradient_accumulation_steps"] :]


# --- what of TRL is relied on ---------------------------------------------------------------------


def test_this_is_the_trl_that_the_adapter_was_written_for():
    assert trl.__version__.startswith("1.16.")
    parameters = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["self", "model", "inputs"],
        "_get_per_token_logps_and_entropies": [
            "self",
            "model",
            "input_ids",
            "attention_mask",
            "logits_to_keep",
        ],
    }
    for name, wanted in parameters.items():
        found = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
        assert found[: len(wanted)] == wanted and (
            len(found) == len(wanted) or name.startswith("_get")
        ), name
    assert (
        "compute_entropy"
        in inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    )
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_three_methods_are_overridden_and_the_telemetry():
    own = {
        name
        for name, value in vars(RLADTrainer).items()
        if inspect.isfunction(value) and hasattr(GRPOTrainer, name)
    }
    assert own == {
        "__init__",
        "_generate_and_score_completions",
        "_calculate_rewards",
        "_compute_loss",
        "_send_telemetry",
    }


def test_every_setting_that_changes_trls_loss_is_known():
    """A setting whose name occurs in TRL's loss is replaced by ours, refused, or read by our loss
    too."""
    source = inspect.getsource(GRPOTrainer._compute_loss)
    used = {
        name
        for name in GRPOConfig.__dataclass_fields__
        if f"self.{name}" in source or f"self.args.{name}" in source
    }
    of_other_losses = {name for name in used if name.startswith(("sapo_", "vespo_", "entropy_"))}
    kept = {
        "loss_type",
        "beta",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "max_completion_length",
    }
    kept |= {"steps_per_generation", "router_aux_loss_coef"}
    assert used - of_other_losses <= kept | set(REPLACED)


def test_what_a_batch_holds(tmp_path):
    aligned, several = (
        first_inputs(make_trainer(tmp_path, "trrd", steps_per_generation=steps))[0]
        for steps in (2, 4)
    )
    names = {
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "num_items_in_batch",
    }
    assert set(aligned) == names | {"teacher_logprobs", "counted", "denominator"}
    assert set(several) == set(aligned) | {"old_per_token_logps"}


# --- against TRL's own loss -----------------------------------------------------------------------


@ALL_MODES
@ONE_OR_SEVERAL
def test_grpo_and_alpha_1_are_trls_own_loss_and_gradient(tmp_path, loss_type, steps_per_generation):
    settings = {"loss_type": loss_type, "steps_per_generation": steps_per_generation}
    trainer = make_trainer(tmp_path, {"type": "trrd", "alpha": 1.0, **SAME_CLIP}, **settings)
    inputs = two_windows(first_inputs(trainer))
    if steps_per_generation == 4:
        move(trainer)
    theirs = loss_and_gradient(trainer, inputs, of=GRPOTrainer)
    assert (
        len({int(part["completion_mask"].sum()) for part in inputs}) > 1 and theirs[1].norm() > 1e-2
    )
    for objective in (trainer.args.objective, GRPO):
        trainer.args.objective = objective
        ours = loss_and_gradient(trainer, inputs)
        assert ours[0] == pytest.approx(theirs[0], abs=1e-7)
        assert distance(ours[1], theirs[1]) < 1e-6
    trainer.args.objective = {"type": "trrd", "alpha": 0.5, **SAME_CLIP}
    assert distance(loss_and_gradient(trainer, inputs)[1], theirs[1]) > 1e-2, (
        "the comparison can fail"
    )


@pytest.mark.parametrize(
    ("loss_type", "settings"),
    [
        ("dapo", {"steps_per_generation": 4, "num_iterations": 2, "beta": 0.1}),
        (
            "grpo",
            {"gradient_accumulation_steps": 4, "beta": 0.1, "mask_truncated_completions": True},
        ),
    ],
    ids=["several steps", "accumulation"],
)
def test_whole_runs_are_trls_own_with_a_leash(tmp_path, loss_type, settings):
    """Sampling, advantages, reference and optimiser too: the same losses, gradients and rewards at
    every step."""
    path = tmp_path / "student"
    student().save_pretrained(path)
    runs = [
        steps_of(
            make_trainer(tmp_path, objective, model=str(path), loss_type=loss_type, **settings)
        )
        for objective in (None, GRPO)
    ]
    theirs, ours = runs
    assert len(ours.gradients) == 4 and ours.logs[-1]["reference/kl/mean"] > 1e-4
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        assert distance(a, b) < 1e-5
    for a, b in zip(ours.logs, theirs.logs, strict=True):
        for name in {"loss", "grad_norm", "reward", "completions/mean_length"} & b.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


@ALL_MODES
@ONE_OR_SEVERAL
def test_unclamped_trrd_is_trls_own_loss_with_the_mixed_anchor(
    tmp_path, loss_type, steps_per_generation
):
    objective = {"type": "trrd", "alpha": 0.3, "teacher_log_ratio_clip": "off", **SAME_CLIP}
    trainer = make_trainer(
        tmp_path, objective, loss_type=loss_type, steps_per_generation=steps_per_generation
    )
    inputs = two_windows(first_inputs(trainer))
    if steps_per_generation == 4:
        move(trainer)
    theirs = loss_and_gradient(
        trainer, [with_anchor(trainer, part, alpha=0.3) for part in inputs], of=GRPOTrainer
    )
    ours = loss_and_gradient(trainer, inputs)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert distance(ours[1], theirs[1]) < 1e-5


def with_anchor(trainer: Any, inputs: dict[str, Any], *, alpha: float) -> dict[str, Any]:
    old = inputs.get("old_per_token_logps")
    old = student_logprobs(trainer, inputs) if old is None else old
    anchor = alpha * old + (1 - alpha) * inputs["teacher_logprobs"]
    return inputs | {
        "old_per_token_logps": torch.where(inputs["teacher_logprobs"].isfinite(), anchor, old)
    }


# --- the teacher ----------------------------------------------------------------------------------


class Recorded(SynchronousTeacher):
    """Says -2 of every token, and NaN of the tokens that are named."""

    identity = "recorded"

    def __init__(self, *, missing: tuple[int, ...] = (), answers_later: bool = False):
        self.requests: list[TeacherRequest] = []
        self.missing, self.answers_later, self.num_calls = missing, answers_later, 0

    def logprobs(self, requests: Any) -> list[torch.Tensor]:
        self.requests += requests
        self.num_calls += 1
        missing = () if self.answers_later and self.num_calls > 1 else self.missing
        return [
            torch.tensor([math.nan if token in missing else -2.0 for token in r.completion])
            for r in requests
        ]


def test_the_teacher_scores_the_tokens_of_the_student_at_its_temperature(tmp_path):
    """Of rows whose advantage is not 0, each token by a softmax over one unpadded sequence."""
    model = student()
    trainer = make_trainer(tmp_path, "trrd", model=model)
    teacher = nearby(model)
    num_scored = 0
    for inputs in first_inputs(trainer):
        for i, values in enumerate(inputs["teacher_logprobs"]):
            prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
            completion = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
            if inputs["advantages"][i] == 0:
                assert values.isnan().all()
                continue
            num_scored += 1
            logits = (
                teacher(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
                / ARGUMENTS["temperature"]
            )
            expected = logits.log_softmax(dim=-1).gather(1, completion[:, None])[:, 0]
            torch.testing.assert_close(values[: len(completion)], expected, rtol=1e-4, atol=1e-5)
            assert values[len(completion) :].isnan().all()
    assert num_scored > 4


def test_a_teacher_may_be_a_model_its_name_or_a_teacher_of_ours(tmp_path):
    model = student()
    nearby(model).save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    scores = []
    for teacher in (nearby(model), str(tmp_path / "teacher")):
        trainer = make_trainer(tmp_path, "kdrl", model=student(), trainer={"teacher": teacher})
        scores.append([part["teacher_logprobs"] for part in first_inputs(trainer)])
    for a, b in zip(*scores, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=1e-6)
    recorded = Recorded()
    trainer = make_trainer(
        tmp_path, "kdrl", trainer={"teacher": recorded, "request_of": request_of}
    )
    inputs = first_inputs(trainer)
    assert len(recorded.requests) == 8, "kdrl asks also where the advantage is 0"
    assert {request.problem.prompt for request in recorded.requests if request.problem} == set(
        prompts()[:2]
    )
    assert all(bool((part["teacher_logprobs"][part["counted"]] == -2).all()) for part in inputs)


def request_of(
    number: int, row: dict[str, Any], prompt: list[int], completion: list[int]
) -> TeacherRequest:
    problem = Problem(prompt=row["prompt"], answer="", key=row["prompt"])
    return TeacherRequest(prompt, completion, problem)


@pytest.mark.parametrize("objective", WITH_TEACHER)
def test_another_teacher_gives_another_gradient(tmp_path, objective):
    trainer = make_trainer(tmp_path, {"type": objective, **OBJECTIVES.get(objective, {})})
    inputs = first_inputs(trainer)
    before = loss_and_gradient(trainer, inputs)[1]
    for part in inputs:
        noise = torch.randn(
            part["teacher_logprobs"].shape, generator=torch.Generator().manual_seed(3)
        )
        part["teacher_logprobs"] = part["teacher_logprobs"] + 0.3 * noise
    after = loss_and_gradient(trainer, inputs)[1]
    assert after.isfinite().all() and distance(after, before) > 1e-3


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_token_without_teacher_leaves_numerator_and_denominator(tmp_path, loss_type):
    """As if the completions were shorter: the same loss as with those tokens cut out of the mask by
    hand."""
    settings = {"max_missing_teacher_share": 0.9, "loss_type": loss_type}
    trainer = make_trainer(
        tmp_path, "opd", trainer={"teacher": Recorded(missing=tuple(range(1, 30)))}, **settings
    )
    inputs = first_inputs(trainer)
    total, expected = 0, []
    for part in inputs:
        kept = part["completion_mask"].bool() & (part["completion_ids"] >= 30)
        assert torch.equal(part["counted"], kept) and 0 < kept.sum() < part["completion_mask"].sum()
        losses = -(-2.0 - student_logprobs(trainer, part))
        expected += [losses[i][kept[i]] for i in range(len(kept)) if kept[i].any()]
        total += int(kept.sum())
    by_hand = sum(float(row.mean()) for row in expected) / len(expected)
    if loss_type == "dapo":
        by_hand = sum(float(row.sum()) for row in expected) / total
    assert loss_and_gradient(trainer, inputs)[0] == pytest.approx(by_hand, rel=1e-5)
    dropped = sum(int((part["completion_mask"].bool() & ~part["counted"]).sum()) for part in inputs)
    assert sum(trainer._metrics["train"]["objective/dropped_tokens/count"]) == dropped


def test_too_many_tokens_without_teacher_stop_the_run(tmp_path):
    teacher = Recorded(missing=tuple(range(1, 30)))
    trainer = make_trainer(tmp_path, "opd", trainer={"teacher": teacher})
    with pytest.raises(
        RunFailedError,
        match=r"no finite log-prob for \d\d\.\d% of the tokens, also when asked again",
    ):
        first_inputs(trainer)
    assert teacher.num_calls == 2
    patient = make_trainer(
        tmp_path,
        "opd",
        trainer={"teacher": Recorded(missing=tuple(range(1, 30)), answers_later=True)},
    )
    assert all(
        torch.equal(part["counted"], part["completion_mask"].bool())
        for part in first_inputs(patient)
    )


# --- metrics and schedules ------------------------------------------------------------------------


def test_annealed_knobs_follow_the_step_of_the_trainer(tmp_path):
    trainer = make_trainer(
        tmp_path, {"type": "kdrl", "kd_coef": {"start": 0.4, "end": 0.0, "change_per_step": -0.1}}
    )
    inputs = first_inputs(trainer)
    by_step = []
    for step in (0, 2, 4, 9):
        trainer.state.global_step = step
        by_step.append(loss_and_gradient(trainer, inputs)[0])
    assert (
        by_step[0] - by_step[2] == pytest.approx(2 * (by_step[1] - by_step[2]), rel=1e-4)
        and by_step[0] != by_step[1]
    )
    assert by_step[2] == by_step[3]


def test_metrics_are_means_over_the_tokens_of_the_whole_step(tmp_path):
    trainer = make_trainer(tmp_path, "trrd")
    inputs = first_inputs(trainer)
    loss_and_gradient(trainer, inputs[:1])
    trainer._metrics["train"].clear()
    loss_and_gradient(trainer, inputs)
    values = []
    for part in inputs:
        kept = part["completion_mask"].bool() & part["teacher_logprobs"].isfinite()
        values.append((student_logprobs(trainer, part) - part["teacher_logprobs"])[kept])
    metrics = trainer._metrics["train"]
    # Each micro-batch counts as a step where no training loop says otherwise.
    assert metrics["teacher/log_ratio/mean"] == pytest.approx(
        [float(v.mean()) for v in values], rel=1e-4
    )
    steps = steps_of(make_trainer(tmp_path, "trrd", max_steps=1))
    both = torch.cat(values)
    assert steps.logs[0]["teacher/log_ratio/mean"] == pytest.approx(float(both.mean()), rel=1e-4)
    assert steps.logs[0]["objective/trained_tokens/count"] == len(both)
    assert steps.logs[0]["objective/clamped/frac"] == pytest.approx(
        float((both.abs() > 1).double().mean()), abs=1e-6
    )
    assert (
        steps.logs[0]["teacher/tokens/count"] == len(both)
        and "sampler/mismatch/mean" not in steps.logs[0]
    )


def test_evaluation_leaves_the_metrics_of_training_alone(tmp_path):
    held_out = Dataset.from_dict({"prompt": prompts(2)})
    trainer = make_trainer(
        tmp_path, "trrd", trainer={"eval_dataset": held_out}, per_device_eval_batch_size=4
    )
    metrics = trainer.evaluate()
    assert (
        math.isfinite(metrics["eval_loss"]) and metrics["eval_objective/trained_tokens/count"] > 0
    )
    assert not trainer._metrics["train"]


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"objective": "trdr"},
            "objective.type is 'trdr': it must be one of .*, did you mean 'trrd'",
        ),
        (
            {"objective": {"type": "trrd", "alhpa": 0.5}},
            "objective.alhpa is an unknown key: did you mean 'alpha'",
        ),
        (
            {"objective": "topd"},
            "objective 'topd' is not available on TRL; use one of trrd, grpo, kdrl",
        ),
        ({"objective": "opd_then_grpo"}, "objective 'opd_then_grpo' is not available on TRL"),
        (
            {"objective": {"type": "kdrl", "teacher_on": "wrong"}},
            "objective.teacher_on = 'wrong' is not available on TRL; set it to 'all'",
        ),
        (
            {"loss_type": "cispo"},
            "loss_type = 'cispo' has no meaning with objective 'trrd' and advantages = 'trl'; use "
            "'grpo' or 'dapo'",
        ),
        (
            {"use_bias_correction_kl": True},
            "use_bias_correction_kl = True belongs to TRL's own loss",
        ),
        (
            {"off_policy_mask_threshold": 0.5},
            "off_policy_mask_threshold = 0.5 belongs to TRL's own loss",
        ),
        (
            {"epsilon": 0.3},
            "epsilon = 0.3 belongs to .* must stay 0.2: set clip_low of the objective",
        ),
        (
            {"epsilon_high": 0.28},
            "epsilon_high = 0.28 belongs to .* must stay None: set clip_high of the objective",
        ),
        ({"delta": 4.0}, "delta = 4.0 .* set dual_clip of the objective"),
        (
            {"importance_sampling_level": "sequence"},
            "importance_sampling_level = 'sequence' .* set ratio_level",
        ),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile = 0.2 belongs"),
        ({"entropy_coef": 0.01}, "entropy_coef = 0.01 belongs"),
        ({"advantages": "mine"}, "advantages = 'mine' has no meaning .*; use 'trl' or 'rlad'"),
        (
            {"advantages": "rlad", "scale_rewards": "batch"},
            "scale_rewards = 'batch' has no meaning .*; use 'group' or 'none'",
        ),
        (
            {"advantages": "rlad", "num_generations_eval": 1},
            "num_generations_eval = 1 gives one completion per prompt, .* set it to at least 2",
        ),
    ],
)
def test_settings_without_a_meaning_are_one_sentence(tmp_path, arguments, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        RLADConfig(str(tmp_path), **({"use_cpu": True} | arguments))
    assert "\n" not in str(error.value)


def test_trainers_that_cannot_work_are_one_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"objective 'trrd' needs a teacher; pass teacher=\.\.\., or use 'grpo'"
    ):
        make_trainer(tmp_path, "trrd", trainer={"teacher": None})
    with pytest.raises(
        ValueError, match=r"beta = 0.1 needs the initial student .* made in memory; save it"
    ):
        make_trainer(tmp_path, "trrd", beta=0.1)
    with pytest.raises(ValueError, match="teacher is a PosixPath; pass a model's name, a trans"):
        make_trainer(tmp_path, "trrd", trainer={"teacher": tmp_path})
    with pytest.raises(
        ValueError,
        match="teacher_is_sharded shards the teacher over processes, but this is a single one",
    ):
        make_trainer(tmp_path, "trrd", teacher_is_sharded=True)
    with pytest.raises(
        ValueError,
        match="is for a teacher given as a model or its name; 'recorded' decides itself",
    ):
        make_trainer(tmp_path, "trrd", trainer={"teacher": Recorded()}, teacher_is_sharded=True)

    class Moving(Recorded):
        def state(self) -> dict[str, torch.Tensor]:
            return {"weight": torch.zeros(1)}

    with pytest.raises(
        ValueError,
        match="teacher 'recorded' moves with the student, which only the native engine supports",
    ):
        make_trainer(tmp_path, "trrd", trainer={"teacher": Moving()})

    class Silent(Recorded):
        may_be_silent = True

    with pytest.raises(ValueError, match="'recorded' is silent where there is nothing to show"):
        make_trainer(tmp_path, "trrd", trainer={"teacher": Silent()})


def test_a_broken_student_is_one_sentence(tmp_path):
    trainer = make_trainer(tmp_path, "trrd")
    inputs = first_inputs(trainer)
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(math.nan)
    with pytest.raises(RunFailedError, match="step 1: the student's own log-probs are not finite"):
        loss_and_gradient(trainer, inputs)


def test_defaults_fit_the_cpu_and_arguments_can_be_written(tmp_path):
    config = RLADConfig(str(tmp_path), use_cpu=True)
    assert (config.bf16, config.gradient_checkpointing, config.use_bias_correction_kl) == (
        False,
        False,
        False,
    )
    assert config.objective_config.alpha == 0.5 and config.aggregation == "token_mean"
    written = json.loads(config.to_json_string())["objective"]
    assert (
        RLADConfig(str(tmp_path), use_cpu=True, objective=json.dumps(written)).objective
        == config.objective
    )
    chosen = RLADConfig(str(tmp_path), use_cpu=True, bf16=True, gradient_checkpointing=True)
    assert (chosen.bf16, chosen.gradient_checkpointing) == (True, True)


def test_nobody_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trl.trainer.base_trainer.send_telemetry", lambda *a, **k: pytest.fail("it pings home")
    )
    monkeypatch.delenv("CI", raising=False)
    make_trainer(tmp_path, "grpo", reward=few_high_words)
