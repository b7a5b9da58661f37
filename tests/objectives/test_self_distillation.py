"""`sdpo`, `mopd` and `opsd`: by hand, limits, invariances; on the engine against full logits one
token at a time; their teachers; whole runs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reference
import rlad
from parity_cases import by_engine, difference, distributions, gradients_of, make_case, rollouts_of
from rlad.config.catalogue import CONFIGS, describe
from rlad.config.file import load_config, parse_config
from rlad.config.objective import MOPDConfig, OPSDConfig, SDPOConfig
from rlad.config.run import RunConfig
from rlad.config.types import AnnealedShare
from rlad.engines.metrics import TokenStats
from rlad.objectives import OBJECTIVES, token_loss
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.inputs import LossInputs
from rlad.objectives.mopd import mopd_loss
from rlad.objectives.opsd import opsd_loss
from rlad.objectives.sdpo import sdpo_loss
from rlad.runs.directory import METRICS, RunDirectory
from tiny_runs import objective_section, run_config

NAMES = ["sdpo", "mopd", "opsd"]
WITH_PEERS = ["sdpo", "mopd"]
CLIP = {"clip_low": 0.2, "clip_high": 0.28}


def random_inputs(seed: int = 0, batch: int = 4, length: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return -torch.rand(batch, length, generator=generator, dtype=torch.float64) * 2

    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return {
        "student_logprobs": logprobs().requires_grad_(),
        "old_logprobs": logprobs(),
        "teacher_logprobs": logprobs(),
        "divergence_to_teacher": (-logprobs()).requires_grad_(),
        "advantages": torch.randn(batch, generator=generator, dtype=torch.float64),
        "mask": torch.arange(length)[None] < lengths,
    }


def call(name: str, inputs: dict[str, Tensor], **knobs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    row = OBJECTIVES[name]
    fields = [*row.needs, *(field for field in row.takes_too if field in inputs)]
    return row.function(**{field: inputs[field] for field in fields}, **knobs)


# --- the token loss -------------------------------------------------------------------------------


def test_by_hand() -> None:
    """πS / πold = e^.1, e^1 (bounded to 2): losses 1.1052 * .5 and 2 * .25; the third is masked.
    With λ = .25 and Â = 2 the second's ratio e > 1.28 is clipped: .75 * .5 - .25 * 2.56."""
    inputs = {
        "student_logprobs": torch.tensor([[-0.9, -1.0, -1.0]], dtype=torch.float64),
        "old_logprobs": torch.tensor([[-1.0, -2.0, -1.0]], dtype=torch.float64),
        "divergence_to_teacher": torch.tensor([[0.5, 0.25, math.nan]], dtype=torch.float64),
        "advantages": torch.tensor([2.0], dtype=torch.float64),
        "mask": torch.tensor([[True, True, False]]),
    }
    weight = math.exp(0.1)
    for name in NAMES:
        loss, stats = call(name, inputs)
        assert loss[0].tolist() == pytest.approx([weight * 0.5, 0.5, 0.0], abs=1e-15)
        assert stats["importance_weight"][0, :2].tolist() == pytest.approx([weight, 2.0])
    for name in WITH_PEERS:
        loss, _ = call(name, inputs, reward_share=0.25)
        wanted = [0.75 * weight * 0.5 - 0.25 * 2 * weight, 0.75 * 0.5 - 0.25 * 2.56, 0.0]
        assert loss[0].tolist() == pytest.approx(wanted, abs=1e-15)
    unbounded, _ = call("opsd", inputs, max_importance_weight=None)
    assert unbounded[0, 1].item() == pytest.approx(0.25 * math.e, abs=1e-15)


def test_the_weight_is_constant() -> None:
    for name in NAMES:
        inputs = random_inputs()
        loss, stats = call(name, inputs)
        loss.sum().backward()
        assert inputs["student_logprobs"].grad is None
        wanted = torch.where(inputs["mask"], stats["importance_weight"], 0)
        assert torch.equal(inputs["divergence_to_teacher"].grad, wanted)


@pytest.mark.parametrize("name", WITH_PEERS)
def test_the_share_of_the_reward_goes_from_the_divergence_to_grpo(name: str) -> None:
    inputs = random_inputs()
    policy = {k: inputs[k] for k in ("student_logprobs", "old_logprobs", "advantages", "mask")}
    grpo, _ = grpo_loss(**policy, **CLIP)
    alone, _ = call(name, inputs)
    assert torch.allclose(call(name, inputs, reward_share=1.0)[0], grpo, atol=1e-15)
    mixed = call(name, inputs, reward_share=0.3)[0]
    assert torch.allclose(mixed, 0.7 * alone + 0.3 * grpo, atol=1e-15)
    # As an advantage, the log-ratio of the sampled token: with no reward on-policy distillation.
    loss, _ = call(name, inputs, teacher_enters="advantage", reward_share=0.3)
    advantages = 0.3 * inputs["advantages"][:, None] + 0.7 * (
        inputs["teacher_logprobs"] - inputs["old_logprobs"]
    )
    wanted, _ = grpo_loss(**policy | {"advantages": advantages}, **CLIP)
    assert torch.allclose(loss, wanted, atol=1e-15)
    without = {k: v for k, v in inputs.items() if k != "teacher_logprobs"}
    with pytest.raises(ValueError, match="as an advantage its expected gradient is 0"):
        call(name, without, teacher_enters="advantage")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_silent_and_missing_tokens(name: str, bad: float) -> None:
    inputs = random_inputs()
    whole, _ = call(name, inputs)
    spoilt = {key: value.detach().clone() for key, value in inputs.items()}
    for key in ("student_logprobs", "old_logprobs", "teacher_logprobs", "divergence_to_teacher"):
        spoilt[key][~inputs["mask"]] = bad
    spoilt["divergence_to_teacher"][0, 0] = bad
    spoilt["divergence_to_teacher"][1] = bad
    spoilt["divergence_to_teacher"].requires_grad_()
    speaks = torch.tensor([True, False, True, True])
    loss, stats = call(name, spoilt | {"teacher_speaks": speaks})
    assert stats["dropped"].nonzero().tolist() == [[0, 0]]
    expected = whole.detach().clone()
    expected[0, 0] = 0
    expected[1] = 0
    assert torch.allclose(loss.detach(), expected, atol=1e-15)
    loss.sum().backward()
    assert bool(spoilt["divergence_to_teacher"].grad.isfinite().all())
    if name in WITH_PEERS:  # the reward still trains where the teacher is silent
        mixed, _ = call(name, spoilt | {"teacher_speaks": speaks}, reward_share=0.5)
        policy = {k: inputs[k] for k in ("student_logprobs", "old_logprobs", "advantages", "mask")}
        assert torch.allclose(mixed[1], 0.5 * grpo_loss(**policy, **CLIP)[0][1], atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_padding_order_and_the_leash(name: str) -> None:
    inputs = {key: value.detach() for key, value in random_inputs().items()}
    loss, _ = call(name, inputs)
    order = torch.tensor([2, 0, 3, 1])
    moved = {key: value[order] for key, value in inputs.items()}
    assert torch.equal(call(name, moved)[0], loss[order])
    wider = {
        key: value
        if value.dim() == 1
        else torch.nn.functional.pad(
            value, (0, 3), value=bool(0) if value.dtype == torch.bool else 9
        )
        for key, value in inputs.items()
    }
    assert torch.equal(call(name, wider)[0][:, :5], loss)
    reference_logprobs = inputs["old_logprobs"] - 0.1
    given = LossInputs(**inputs, reference_logprobs=reference_logprobs)
    with_leash, stats = token_loss(name, given, kl_coef=0.5)
    kept = inputs["mask"]
    assert torch.allclose(with_leash[kept], (loss + 0.5 * stats["kl_to_reference"])[kept])


def test_the_same_function_with_other_defaults() -> None:
    inputs = random_inputs()
    fields = {k: inputs[k] for k in OBJECTIVES["sdpo"].needs}
    assert torch.equal(sdpo_loss(**fields)[0], mopd_loss(**fields)[0])
    del fields["advantages"]
    assert torch.equal(
        opsd_loss(**fields)[0], mopd_loss(**fields, advantages=inputs["advantages"])[0]
    )


# --- on the engine --------------------------------------------------------------------------------


def slow_loss(case: Any, batch: Any, old: list[list[float]], **said: Any) -> Tensor:
    """The sequence mean, from full logits one token at a time, of every judged rollout."""
    beta = {"jsd": 0.5, "reverse_kl": 1.0, "forward_kl": 0.0}[said["divergence"]]
    clip = said.get("pointwise_clip")
    takes_part = [
        i
        for i in rollouts_of(case)
        if said["name"] == "opsd" or batch.rollouts[i].verdict != "cannot_judge"
    ]
    sequences = []
    for i in takes_part:
        completion = list(batch.completions[i])
        rows = distributions(case.engine.student, list(batch.prompts[i]), completion, 1.0)
        losses = []
        for position, (row, theirs, token) in enumerate(
            zip(rows, case.of_teacher(batch, i, 1.0), completion, strict=True)
        ):
            if clip is None:
                d = reference.divergence(
                    list(row), theirs, token, beta=beta, support=said["support"], top_k=4
                )
            else:
                terms = (math.exp(t) * (t - s) for s, t in zip(row, theirs, strict=True))
                d = sum(term.clamp(max=clip) for term in terms)
            weight = min(math.exp(float(row[token].detach()) - old[i][position]), 2.0)
            share = said.get("reward_share", 0.0)
            grpo = reference.grpo_token(
                row[token], old[i][position], float(batch.advantages[i]), **CLIP
            )
            losses.append((1 - share) * weight * d + (share * grpo if share else 0))
        sequences.append(losses)
    return reference.sequence_mean(sequences)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("sdpo", {}),
        ("sdpo", {"support": "full", "divergence": "reverse_kl"}),
        ("sdpo", {"support": "sampled", "reward_share": 0.3}),
        ("mopd", {"divergence": "reverse_kl", "reward_share": 0.3}),
        ("mopd", {"support": "teacher_top_k"}),
        ("opsd", {}),
        ("opsd", {"pointwise_clip": 0.02}),
    ],
)
def test_engine_equals_full_logits_token_by_token(name: str, knobs: dict[str, Any]) -> None:
    """In micro-batches, at the second step on a rollout batch: πold is not πS any more."""
    config: Any = CONFIGS["objectives"][name](type=name, **knobs)
    small = {"top_k": 4} | knobs
    case = make_case(
        name,
        knobs=small,
        rollout={"group_size": 2},
        optimization={"steps_per_rollout_batch": 2, "learning_rate": 3e-2},
    )
    batch = case.engine.make_rollout_batch(0)
    old = [[] if len(v) == 0 else v.tolist() for v in batch.old_logprobs]
    case.engine.update(batch, case.engine.minibatch(0, 0))
    stats = TokenStats()
    ours = by_engine(case, batch, rollouts_of(case), stats)
    said = {"divergence": config.divergence, "support": config.support, "name": name} | knobs
    loss = slow_loss(case, batch, old, **said)
    theirs = float(loss.detach()), gradients_of(case.engine.student, loss)
    found = difference(ours, theirs)
    print(f"{name} {knobs}: loss {found[0]:.1e} gradient {found[1]:.1e}")
    assert found[0] < 1e-12 and found[1] < 1e-11
    summary = stats.summary()
    assert summary["objective/importance_weight/mean"] != 1
    if "pointwise_clip" in knobs:
        assert 0.05 < summary["objective/pointwise_clipped/frac"] <= 1
    # One token of a micro-batch or all: the same gradient.
    plain = case.engine.config.optimization.model_copy(update={"tokens_per_batch": 10_000})
    case.engine.scorer.tokens_per_batch = plain.tokens_per_batch
    assert difference(by_engine(case, batch, rollouts_of(case)), theirs)[1] < 1e-11


@pytest.mark.parametrize("name", NAMES)
def test_perturbing_the_teacher_changes_the_gradient(name: str) -> None:
    results = []
    for change in (0.0, 0.1):
        case = make_case(name, knobs={"top_k": 4})
        embeddings: Any = case.teacher.model.get_input_embeddings()
        with torch.no_grad():
            embeddings.weight[:, 0].add_(change)
        results.append(by_engine(case, case.engine.make_rollout_batch(0), rollouts_of(case)))
    assert difference(*results)[1] > 1e-3


# --- config and runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_brings_its_teacher_along(world: Path, tmp_path: Path, name: str) -> None:
    config = load_config(None, [f"objective={name}"])
    assert config.teacher is not None and config.teacher.type == "privileged"
    changed = load_config(None, [f"objective={name}", "teacher.teacher.update_rate=0.5"])
    assert changed.teacher is not None
    assert changed.teacher.dump()["teacher"]["update_rate"] == 0.5
    own = load_config(None, [f"objective={name}", "teacher=local", "teacher.model=x"])
    assert own.teacher is not None and own.teacher.type == "local"
    table = run_config(world, tmp_path, objective={"type": name})
    assert parse_config(table).teacher.type == "local"  # type: ignore[union-attr]
    del table["teacher"]
    assert parse_config(table).teacher.type == "privileged"  # type: ignore[union-attr]
    assert "[teacher.context]" in describe("objectives", name)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"type": "sdpo", "teacher_enters": "advantage"}, "its expected gradient is 0; set both"),
        ({"type": "mopd", "teacher_enters": "advantage", "support": "sampled"}, "reverse_kl"),
        (
            {"type": "opsd", "pointwise_clip": 0.1, "support": "student_top_k"},
            "pointwise_clip bounds the terms of single tokens",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(world: Path, tmp_path: Path, section, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        RunConfig.model_validate(run_config(world, tmp_path, objective=section))


def test_silent_completions_train_by_their_reward_alone() -> None:
    assert not SDPOConfig().trains_without_teacher(0) and not OPSDConfig().trains_without_teacher(0)
    assert MOPDConfig(reward_share=0.1).trains_without_teacher(0)
    rising = AnnealedShare(start=0.0, end=0.2, change_per_step=0.1)
    falling = AnnealedShare(start=0.1, end=0.0, change_per_step=-0.1)
    for share, trains in ((rising, [False, True, True]), (falling, [True, False, False])):
        config = SDPOConfig(reward_share=share)
        assert [config.trains_without_teacher(step) for step in range(3)] == trains


@pytest.mark.parametrize("name", NAMES)
def test_a_run_with_its_own_teacher(world: Path, tmp_path: Path, name: str) -> None:
    """The student teaches itself with what a group has found out, or the answer."""
    section = objective_section(name)
    config = run_config(world, tmp_path / "run", objective=section)
    del config["teacher"]
    config["rollout"] |= {"group_size": 6}
    rows = list(RunDirectory(rlad.train(config).run_dir).read(METRICS))
    assert any(row.get("teacher/divergence/mean", 0) > 0 for row in rows)
    assert any(row["optimization/gradient_norm"] > 0 for row in rows)
