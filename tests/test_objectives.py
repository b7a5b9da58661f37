"""Numbers of the objectives: by hand, against the slow reference, limits, invariances, gradients (METHODS in float64)."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from reference import grpo_token, kl_token, opd_token, trrd_token
from rlad.batch import LossInputs
from rlad.objectives import OBJECTIVES, token_loss
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.kdrl import kdrl_loss
from rlad.objectives.opd import opd_loss
from rlad.objectives.trrd import trrd_loss

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NAMES = sorted(OBJECTIVES)
WITH_TEACHER = [name for name in NAMES if OBJECTIVES[name].needs_teacher]


def random_inputs(seed: int = 0, batch: int = 6, length: int = 7, spread: float = 1.0) -> dict[str, Tensor]:
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


def loss_of(name: str, inputs: dict[str, Tensor], **knobs: Any) -> Tensor:
    row = OBJECTIVES[name]
    return row.function(**{field: inputs[field] for field in row.needs}, **knobs)[0]


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


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("s", "o", "t", "a", "loss", "gradient"),
    [
        # alpha .5, c 1. log r = .5*(-1+1) + .5*clamp(-1+1.4) = .2; r = e^.2 = 1.2214 < 1.28: loss -r*2, gradient the same.
        (-1.0, -1.0, -1.4, 2.0, -2 * math.exp(0.2), -2 * math.exp(0.2)),
        # The teacher finds it unlikely: log r = .5*.8 = .4, r = 1.4918 > 1.28: loss -1.28*2, no gradient.
        (-1.0, -1.0, -1.8, 2.0, -2.56, 0.0),
        # The same token with a negative advantage: the minimum takes r itself, punished with weight r.
        (-1.0, -1.0, -1.8, -2.0, 2 * math.exp(0.4), 2 * math.exp(0.4)),
        # The teacher likes it: log r = .5*(-.6) = -.3, r = .7408 < .8: protected, loss .8*2, no gradient.
        (-1.0, -1.0, -0.4, -2.0, 1.6, 0.0),
        # Far beyond the clamp: log πS - log πT = 3 -> 1, log r = .5; the clamp leaves alpha = .5 of the gradient.
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
    inputs = one_token(-1.0, -1.2, -0.5, 1.0)  # d = log πT - log πS = .5; GRPO ratio e^.2 = 1.2214, inside the clip
    grpo = -math.exp(0.2)
    assert loss_of("kdrl", inputs, kd_coef=0.1).item() == pytest.approx(grpo + 0.1 * 0.125, abs=1e-14)
    k3 = math.exp(0.5) - 1.5
    assert loss_of("kdrl", inputs, kd_coef=0.1, kd_estimator="k3").item() == pytest.approx(grpo + 0.1 * k3, abs=1e-14)
    # advantage log πT - log πold = .7, ratio e^.2
    assert loss_of("opd", inputs).item() == pytest.approx(-0.7 * math.exp(0.2), abs=1e-14)


@pytest.mark.parametrize(
    ("alpha", "upper", "lower"),
    [(0.1, 0.274, -0.248), (0.3, 0.353, -0.319), (0.5, 0.494, -0.446), (0.7, 0.823, -0.744), (0.9, None, None)],
)
def test_gates_of_the_first_step(alpha: float, upper: float | None, lower: float | None) -> None:
    """With πS = πold the gate opens at ℓ = log(1.28)/(1-alpha) and log(.8)/(1-alpha), never where that is beyond the clamp."""

    def gradient(log_ratio: float, advantage: float) -> float:
        return value_and_gradient("trrd", one_token(-2.0, -2.0, -2.0 - log_ratio, advantage), alpha=alpha)[1].item()

    if upper is None or lower is None:
        assert gradient(5.0, 1.0) != 0
        assert gradient(-5.0, -1.0) != 0
    else:
        assert (gradient(upper - 0.001, 1.0) != 0, gradient(upper + 0.001, 1.0)) == (True, 0)
        assert (gradient(lower + 0.001, -1.0) != 0, gradient(lower - 0.001, -1.0)) == (True, 0)


def test_first_step_ratio_stays_within_the_clamp() -> None:
    ratios = [trrd_loss(**one_token(-40.0, -40.0, t, 1.0))[1]["ratio"].item() for t in (-80.0, -41.0, -39.0, 0.0)]
    assert min(ratios) == pytest.approx(0.60653, abs=1e-5)
    assert max(ratios) == pytest.approx(1.64872, abs=1e-5)


# --- against the slow reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_slow_reference(name: str, seed: int) -> None:
    inputs = random_inputs(seed)
    loss = loss_of(name, inputs)
    for i, j in inputs["mask"].nonzero().tolist():
        s, o, t = (inputs[f"{who}_logprobs"][i, j].item() for who in ("student", "old", "teacher"))
        a = inputs["advantages"][i].item()
        expected = {
            "trrd": trrd_token(s, o, t, a, alpha=0.5, c=1.0, **CLIP),
            "grpo": grpo_token(s, o, a, **CLIP),
            "kdrl": grpo_token(s, o, a, **CLIP) + 2e-3 * kl_token(s, t, "k2"),
            "opd": opd_token(s, o, t),
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
def test_trrd_equals_the_slow_reference_anywhere(s: float, o: float, t: float, a: float, alpha: float, c: float | None) -> None:
    loss = trrd_loss(**one_token(s, o, t, a), alpha=alpha, teacher_log_ratio_clip=c, **CLIP)[0].item()
    assert loss == pytest.approx(trrd_token(s, o, t, a, alpha=alpha, c=c, **CLIP), rel=1e-12, abs=1e-12)


# --- identities and limits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trrd_with_alpha_1_is_grpo(clip: float | None, level: str) -> None:
    inputs = random_inputs()
    trrd = value_and_gradient("trrd", inputs, alpha=1.0, teacher_log_ratio_clip=clip, ratio_level=level)
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
    at_old, grpo_at_old = value_and_gradient("trrd", inputs, alpha=alpha), value_and_gradient("grpo", inputs)
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
    assert not torch.allclose(value_and_gradient(name, inputs)[1], value_and_gradient(name, other)[1], atol=1e-4)


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


def test_zero_advantage_is_zero_gradient_as_the_table_says() -> None:
    inputs = random_inputs() | {"advantages": torch.zeros(6, dtype=torch.float64)}
    for name in NAMES:
        gradient = value_and_gradient(name, inputs)[1]
        assert (gradient == 0).all() == OBJECTIVES[name].zero_advantage_is_zero_gradient


def _expected_over_samples(name: str, logits: Tensor, teacher: Tensor, **knobs: Any) -> Tensor:
    """Expected loss over every token of a small vocabulary, weighted by the (detached) sampling policy, no reward."""
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


@pytest.mark.parametrize(("name", "knobs"), [("opd", {}), ("kdrl", {"kd_coef": 1.0, "kd_estimator": "k2"})])
def test_the_expected_gradient_is_that_of_the_reverse_kl(name: str, knobs: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(9, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad(_expected_over_samples(name, logits, teacher, **knobs), logits)
    student = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher.log_softmax(-1))).sum(), logits)
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


# --- mask, dropped tokens, extremes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_have_no_influence(name: str, garbage: float) -> None:
    inputs = random_inputs()
    spoilt = dict(inputs)
    for field in ("student_logprobs", "old_logprobs", "teacher_logprobs"):
        spoilt[field] = inputs[field].detach().masked_fill(~inputs["mask"], garbage)
    spoilt["advantages"] = inputs["advantages"][:, None].expand(inputs["mask"].shape).masked_fill(~inputs["mask"], garbage)
    for ours, clean in zip(value_and_gradient(name, spoilt), value_and_gradient(name, inputs), strict=True):
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
    for ours, expected in zip(value_and_gradient(name, spoilt), value_and_gradient(name, smaller), strict=True):
        assert torch.equal(ours, expected)
    row = OBJECTIVES[name]
    dropped = row.function(**{field: spoilt[field] for field in row.needs})[1]["dropped"]
    assert dropped.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("s", "o", "t"), [(-80.0, 0.0, 0.0), (0.0, -80.0, -80.0), (-80.0, -80.0, 0.0), (0.0, 0.0, -80.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_extreme_logprobs_stay_finite_in_float32(name: str, s: float, o: float, t: float, advantage: float) -> None:
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in one_token(s, o, t, advantage).items()}
    value, gradient = value_and_gradient(name, inputs)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


def test_a_gated_token_has_gradient_zero_also_where_the_ratio_overflows() -> None:
    for inputs in (one_token(-0.01, -0.01, -200.0, 1.0), one_token(-0.01, -300.0, -200.0, 1.0)):
        inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
        assert value_and_gradient("trrd", inputs, teacher_log_ratio_clip=None)[1].item() == 0
    assert value_and_gradient("grpo", one_token(-0.01, -1000.0, 0, 1.0))[1].item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    inputs = random_inputs(seed=3, batch=3, length=4)
    assert torch.autograd.gradcheck(lambda s: loss_of(name, inputs | {"student_logprobs": s}), inputs["student_logprobs"])


@pytest.mark.parametrize("name", NAMES)
def test_only_the_student_receives_a_gradient(name: str) -> None:
    inputs = random_inputs()
    for field in ("old_logprobs", "teacher_logprobs"):
        inputs[field] = inputs[field].clone().requires_grad_()
    with pytest.raises(ValueError, match="carries a gradient"):
        LossInputs(**inputs)


# --- sequence level, dual clip, leash, refusals -----------------------------------------------------------------------


def test_sequence_level_ratio_by_hand() -> None:
    """GSPO: both tokens share the ratio exp(mean of .1 and .3) = e^.2 and half of its gradient each."""
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
    with pytest.raises(ValueError, match="its gradient does not depend on the teacher"):
        kdrl_loss(**inputs, kd_estimator="k1")  # type: ignore[arg-type]
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha is .*\[0, 1\]"):
            trrd_loss(**inputs, alpha=alpha)
    without_teacher = LossInputs(**{k: v for k, v in inputs.items() if k != "teacher_logprobs"})
    with pytest.raises(ValueError, match="'trrd' needs teacher_logprobs"):
        token_loss("trrd", without_teacher)
    with pytest.raises(ValueError, match=r"old_logprobs has shape \(1, 2\)"):
        LossInputs(**(inputs | {"old_logprobs": torch.zeros(1, 2, dtype=torch.float64)}))
    with pytest.raises(ValueError, match="bool"):
        LossInputs(**(inputs | {"mask": torch.ones(1, 1)}))


def test_the_public_functions_are_those_of_the_table() -> None:
    assert [row.function for row in OBJECTIVES.values()] == [trrd_loss, grpo_loss, kdrl_loss, opd_loss]
