"""Numbers of the objectives: by hand, against the slow reference, limits, invariances, gradients
(METHODS in float64)."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from reference import grpo_token, kl_token, opd_token, trrd_token
from rlad.config.objective import OBJECTIVE_CONFIGS, OPDThenGRPOConfig
from rlad.objectives import OBJECTIVES, token_loss
from rlad.objectives.distilled_rl import distilled_rl_loss
from rlad.objectives.divergences import divergence_of, sampled_divergence
from rlad.objectives.inputs import LossInputs
from rlad.objectives.kdrl import kdrl_loss
from rlad.objectives.kl import kl_tokens
from rlad.objectives.rlsd import rlsd_loss
from rlad.objectives.topd import topd_advantages, topd_loss
from rlad.objectives.trrd import trrd_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NAMES = sorted(
    name
    for name, row in OBJECTIVES.items()
    if name != "sft" and not {"divergence_to_teacher", "role_evidence"} & set(row.needs)
)
"""Of the others, test_srpo.py has srpo, test_divergences.py sft and gkd, and
test_self_distillation.py the rest."""
WITH_TEACHER = [name for name in NAMES if OBJECTIVE_CONFIGS[name].needs_teacher]


def random_inputs(
    seed: int = 0, batch: int = 6, length: int = 7, spread: float = 1.0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def logprobs() -> Tensor:
        return -torch.rand(batch, length, generator=generator, dtype=torch.float64) * 3 * spread

    lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
    return {
        "student_logprobs": logprobs().requires_grad_(),
        "old_logprobs": logprobs(),
        "teacher_logprobs": logprobs(),
        "advantages": torch.randn(batch, generator=generator, dtype=torch.float64),
        "mask": torch.arange(length)[None] < lengths,
    }


def group_size_of(inputs: dict[str, Tensor]) -> int:
    """Groups of 3, or the whole batch as one group."""
    batch = len(inputs["mask"])
    return 3 if batch % 3 == 0 else batch


def call(name: str, inputs: dict[str, Tensor], **knobs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and stats; an objective that makes its own advantages does so first, as the engines
    do."""
    row = OBJECTIVES[name]
    if row.token_advantages:
        made = {"alpha": knobs.pop("alpha")} if "alpha" in knobs else {}
        scores = {
            field: inputs[field].detach() for field in ("old_logprobs", "teacher_logprobs", "mask")
        }
        inputs = inputs | {
            "advantages": row.token_advantages(**scores, group_size=group_size_of(inputs), **made)
        }
    fields = [*row.needs, *(field for field in row.takes_too if field in inputs)]
    return row.function(**{field: inputs[field] for field in fields}, **knobs)


def loss_of(name: str, inputs: dict[str, Tensor], **knobs: Any) -> Tensor:
    return call(name, inputs, **knobs)[0]


def value_and_gradient(name: str, inputs: dict[str, Tensor], **knobs: Any) -> tuple[Tensor, Tensor]:
    inputs = inputs | {"student_logprobs": inputs["student_logprobs"].detach().requires_grad_()}
    loss = loss_of(name, inputs, **knobs)
    (gradient,) = torch.autograd.grad(loss.sum(), inputs["student_logprobs"])
    return loss.detach(), gradient


def one_token(s: float, o: float, t: float, a: float) -> dict[str, Tensor]:
    def tensor(value: float) -> Tensor:
        return torch.tensor([[value]], dtype=torch.float64)

    return {
        "student_logprobs": tensor(s).requires_grad_(),
        "old_logprobs": tensor(o),
        "teacher_logprobs": tensor(t),
        "advantages": torch.tensor([a], dtype=torch.float64),
        "mask": torch.ones(1, 1, dtype=torch.bool),
    }


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "o", "t", "a", "loss", "gradient"),
    [
        # alpha .5, c 1. log r = .5*(-1+1) + .5*clamp(-1+1.4) = .2; r = e^.2 = 1.2214 < 1.28: loss
        # -r*2, gradient the same.
        (-1.0, -1.0, -1.4, 2.0, -2 * math.exp(0.2), -2 * math.exp(0.2)),
        # The teacher finds it unlikely: log r = .5*.8 = .4, r = 1.4918 > 1.28: loss -1.28*2, no
        # gradient.
        (-1.0, -1.0, -1.8, 2.0, -2.56, 0.0),
        # The same token with a negative advantage: the minimum takes r itself, punished with weight
        # r.
        (-1.0, -1.0, -1.8, -2.0, 2 * math.exp(0.4), 2 * math.exp(0.4)),
        # The teacher likes it: log r = .5*(-.6) = -.3, r = .7408 < .8: protected, loss .8*2, no
        # gradient.
        (-1.0, -1.0, -0.4, -2.0, 1.6, 0.0),
        # Far beyond the clamp: log πS - log πT = 3 -> 1, log r = .5; the clamp leaves alpha = .5 of
        # the gradient.
        (-4.0, -4.0, -1.0, 1.0, -math.exp(-0.5), -0.5 * math.exp(-0.5)),
        # πS has moved by +.1 and the teacher agrees with it: log r = .05.
        (-0.9, -1.0, -0.9, 1.0, -math.exp(0.05), -math.exp(0.05)),
    ],
)
def test_trrd_by_hand(s: float, o: float, t: float, a: float, loss: float, gradient: float) -> None:
    value, grad = value_and_gradient("trrd", one_token(s, o, t, a))
    assert value.item() == pytest.approx(loss, abs=1e-14)
    assert grad.item() == pytest.approx(gradient, abs=1e-14)


def test_kdrl_and_opd_by_hand() -> None:
    inputs = one_token(
        -1.0, -1.2, -0.5, 1.0
    )  # d = log πT - log πS = .5; GRPO ratio e^.2 = 1.2214, inside the clip
    grpo = -math.exp(0.2)
    assert loss_of("kdrl", inputs, kd_coef=0.1).item() == pytest.approx(
        grpo + 0.1 * 0.125, abs=1e-14
    )
    k3 = math.exp(0.5) - 1.5
    assert loss_of("kdrl", inputs, kd_coef=0.1, kd_estimator="k3").item() == pytest.approx(
        grpo + 0.1 * k3, abs=1e-14
    )
    # advantage log πT - log πold = .7, ratio e^.2
    assert loss_of("opd", inputs).item() == pytest.approx(-0.7 * math.exp(0.2), abs=1e-14)


def rows(*values: list[float]) -> Tensor:
    """Float64 [batch, token], NaN behind the end of a row."""
    longest = max(map(len, values))
    return torch.tensor(
        [row + [math.nan] * (longest - len(row)) for row in values], dtype=torch.float64
    )


@pytest.mark.parametrize(
    ("s", "t", "a", "teacher_weight", "advantage"),
    [
        # w = e^.1 = 1.1052, inside 1 +- .2: A = 2 (.5 + .5 w) = 2.1052
        (-1.0, -0.9, 2.0, 0.5, 1 + math.exp(0.1)),
        # The same evidence on a wrong answer: w = e^-.1, so the teacher's favourite is punished
        # less: A = -1.9048
        (-1.0, -0.9, -2.0, 0.5, -1 - math.exp(-0.1)),
        # w = e^-2 is clipped to .8, w = e^2 to 1.2
        (-1.0, -3.0, 2.0, 0.5, 2 * 0.9),
        (-1.0, -3.0, -2.0, 0.5, -2 * 1.1),
        # lambda 1: the weight alone; lambda 0: GRPO
        (-1.0, -3.0, 2.0, 1.0, 2 * 0.8),
        (-1.0, -3.0, 2.0, 0.0, 2.0),
        # πS has moved by .1: the evidence is that against πold, and the ratio e^.1
        (-0.9, -3.0, 2.0, 0.5, 2 * 0.9),
    ],
)
def test_rlsd_by_hand(
    s: float, t: float, a: float, teacher_weight: float, advantage: float
) -> None:
    value, gradient = value_and_gradient(
        "rlsd", one_token(s, -1.0, t, a), teacher_weight=teacher_weight
    )
    assert value.item() == pytest.approx(-math.exp(s + 1) * advantage, abs=1e-14)
    assert gradient.item() == pytest.approx(-math.exp(s + 1) * advantage, abs=1e-14)


def test_distilled_rl_by_hand() -> None:
    """log f of the first row: .5, -.1, mean .2, so the weights are e^.3 and e^-.3; the masked token
    has no say.

    Second row: 5 and 0 are bounded to log 3 and 0, mean log(3)/2: the weights are sqrt 3 and 1/sqrt
    3. The third is negative.
    """
    old = rows([-1.0, -1.0], [-6.0, -1.0, -2.0], [-6.0, -1.0, -2.0])
    inputs = {
        "student_logprobs": old.clone().requires_grad_(),
        "old_logprobs": old,
        "teacher_logprobs": rows([-0.5, -1.1], [-1.0, -1.0, -9.0], [-1.0, -1.0, -9.0]),
        "advantages": torch.tensor([1.0, 2.0, -2.0], dtype=torch.float64),
        "mask": torch.tensor([[True, True, False]] * 3),
    }
    value, gradient = value_and_gradient("distilled_rl", inputs)
    expected = [[-math.exp(0.3), -math.exp(-0.3), 0], [-2 * 3**0.5, -2 / 3**0.5, 0], [2, 2, 0]]
    for ours, theirs in zip((*value, *gradient), expected * 2, strict=True):
        assert ours.tolist() == pytest.approx(theirs, abs=1e-14)


def test_topd_by_hand() -> None:
    """alpha .5: πT/πold = 3 gives the token reward log(.5 * 3 + .5) = log 2, πT/πold = 1 gives 0.

    Rewards in log 2: [0, 1, 0] and [1]; returns [0 + (1 + 0)/2, 1 + 0, 0 + 0] and [1 + 1]: a last
    token takes its own reward for the mean that it lacks. Mean .875, deviations -.375, .125, -.875
    and 1.125, variance .546875.
    """
    old = rows([-2.0, -2.0, -2.0], [-3.0])
    inputs = {
        "student_logprobs": old.clone().requires_grad_(),
        "old_logprobs": old,
        "teacher_logprobs": rows([-2.0, -2.0 + math.log(3), -2.0], [-3.0 + math.log(3)]),
        "advantages": torch.zeros(2, dtype=torch.float64),
        "mask": torch.tensor([[True] * 3, [True, False, False]]),
    }
    log2 = math.log(2)
    advantages = [
        deviation * log2 / (math.sqrt(0.546875) * log2 + 1e-4)
        for deviation in (-0.375, 0.125, -0.875, 1.125)
    ]
    scores = {field: inputs[field] for field in ("old_logprobs", "teacher_logprobs", "mask")}
    made = topd_advantages(**scores, group_size=2, alpha=0.5)
    assert made[inputs["mask"]].tolist() == pytest.approx(advantages, abs=1e-14)
    assert (made[~inputs["mask"]] == 0).all()
    value, gradient = value_and_gradient("topd", inputs, alpha=0.5)
    # πS = πold: the ratio is 1, and loss and gradient are -A.
    assert value[inputs["mask"]].tolist() == pytest.approx([-a for a in advantages], abs=1e-14)
    assert gradient[inputs["mask"]].tolist() == pytest.approx([-a for a in advantages], abs=1e-14)


@pytest.mark.parametrize(
    ("num_steps", "opd_share", "num_opd"),
    # The share is rounded up; .07 * 100 = 7.000000000000001 and .28 * 25 = 7.000000000000001 are 7
    # nevertheless.
    [
        (10, 0.4, 4),
        (10, 0.41, 5),
        (3, 0.5, 2),
        (7, 0.0, 0),
        (7, 1.0, 7),
        (100, 0.07, 7),
        (25, 0.28, 7),
        (100, 0.29, 29),
        (1, 0.4, 1),
    ],
)
def test_phases_of_opd_then_grpo(num_steps: int, opd_share: float, num_opd: int) -> None:
    objective = OPDThenGRPOConfig(opd_share=opd_share)
    phases = [objective.at_step(step, num_steps).type for step in range(num_steps)]
    assert phases == ["opd"] * num_opd + ["grpo"] * (num_steps - num_opd)


@pytest.mark.parametrize(
    ("values", "flat"),
    [
        # .2 and .3 are gains; .31 is not more than .01 above .3, nor are .305 and .25.
        ([0.2, 0.3, 0.31, 0.305, 0.25], 40),
        ([0.2, 0.3, 0.31, 0.305], None),
        # Small gains add up: .316 is more than .01 above .3, the last gain, and counts from there.
        ([0.3, 0.308, 0.309, 0.316, 0.3, 0.32, 0.326], 60),
        ([0.3, 0.308, 0.309, 0.316, 0.3, 0.32, 0.327], None),
        # What comes after the decision changes nothing.
        ([0.5, 0.4, 0.3, 0.2, 0.9, 1.0], 30),
        ([0.0, 0.0, 0.0, 0.0], 30),
        ([0.5], None),
        ([], None),
    ],
)
def test_where_validation_is_flat(values: list[float], flat: int | None) -> None:
    auto = OPDThenGRPOConfig(opd_share="auto", auto_patience=3, auto_min_gain=0.01)
    validations = [(10 * i, value) for i, value in enumerate(values)]
    assert auto.flat_step(validations) == flat
    phases = [auto.at_step(step, 100, flat_step=flat).type for step in range(100)]
    assert phases.count("opd") == (100 if flat is None else flat) and phases == sorted(phases)[::-1]
    assert OPDThenGRPOConfig().flat_step(validations) is None
    assert not auto.schedule_depends_on_num_steps
    assert OPDThenGRPOConfig().schedule_depends_on_num_steps


@pytest.mark.parametrize(
    ("alpha", "upper", "lower"),
    [
        (0.1, 0.274, -0.248),
        (0.3, 0.353, -0.319),
        (0.5, 0.494, -0.446),
        (0.7, 0.823, -0.744),
        (0.9, None, None),
    ],
)
def test_gates_of_the_first_step(alpha: float, upper: float | None, lower: float | None) -> None:
    """With πS = πold the gate opens at ℓ = log(1.28)/(1-alpha) and log(.8)/(1-alpha), never where
    that is beyond the clamp."""

    def gradient(log_ratio: float, advantage: float) -> float:
        return value_and_gradient(
            "trrd", one_token(-2.0, -2.0, -2.0 - log_ratio, advantage), alpha=alpha
        )[1].item()

    if upper is None or lower is None:
        assert gradient(5.0, 1.0) != 0
        assert gradient(-5.0, -1.0) != 0
    else:
        assert (gradient(upper - 0.001, 1.0) != 0, gradient(upper + 0.001, 1.0)) == (True, 0)
        assert (gradient(lower + 0.001, -1.0) != 0, gradient(lower - 0.001, -1.0)) == (True, 0)


def test_first_step_ratio_stays_within_the_clamp() -> None:
    ratios = [
        trrd_loss(**one_token(-40.0, -40.0, t, 1.0))[1]["ratio"].item()
        for t in (-80.0, -41.0, -39.0, 0.0)
    ]
    assert min(ratios) == pytest.approx(0.60653, abs=1e-5)
    assert max(ratios) == pytest.approx(1.64872, abs=1e-5)


# --- against the slow reference -------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_slow_reference(name: str, seed: int) -> None:
    inputs = random_inputs(seed)
    loss = loss_of(name, inputs)
    student, old, teacher = (
        [
            row[mask].tolist()
            for row, mask in zip(inputs[f"{who}_logprobs"], inputs["mask"], strict=True)
        ]
        for who in ("student", "old", "teacher")
    )
    per_group = [
        reference.topd_advantages(old[i : i + 3], teacher[i : i + 3], alpha=0.1) for i in (0, 3)
    ]
    topd = per_group[0] + per_group[1]
    for i, j in inputs["mask"].nonzero().tolist():
        s, o, t = student[i][j], old[i][j], teacher[i][j]
        a = inputs["advantages"][i].item()
        rlsd = a * reference.rlsd_weight(o, t, a, teacher_weight=0.5, weight_clip=0.2)
        expected = {
            "trrd": trrd_token(s, o, t, a, alpha=0.5, c=1.0, **CLIP),
            "grpo": grpo_token(s, o, a, **CLIP),
            "kdrl": grpo_token(s, o, a, **CLIP) + 2e-3 * kl_token(s, t, "k2"),
            "opd": opd_token(s, o, t),
            "rlsd": grpo_token(s, o, rlsd, **CLIP),
            "distilled_rl": grpo_token(
                s,
                o,
                a * reference.distilled_rl_weights(old[i], teacher[i], a, weight_bound=3.0)[j],
                **CLIP,
            ),
            "topd": grpo_token(s, o, topd[i][j], **CLIP),
            "skill_sd": grpo_token(s, o, a, **CLIP)
            + 1e-3 * reference.skill_token(s, o, t, c=5.0, bound=2.0),
        }[name]
        assert loss[i, j].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert (loss[~inputs["mask"]] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    *(st.floats(-8, 0) for _ in range(3)),
    st.floats(-3, 3),
    st.floats(0, 1),
    st.sampled_from([None, 0.3, 1.0]),
)
def test_trrd_equals_the_slow_reference_anywhere(
    s: float, o: float, t: float, a: float, alpha: float, c: float | None
) -> None:
    loss = trrd_loss(**one_token(s, o, t, a), alpha=alpha, teacher_log_ratio_clip=c, **CLIP)[
        0
    ].item()
    assert loss == pytest.approx(
        trrd_token(s, o, t, a, alpha=alpha, c=c, **CLIP), rel=1e-12, abs=1e-12
    )


@settings(max_examples=60, deadline=None)
@given(*(st.floats(-8, 0) for _ in range(3)), st.floats(-3, 3), st.floats(0, 1), st.floats(0, 1))
def test_rlsd_equals_the_slow_reference_anywhere(
    s: float, o: float, t: float, a: float, weight: float, clip: float
) -> None:
    loss = rlsd_loss(**one_token(s, o, t, a), teacher_weight=weight, weight_clip=clip, **CLIP)[
        0
    ].item()
    expected = a * reference.rlsd_weight(o, t, a, teacher_weight=weight, weight_clip=clip)
    assert loss == pytest.approx(grpo_token(s, o, expected, **CLIP), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bound", [1.0, 1.5, 20.0])
@pytest.mark.parametrize("alpha", [0.01, 0.5, 0.99])
def test_weights_and_advantages_of_whole_completions_equal_the_slow_reference(
    seed: int, bound: float, alpha: float
) -> None:
    inputs = random_inputs(seed, spread=3.0)
    old, teacher = (
        [
            row[mask].tolist()
            for row, mask in zip(inputs[f"{who}_logprobs"], inputs["mask"], strict=True)
        ]
        for who in ("old", "teacher")
    )
    weights = distilled_rl_loss(**inputs, weight_bound=bound)[1]["advantage_weight"]
    scores = {field: inputs[field] for field in ("old_logprobs", "teacher_logprobs", "mask")}
    advantages = topd_advantages(**scores, group_size=2, alpha=alpha)
    for i in range(6):
        mask, a = inputs["mask"][i], inputs["advantages"][i].item()
        expected = reference.distilled_rl_weights(old[i], teacher[i], a, weight_bound=bound)
        assert weights[i][mask].tolist() == pytest.approx(expected, rel=1e-12)
        group = slice(i - i % 2, i - i % 2 + 2)
        of_group = reference.topd_advantages(old[group], teacher[group], alpha=alpha)
        assert advantages[i][mask].tolist() == pytest.approx(of_group[i % 2], rel=1e-10, abs=1e-12)


# --- identities and limits ------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trrd_with_alpha_1_is_grpo(clip: float | None, level: str) -> None:
    inputs = random_inputs()
    trrd = value_and_gradient(
        "trrd", inputs, alpha=1.0, teacher_log_ratio_clip=clip, ratio_level=level
    )
    grpo = value_and_gradient("grpo", inputs, ratio_level=level)
    assert torch.equal(trrd[0], grpo[0])
    assert torch.equal(trrd[1], grpo[1])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_trrd_with_the_old_policy_as_teacher_is_grpo(alpha: float) -> None:
    inputs = random_inputs()
    inputs["teacher_logprobs"] = inputs["old_logprobs"]
    unclamped = value_and_gradient("trrd", inputs, alpha=alpha, teacher_log_ratio_clip=None)
    grpo = value_and_gradient("grpo", inputs)
    assert torch.allclose(unclamped[0], grpo[0], rtol=1e-13, atol=1e-13)
    assert torch.allclose(unclamped[1], grpo[1], rtol=1e-13, atol=1e-13)
    inputs["student_logprobs"] = inputs["old_logprobs"]
    at_old, grpo_at_old = (
        value_and_gradient("trrd", inputs, alpha=alpha),
        value_and_gradient("grpo", inputs),
    )
    assert torch.equal(at_old[0], grpo_at_old[0])
    assert torch.allclose(at_old[1], grpo_at_old[1], rtol=1e-14)


def test_unclamped_trrd_is_grpo_with_the_mixed_anchor() -> None:
    inputs = random_inputs()
    trrd = value_and_gradient("trrd", inputs, alpha=0.3, teacher_log_ratio_clip=None)
    anchor = 0.3 * inputs["old_logprobs"] + 0.7 * inputs["teacher_logprobs"]
    grpo = value_and_gradient("grpo", inputs | {"old_logprobs": anchor})
    assert torch.allclose(trrd[0], grpo[0], rtol=1e-13, atol=1e-13)
    assert torch.allclose(trrd[1], grpo[1], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_another_teacher_gives_another_gradient(name: str) -> None:
    inputs = random_inputs()
    other = inputs | {"teacher_logprobs": inputs["teacher_logprobs"] - 0.1}
    assert not torch.allclose(
        value_and_gradient(name, inputs)[1], value_and_gradient(name, other)[1], atol=1e-4
    )


def test_teacher_equal_to_student_leaves_no_teacher_term() -> None:
    inputs = random_inputs()
    inputs["teacher_logprobs"] = inputs["student_logprobs"].detach()
    grpo = value_and_gradient("grpo", inputs)
    for estimator in ("k2", "k3"):
        kdrl = value_and_gradient("kdrl", inputs, kd_coef=5.0, kd_estimator=estimator)
        assert torch.allclose(kdrl[0], grpo[0], atol=1e-14)
        assert torch.allclose(kdrl[1], grpo[1], atol=1e-14)
    inputs["old_logprobs"] = inputs["student_logprobs"].detach()
    assert (loss_of("opd", inputs) == 0).all()


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("rlsd", {"teacher_weight": 0.0}),
        ("rlsd", {"weight_clip": 0.0}),
        ("distilled_rl", {"weight_bound": 1.0}),
    ],
)
def test_without_its_teacher_term_an_objective_is_grpo(name: str, knobs: dict[str, float]) -> None:
    inputs = random_inputs()
    for ours, grpo in zip(
        value_and_gradient(name, inputs, **knobs), value_and_gradient("grpo", inputs), strict=True
    ):
        assert torch.equal(ours, grpo)


@pytest.mark.parametrize("name", ["rlsd", "distilled_rl"])
def test_a_teacher_that_agrees_with_the_old_policy_leaves_grpo(name: str) -> None:
    inputs = random_inputs()
    inputs["teacher_logprobs"] = inputs["old_logprobs"]
    for ours, grpo in zip(
        value_and_gradient(name, inputs), value_and_gradient("grpo", inputs), strict=True
    ):
        assert torch.equal(ours, grpo)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topd_with_the_old_policy_as_teacher_does_nothing(dtype: torch.dtype) -> None:
    inputs = {
        k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in random_inputs().items()
    }
    inputs["teacher_logprobs"] = inputs["old_logprobs"]
    value, gradient = value_and_gradient("topd", inputs)
    assert (value == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", ["rlsd", "distilled_rl"])
def test_the_teacher_changes_magnitudes_and_never_a_sign(name: str) -> None:
    """At πS = πold the gradient of a token is its advantage (times -1)."""
    inputs = random_inputs(spread=5.0)
    inputs["student_logprobs"] = inputs["old_logprobs"].clone()
    gradient = value_and_gradient(name, inputs)[1]
    grpo = value_and_gradient("grpo", inputs)[1]
    assert torch.equal(gradient.sign(), grpo.sign())
    factors = (gradient / grpo)[inputs["mask"]]
    assert float(factors.max() - factors.min()) > 0.1
    if name == "rlsd":  # lambda .5, weight clip .2
        assert (float(factors.min()), float(factors.max())) == (
            pytest.approx(0.9),
            pytest.approx(1.1),
        )


def test_distilled_rl_shares_a_positive_advantage_out_and_leaves_negative_ones_alone() -> None:
    inputs = random_inputs(spread=3.0)
    stats = distilled_rl_loss(**inputs)[1]
    log_weights = torch.where(inputs["mask"], stats["advantage_weight"].log(), 0)
    assert torch.allclose(log_weights.sum(dim=1), torch.zeros(6, dtype=torch.float64), atol=1e-13)
    is_positive = inputs["advantages"] > 0
    assert 0 < int(is_positive.sum()) < 6
    # Between 1/3 and 3, over a mean of the same range.
    assert 0.5 < float(log_weights[is_positive].abs().max()) <= 2 * math.log(3)
    assert (log_weights[~is_positive] == 0).all()
    ours, grpo = value_and_gradient("distilled_rl", inputs), value_and_gradient("grpo", inputs)
    assert torch.equal(ours[0][~is_positive], grpo[0][~is_positive])
    assert torch.equal(ours[1][~is_positive], grpo[1][~is_positive])


def test_topd_rewards_have_a_floor_whatever_the_teacher_says() -> None:
    """Two completions of one token: returns 0 and 2 log(1 - alpha), so A = +-d / (d + 1e-4) with d
    = -log(1 - alpha)."""
    for gap in (30.0, 80.0, 1e4):
        scores = {
            "old_logprobs": rows([-1.0], [-1.0]),
            "teacher_logprobs": rows([-1.0], [-1.0 - gap]),
        }
        made = topd_advantages(
            **scores, mask=torch.ones(2, 1, dtype=torch.bool), group_size=2, alpha=0.2
        )
        d = -math.log(0.8)
        assert made[:, 0].tolist() == pytest.approx([d / (d + 1e-4), -d / (d + 1e-4)], abs=1e-12)


def test_topd_sees_no_difference_between_tokens_that_the_teacher_likes_equally() -> None:
    """Whatever their place and the length of their completion: the last token, too."""
    old = rows([-1.0] * 7, [-2.0] * 3)
    scores = {"old_logprobs": old, "teacher_logprobs": old + 0.5, "mask": old != 0}
    assert topd_advantages(**scores, group_size=2).abs().max() < 1e-10


def test_topd_advantages_are_normalised_over_the_tokens_of_a_group() -> None:
    inputs = random_inputs(spread=2.0)
    scores = {field: inputs[field] for field in ("old_logprobs", "teacher_logprobs", "mask")}
    made = topd_advantages(**scores, group_size=3)
    for group in (slice(0, 3), slice(3, 6)):
        tokens = made[group][inputs["mask"][group]]
        assert float(tokens.mean()) == pytest.approx(0, abs=1e-14)
        assert float(tokens.square().mean().sqrt()) == pytest.approx(
            1, abs=5e-3
        )  # but for the 1e-4
        # What the other group holds does not matter, nor how far the batch is padded.
        alone = topd_advantages(
            **{field: values[group] for field, values in scores.items()}, group_size=3
        )
        padded = {
            field: torch.nn.functional.pad(values[group], (0, 4))
            for field, values in scores.items()
        }
        assert torch.equal(alone, made[group])
        assert torch.allclose(
            topd_advantages(**padded, group_size=3)[:, :7], alone, rtol=1e-13, atol=1e-13
        )


def test_topd_in_parts_of_a_group_is_the_whole() -> None:
    """Advantages are made on whole groups, so the loss of a part is the part of the loss."""
    inputs = random_inputs()
    scores = {field: inputs[field] for field in ("old_logprobs", "teacher_logprobs", "mask")}
    inputs["advantages"] = topd_advantages(**scores, group_size=3)
    whole = topd_loss(**inputs)[0]
    for part in ([0], [1, 4], [5, 2, 3]):
        assert torch.equal(
            topd_loss(**{field: values[part] for field, values in inputs.items()})[0], whole[part]
        )


def test_zero_advantage_is_zero_gradient_as_the_table_says() -> None:
    inputs = random_inputs() | {"advantages": torch.zeros(6, dtype=torch.float64)}
    for name in NAMES:
        gradient = value_and_gradient(name, inputs)[1]
        assert (gradient == 0).all() == OBJECTIVE_CONFIGS[name].zero_advantage_is_zero_gradient


def _expected_over_samples(name: str, logits: Tensor, teacher: Tensor, **knobs: Any) -> Tensor:
    """Expected loss over every token of a small vocabulary, weighted by the (detached) sampling
    policy, no reward."""
    student = logits.log_softmax(-1)
    rows = student[:, None]
    inputs = {
        "student_logprobs": rows,
        "old_logprobs": rows.detach(),
        "teacher_logprobs": teacher.log_softmax(-1)[:, None],
        "advantages": torch.zeros(len(logits), dtype=torch.float64),
        "mask": torch.ones(len(logits), 1, dtype=torch.bool),
    }
    return (student.detach().exp() * loss_of(name, inputs, **knobs)[:, 0]).sum()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.2])
def test_topd_follows_the_divergence_to_the_mixture(alpha: float) -> None:
    """One token, the normalisation undone: the expected gradient is that of KL(πS || alpha πT + (1
    - alpha) πold)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)
    old = logits.detach().log_softmax(-1)
    # All nine tokens as one group: advantages are 2 (r̃ - mean) / (2 std + 1e-4); a constant has no
    # expected gradient.
    rewards = (alpha * (teacher - old).exp() + 1 - alpha).log()
    scale = float(rewards.std(correction=0)) + 1e-4 / 2
    student = logits.log_softmax(-1)
    scores = {
        "old_logprobs": old[:, None],
        "teacher_logprobs": teacher[:, None],
        "mask": torch.ones(9, 1, dtype=torch.bool),
    }
    made = topd_advantages(**scores, group_size=9, alpha=alpha)
    token_loss_ = topd_loss(student_logprobs=student[:, None], advantages=made, **scores)[0]
    (ours,) = torch.autograd.grad(
        (old.exp() * token_loss_[:, 0]).sum() * scale, logits, retain_graph=True
    )
    mixture = (alpha * teacher.exp() + (1 - alpha) * old.exp()).log()
    (exact,) = torch.autograd.grad((student.exp() * (student - mixture)).sum(), logits)
    assert torch.allclose(ours, exact, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "knobs"), [("opd", {}), ("kdrl", {"kd_coef": 1.0, "kd_estimator": "k2"})]
)
def test_the_expected_gradient_is_that_of_the_reverse_kl(name: str, knobs: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(9, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad(_expected_over_samples(name, logits, teacher, **knobs), logits)
    student = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad(
        (student.exp() * (student - teacher.log_softmax(-1))).sum(), logits
    )
    assert torch.allclose(ours, exact, atol=1e-14)


def test_k3_follows_the_forward_kl() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(9, generator=generator, dtype=torch.float64)
    expected = _expected_over_samples("kdrl", logits, teacher, kd_coef=1.0, kd_estimator="k3")
    (ours,) = torch.autograd.grad(expected, logits)
    target = teacher.log_softmax(-1)
    (exact,) = torch.autograd.grad((target.exp() * (target - logits.log_softmax(-1))).sum(), logits)
    assert torch.allclose(ours, exact, atol=1e-14)


# --- mask, dropped tokens, extremes ---------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_have_no_influence(name: str, garbage: float) -> None:
    inputs = random_inputs()
    spoilt = dict(inputs)
    for field in ("student_logprobs", "old_logprobs", "teacher_logprobs"):
        spoilt[field] = inputs[field].detach().masked_fill(~inputs["mask"], garbage)
    spoilt["advantages"] = (
        inputs["advantages"][:, None]
        .expand(inputs["mask"].shape)
        .masked_fill(~inputs["mask"], garbage)
    )
    for ours, clean in zip(
        value_and_gradient(name, spoilt), value_and_gradient(name, inputs), strict=True
    ):
        assert torch.equal(ours, clean)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_missing_teacher_value_drops_its_token_only(name: str, bad: float) -> None:
    inputs = random_inputs()
    assert inputs["mask"][0, 0]
    spoilt = inputs | {"teacher_logprobs": inputs["teacher_logprobs"].clone()}
    spoilt["teacher_logprobs"][0, 0] = bad
    smaller = inputs | {"mask": inputs["mask"].clone()}
    smaller["mask"][0, 0] = False
    for ours, expected in zip(
        value_and_gradient(name, spoilt), value_and_gradient(name, smaller), strict=True
    ):
        assert torch.equal(ours, expected)
    dropped = call(name, spoilt)[1]["dropped"]
    assert dropped.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("s", "o", "t"),
    [
        *[(-80.0, 0.0, 0.0), (0.0, -80.0, -80.0), (-80.0, -80.0, 0.0), (0.0, 0.0, -80.0)],
        *[(-200.0, 0.0, 0.0), (0.0, -200.0, -200.0), (-200.0, -200.0, 0.0), (0.0, 0.0, -200.0)],
    ],
)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_logprobs_stay_finite_in_float32(
    name: str, s: float, o: float, t: float, advantage: float
) -> None:
    inputs = {
        k: v.float() if v.is_floating_point() else v
        for k, v in one_token(s, o, t, advantage).items()
    }
    value, gradient = value_and_gradient(name, inputs)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", WITH_TEACHER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_tokens_beside_ordinary_ones(name: str, dtype: torch.dtype) -> None:
    """Weights and advantages that are shared among tokens stay finite when one of them is
    extreme."""
    for teacher, old in ((0.0, -80.0), (-80.0, 0.0), (-1e4, -1.0), (-1.0, -1e4)):
        inputs = {
            k: v.detach().to(dtype) if v.is_floating_point() else v
            for k, v in random_inputs().items()
        }
        inputs["mask"][0] = True
        inputs["teacher_logprobs"][0, 1], inputs["old_logprobs"][0, 1] = teacher, old
        inputs["student_logprobs"][0, 1] = old
        value, gradient = value_and_gradient(name, inputs)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


def test_sampled_divergences_stay_finite_and_push_towards_the_teacher_in_float32() -> None:
    for far in (81.0, 88.0, 200.0, 2e3):
        student = torch.tensor([-far], requires_grad=True)
        for value in (
            kl_tokens(student, torch.zeros(1), estimator="k3"),
            sampled_divergence(student, torch.zeros(1), divergence_of("forward_kl")),
            sampled_divergence(student, torch.zeros(1), divergence_of("jsd")),
        ):
            (gradient,) = torch.autograd.grad(value.sum(), student)
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
            assert gradient.item() < 0  # the student's log-prob rises
    k3 = kl_tokens(torch.tensor([-3.0]), torch.zeros(1), estimator="k3")
    torch.testing.assert_close(k3, torch.tensor([3.0]).exp() - 4)


def test_a_gated_token_has_gradient_zero_also_where_the_ratio_overflows() -> None:
    for inputs in (one_token(-0.01, -0.01, -200.0, 1.0), one_token(-0.01, -300.0, -200.0, 1.0)):
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        assert value_and_gradient("trrd", inputs, teacher_log_ratio_clip=None)[1].item() == 0
    assert value_and_gradient("grpo", one_token(-0.01, -1000.0, 0, 1.0))[1].item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    inputs = random_inputs(seed=3, batch=3, length=4)
    assert torch.autograd.gradcheck(
        lambda s: loss_of(name, inputs | {"student_logprobs": s}), inputs["student_logprobs"]
    )


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_receives_a_gradient(name: str) -> None:
    inputs = random_inputs()
    for field in ("old_logprobs", "teacher_logprobs"):
        inputs[field] = inputs[field].clone().requires_grad_()
    with pytest.raises(ValueError, match="carries a gradient"):
        LossInputs(**inputs)


# --- where the teacher is silent ------------------------------------------------------------------

SILENT = (1, 3, 4)
SPOKEN = (0, 2, 5)
SPEAKS = torch.tensor([i not in SILENT for i in range(6)])
CAN_BE_SILENT = [name for name in WITH_TEACHER if "teacher_speaks" in OBJECTIVES[name].takes_too]


def test_these_are_grpo_without_a_teacher() -> None:
    """The others have nothing to train on where the teacher is silent."""
    assert CAN_BE_SILENT == ["distilled_rl", "kdrl", "rlsd", "skill_sd", "trrd"]
    assert all(
        OBJECTIVE_CONFIGS[name]().trains_without_teacher(0) is (name in CAN_BE_SILENT)
        for name in WITH_TEACHER
    )


@pytest.mark.parametrize("filler", [0.0, math.nan, math.inf, -math.inf, -80.0])
@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("trrd", {}),
        ("trrd", {"alpha": 0.0}),
        ("trrd", {"teacher_log_ratio_clip": None, "dual_clip": 2.0}),
        ("trrd", {"ratio_level": "sequence", "clip_low": 3e-2, "clip_high": 4e-2}),
        ("kdrl", {"kd_coef": 0.5}),
        ("kdrl", {"kd_coef": 0.5, "kd_estimator": "k3"}),
        ("rlsd", {"teacher_weight": 1.0, "weight_clip": 0.9}),
        ("distilled_rl", {"weight_bound": 9.0}),
        ("skill_sd", {"kd_coef": 0.5}),
    ],
)
def test_where_the_teacher_is_silent_it_is_grpo(
    name: str, knobs: dict[str, Any], filler: float
) -> None:
    """Value and gradient exactly, whatever the teacher's tensor holds there; elsewhere they are
    those of a teacher that speaks everywhere."""
    inputs = random_inputs(spread=2.0)
    teacher = torch.where(SPEAKS[:, None], inputs["teacher_logprobs"], filler)
    of_grpo = {key: value for key, value in knobs.items() if key in (*CLIP, "ratio_level")}
    of_grpo |= {"dual_clip": knobs["dual_clip"]} if "dual_clip" in knobs else {}
    some = value_and_gradient(
        name, inputs | {"teacher_logprobs": teacher}, **knobs, teacher_speaks=SPEAKS
    )
    everywhere = value_and_gradient(name, inputs, **knobs)
    grpo = value_and_gradient("grpo", inputs, **of_grpo)
    for ours, whole, wanted in zip(some, everywhere, grpo, strict=True):
        assert torch.equal(ours[[*SILENT]], wanted[[*SILENT]])
        assert torch.equal(ours[[*SPOKEN]], whole[[*SPOKEN]])
        assert not torch.allclose(whole[[*SILENT]], wanted[[*SILENT]], atol=1e-2)


@pytest.mark.parametrize("name", CAN_BE_SILENT)
def test_a_teacher_that_speaks_on_every_row_is_one_that_speaks(name: str) -> None:
    inputs = random_inputs()
    speaks = torch.ones(6, dtype=torch.bool)
    for ours, wanted in zip(
        value_and_gradient(name, inputs, teacher_speaks=speaks),
        value_and_gradient(name, inputs),
        strict=True,
    ):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("name", CAN_BE_SILENT)
def test_a_silent_row_drops_no_token_and_a_spoken_one_does(name: str) -> None:
    inputs = random_inputs()
    inputs["teacher_logprobs"][0, 0] = math.nan  # spoken
    inputs["teacher_logprobs"][1, 0] = math.nan  # silent
    dropped = call(name, inputs, teacher_speaks=SPEAKS)[1]["dropped"]
    assert dropped.nonzero().tolist() == [[0, 0]]
    of_inputs = LossInputs(**inputs, teacher_speaks=SPEAKS)
    assert torch.equal(of_inputs.trained, inputs["mask"] & ~dropped)
    assert torch.equal(of_inputs.heard, inputs["mask"] & SPEAKS[:, None])


def test_a_silent_teacher_by_hand() -> None:
    """Two equal tokens, πS .2 nats above πold, πT .4 nats below πS, Â = 1, alpha .5, no clip: with
    the teacher log r = .1 + .2, without it .2. For KDRL d = -.4: .1 * .08 is added to the first
    alone."""
    inputs = {
        "student_logprobs": rows([-1.0], [-1.0]).requires_grad_(),
        "old_logprobs": rows([-1.2], [-1.2]),
        "teacher_logprobs": rows([-1.4], [-1.4]),
        "advantages": torch.tensor([1.0, 1.0], dtype=torch.float64),
        "mask": torch.ones(2, 1, dtype=torch.bool),
    }
    speaks = torch.tensor([True, False])
    wide = {"clip_high": 1.0, "teacher_speaks": speaks}
    loss = trrd_loss(**inputs, **wide)[0]
    assert loss[:, 0].tolist() == pytest.approx([-math.exp(0.3), -math.exp(0.2)], abs=1e-14)
    loss = kdrl_loss(**inputs, kd_coef=0.1, **wide)[0]
    assert loss[:, 0].tolist() == pytest.approx([0.008 - math.exp(0.2), -math.exp(0.2)], abs=1e-14)


def test_what_kdrl_leaves_out_cannot_spoil_the_gradient() -> None:
    """k3 of d = 200 overflows in float32; in a response that is left out it must not come in as inf
    * 0 = NaN."""
    inputs = {
        k: v.float() if v.is_floating_point() else v
        for k, v in one_token(-200.0, -200.0, 0.0, 1.0).items()
    }
    student = inputs["student_logprobs"].detach().requires_grad_()
    loss = kdrl_loss(
        **(inputs | {"student_logprobs": student}),
        kd_estimator="k3",
        teacher_speaks=torch.tensor([False]),
    )[0]
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert (loss.item(), gradient.item()) == (-1.0, -1.0)


def test_where_it_speaks_is_a_flag_for_each_row() -> None:
    with pytest.raises(
        ValueError,
        match=r"teacher_speaks has shape \(1, 1\); with a mask \(1, 1\) it must be \(1,\)",
    ):
        LossInputs(
            **one_token(-1.0, -1.0, -1.0, 1.0), teacher_speaks=torch.ones(1, 1, dtype=torch.bool)
        )


# --- sequence level, dual clip, leash, refusals ---------------------------------------------------


def test_sequence_level_ratio_by_hand() -> None:
    """GSPO: both tokens share the ratio exp(mean of .1 and .3) = e^.2 and half of its gradient
    each."""
    inputs = one_token(0, 0, 0, 1.0) | {
        "student_logprobs": torch.tensor([[-0.9, -0.7, 9.0]], dtype=torch.float64),
        "old_logprobs": torch.tensor([[-1.0, -1.0, 9.0]], dtype=torch.float64),
        "mask": torch.tensor([[True, True, False]]),
    }
    value, gradient = value_and_gradient("grpo", inputs, ratio_level="sequence")
    assert value[0].tolist() == pytest.approx([-math.exp(0.2), -math.exp(0.2), 0])
    assert gradient[0].tolist() == pytest.approx([-math.exp(0.2), -math.exp(0.2), 0])


def test_dual_clip_bounds_negative_advantages() -> None:
    inputs = one_token(0.0, -3.0, 0.0, -1.0)  # ratio e^3 = 20
    assert loss_of("grpo", inputs).item() == pytest.approx(math.exp(3))
    value, gradient = value_and_gradient("grpo", inputs, dual_clip=3.0)
    assert (value.item(), gradient.item()) == (3.0, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_leash_adds_the_k3_estimate_once(name: str) -> None:
    fields = random_inputs()
    reference = random_inputs(seed=9)["old_logprobs"]
    inputs = LossInputs(**fields, reference_logprobs=reference)
    with_leash, stats = token_loss(name, inputs, kl_coef=0.1)
    without, _ = token_loss(name, inputs)
    d = reference - fields["student_logprobs"]
    expected = torch.where(fields["mask"], 0.1 * (d.exp() - d - 1), 0)
    assert torch.allclose(with_leash - without, expected, atol=1e-14)
    assert (stats["kl_to_reference"] >= 0).all()


def test_refusals() -> None:
    inputs = one_token(-1.0, -1.0, -1.0, 1.0)
    with pytest.raises(ValueError, match="the gradient of 'k1' does not depend on the teacher"):
        kdrl_loss(**inputs, kd_estimator="k1")  # type: ignore[arg-type]
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha is .*\[0, 1\]"):
            trrd_loss(**inputs, alpha=alpha)
    without_teacher = LossInputs(**{k: v for k, v in inputs.items() if k != "teacher_logprobs"})
    with pytest.raises(ValueError, match="'trrd' needs teacher_logprobs"):
        token_loss("trrd", without_teacher)
    for name, knobs, sentence in (
        ("rlsd", {"teacher_weight": 1.1}, r"teacher_weight is 1\.1 .*; both must be in \[0, 1\]"),
        ("rlsd", {"weight_clip": -0.1}, r"weight_clip -0\.1; both must be in \[0, 1\]"),
        (
            "distilled_rl",
            {"weight_bound": 0.5},
            r"weight_bound is 0\.5; it must be at least 1 \(1 = GRPO\)",
        ),
        ("topd", {"alpha": 0.0}, r"alpha is 0\.0; it must be between 0 and 1"),
        ("topd", {"alpha": 1.0}, r"alpha is 1\.0; it must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            loss_of(name, inputs, **knobs)
    scores = {field: inputs[field] for field in ("old_logprobs", "teacher_logprobs", "mask")}
    with pytest.raises(
        ValueError, match="the batch has 1 completions; it must be a multiple of group_size = 2"
    ):
        topd_advantages(**scores, group_size=2)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(1, 2\)"):
        LossInputs(**(inputs | {"old_logprobs": torch.zeros(1, 2, dtype=torch.float64)}))
    with pytest.raises(ValueError, match="bool"):
        LossInputs(**(inputs | {"mask": torch.ones(1, 1)}))
