"""SRPO by hand, against a slow reference, at its limits, and the spans that it weighs."""

import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import reference
from rlad.config.capabilities import require_engine
from rlad.config.objective import SRPOConfig, TRRDConfig
from rlad.errors import UserError
from rlad.objectives import token_loss
from rlad.objectives.grpo import grpo_loss
from rlad.objectives.inputs import LossInputs
from rlad.objectives.rlsd import rlsd_loss
from rlad.objectives.srpo import srpo_loss
from rlad.objectives.trrd import trrd_loss
from rlad.rollouts.roles import role_spans

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
NAN = math.nan


def random_inputs(seed=0, batch=6, length=9):
    generator = torch.Generator().manual_seed(seed)

    def draw(spread):
        return torch.randn(batch, length, generator=generator, dtype=torch.float64) * spread

    lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
    evidence = draw(1.5)
    evidence[torch.rand(batch, length, generator=generator) < 0.3] = NAN
    evidence[1] = NAN  # a completion that does not parse
    old = -draw(1).abs()
    return {
        "student_logprobs": (old + draw(0.3)).requires_grad_(),
        "old_logprobs": old,
        "role_evidence": evidence,
        "advantages": torch.randn(batch, generator=generator, dtype=torch.float64),
        "mask": torch.arange(length)[None] < lengths,
    }


def test_srpo_by_hand():
    """A > 0, evidence ln 2, 0 and none: r = 2, 1; their mean is 1.5; lambda .5 gives 1.25 and .75,
    which are clipped to 1.2 and .8; the third token has the weight 1."""
    rows = torch.zeros(1, 3, dtype=torch.float64)
    inputs = {
        "student_logprobs": rows,
        "old_logprobs": rows,
        "role_evidence": torch.tensor([[math.log(2), 0.0, NAN]], dtype=torch.float64),
        "mask": torch.ones(1, 3, dtype=torch.bool),
    }
    loss, stats = srpo_loss(**inputs, advantages=torch.ones(1, dtype=torch.float64))
    assert stats["advantage_weight"].tolist() == [[1.2, 0.8, 1.0]]
    assert loss.tolist() == [[-1.2, -0.8, -1.0]]
    # A < 0: r = 1/2, 1; mean .75; 1 - .125 and 1 + .125. What the picture speaks for is blamed
    # less.
    loss, stats = srpo_loss(**inputs, advantages=-torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(
        stats["advantage_weight"], torch.tensor([[0.875, 1.125, 1.0]], dtype=torch.float64)
    )
    torch.testing.assert_close(loss, stats["advantage_weight"])


@pytest.mark.parametrize("seed", range(5))
def test_srpo_equals_the_slow_reference(seed):
    inputs = random_inputs(seed)
    loss, stats = srpo_loss(**inputs)
    for i, count in enumerate(inputs["mask"].sum(1).tolist()):
        a = float(inputs["advantages"][i])
        evidence = inputs["role_evidence"][i, :count].tolist()
        weights = reference.srpo_weights(
            evidence, a, evidence_weight=0.5, weight_clip=0.2, contrast_clip=2.0
        )
        assert stats["advantage_weight"][i, :count].tolist() == pytest.approx(weights, abs=1e-12)
        for j in range(count):
            s = float(inputs["student_logprobs"][i, j])
            o = float(inputs["old_logprobs"][i, j])
            expected = reference.grpo_token(s, o, a * weights[j], **CLIP)
            assert float(loss[i, j]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("evidence", "knobs"), [(0.0, {}), (NAN, {}), (1.3, {}), (None, {"evidence_weight": 0.0})]
)
def test_without_a_contrast_between_tokens_it_is_grpo(evidence, knobs):
    inputs = random_inputs()
    if evidence is not None:
        inputs["role_evidence"] = torch.full_like(inputs["role_evidence"], evidence)
    loss, stats = srpo_loss(**inputs, **knobs)
    plain = {name: value for name, value in inputs.items() if name != "role_evidence"}
    expected, _ = grpo_loss(**plain, **CLIP)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    weights = stats["advantage_weight"][inputs["mask"]]
    torch.testing.assert_close(weights, torch.ones_like(weights), atol=1e-12, rtol=0)


def test_weights_never_flip_a_sign_nor_overflow():
    inputs = random_inputs(3)
    inputs["role_evidence"] = inputs["role_evidence"] * 1e4
    _, stats = srpo_loss(**inputs, weight_clip=0.99, evidence_weight=10.0)
    weights = stats["advantage_weight"]
    assert weights.isfinite().all()
    assert weights.min() > 0


def test_masks_padding_and_order_change_nothing():
    inputs = random_inputs(2)
    loss, _ = srpo_loss(**inputs)
    poisoned = dict(inputs)
    for name in ("old_logprobs", "role_evidence"):
        poisoned[name] = inputs[name].masked_fill(~inputs["mask"], math.inf)
    assert torch.equal(srpo_loss(**poisoned)[0], loss)
    wider = {
        name: value if value.dim() == 1 else torch.nn.functional.pad(value, (0, 3))
        for name, value in inputs.items()
    }
    torch.testing.assert_close(srpo_loss(**wider)[0][:, :-3], loss, atol=1e-12, rtol=0)
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    moved, _ = srpo_loss(**{name: value[order] for name, value in inputs.items()})
    torch.testing.assert_close(moved, loss[order], atol=1e-12, rtol=0)


def test_the_gradient_is_that_of_the_loss():
    inputs = random_inputs(4)
    student = inputs.pop("student_logprobs").detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda values: srpo_loss(student_logprobs=values, **inputs)[0].sum(), (student,)
    )


def test_rlsd_and_srpo_weigh_by_the_same_ratio():
    rows = torch.zeros(1, 2, dtype=torch.float64)
    evidence = torch.tensor([[0.3, -0.1]], dtype=torch.float64)
    common = {
        "student_logprobs": rows,
        "old_logprobs": rows,
        "advantages": torch.ones(1, dtype=torch.float64),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    _, ours = srpo_loss(**common, role_evidence=evidence, evidence_weight=1.0, weight_clip=0.9)
    _, theirs = rlsd_loss(**common, teacher_logprobs=evidence, teacher_weight=1.0, weight_clip=0.9)
    ratio = theirs["advantage_weight"]
    torch.testing.assert_close(ours["advantage_weight"], 1 + ratio - ratio.mean())


def test_mistakes_are_sentences():
    inputs = random_inputs()
    with pytest.raises(ValueError, match=r"weight_clip 1\.5"):
        srpo_loss(**inputs, weight_clip=1.5)
    del inputs["role_evidence"]
    with pytest.raises(ValueError, match="needs role_evidence"):
        token_loss("srpo", LossInputs(**inputs))
    with pytest.raises(ValueError, match="must name"):
        SRPOConfig(reasoning_template="Think.")


# --- spans ----------------------------------------------------------------------------------------


def spans_of(text):
    """Spans of a completion whose tokens are separated by `|`."""
    words = text.split("|")
    return role_spans(range(len(words)), lambda ids: "".join(words[i] for i in ids))


def test_spans_are_the_tokens_between_the_tags():
    spans = spans_of("<perception>| red| circle|</perception>|<reasoning>|so |1|</reasoning>|1")
    assert spans is not None
    assert spans.perception == range(1, 3)
    assert spans.reasoning == range(5, 7)
    assert spans.reasoning_opens == 4


def test_a_token_with_a_part_of_a_tag_is_the_tags():
    spans = spans_of("<per|ception>red| circle| blue</perc|eption>|<reasoning>|so |</reasoning>")
    assert spans is not None
    assert spans.perception == range(2, 3)
    assert spans.reasoning == range(6, 7)


@pytest.mark.parametrize(
    "text",
    [
        "<perception>| red|</perception>",
        "<reasoning>|so|</reasoning>|<perception>| red|</perception>",
        "<perception>|</perception>|<reasoning>|so|</reasoning>",
        "<perception>|a|</perception>|<perception>|b|</perception>|<reasoning>|so|</reasoning>",
        "<perception>| red|<reasoning>|so|</reasoning>|</perception>",
        "<perception>red</perception>|<reasoning>|so|</reasoning>",
    ],
)
def test_what_does_not_parse_has_no_roles(text):
    assert spans_of(text) is None


def test_a_character_of_several_tokens_is_whole_in_its_span():
    """Before its last byte is there, a tokenizer writes a mark for each byte of it."""
    tags = ["<perception>", "</perception>", "<reasoning>", "</reasoning>"]
    pieces = [*tags, "ab", "<0xF0>", "<0x9F>", "<0x94>", "<0xB4>"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "ab"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    ids = [0, 4, 5, 6, 7, 8, 1, 2, 5, 6, 7, 8, 4, 3]
    assert len(tokenizer.decode(ids[:5])) > len(tokenizer.decode(ids[:6]))
    spans = role_spans(ids, tokenizer.decode)
    assert spans is not None
    assert (spans.perception, spans.reasoning) == (range(1, 6), range(8, 13))


# --- the same weights in TRRD -------------------------------------------------------------------

TAUGHT: dict[str, Any] = {"alpha": 0.5, "teacher_log_ratio_clip": 1.0}


def taught_inputs(seed=0):
    inputs = random_inputs(seed)
    generator = torch.Generator().manual_seed(seed + 100)
    noise = torch.randn(inputs["mask"].shape, generator=generator, dtype=torch.float64)
    return inputs | {"teacher_logprobs": inputs["old_logprobs"] + 0.8 * noise}


def test_trrd_with_role_weights_by_hand():
    """The weights are those of `test_srpo_by_hand`; the teacher finds the second token e^.2 times
    less likely, so its ratio is e^.1."""
    rows = torch.zeros(1, 3, dtype=torch.float64)
    loss, stats = trrd_loss(
        student_logprobs=rows,
        old_logprobs=rows,
        teacher_logprobs=torch.tensor([[0.0, -0.2, 0.0]], dtype=torch.float64),
        role_evidence=torch.tensor([[math.log(2), 0.0, NAN]], dtype=torch.float64),
        advantages=torch.ones(1, dtype=torch.float64),
        mask=torch.ones(1, 3, dtype=torch.bool),
        evidence_weight=0.5,
        **TAUGHT,
    )
    assert stats["advantage_weight"].tolist() == [[1.2, 0.8, 1.0]]
    assert loss[0].tolist() == pytest.approx([-1.2, -0.8 * math.exp(0.1), -1.0], abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_trrd_with_role_weights_equals_the_slow_reference(seed):
    inputs = taught_inputs(seed)
    loss, _ = trrd_loss(**inputs, evidence_weight=0.7, **TAUGHT)
    knobs = {"evidence_weight": 0.7, "weight_clip": 0.2, "contrast_clip": 2.0}
    for i, count in enumerate(inputs["mask"].sum(1).tolist()):
        a = float(inputs["advantages"][i])
        weights = reference.srpo_weights(inputs["role_evidence"][i, :count].tolist(), a, **knobs)
        for j in range(count):
            s, o, t = (
                float(inputs[name][i, j])
                for name in ("student_logprobs", "old_logprobs", "teacher_logprobs")
            )
            expected = reference.trrd_token(s, o, t, a * weights[j], alpha=0.5, c=1.0, **CLIP)
            assert float(loss[i, j]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("evidence_weight", [0.0, None])
def test_without_role_weights_it_is_trrd_bit_for_bit(evidence_weight):
    inputs = taught_inputs(4)
    plain = {name: value for name, value in inputs.items() if name != "role_evidence"}
    given = plain if evidence_weight is None else inputs | {"evidence_weight": evidence_weight}
    loss, stats = trrd_loss(**given, **TAUGHT)
    expected, before = trrd_loss(**plain, **TAUGHT)
    assert torch.equal(loss, expected)
    for name, value in before.items():
        assert torch.equal(stats[name], value)


def test_with_alpha_1_it_is_srpo():
    inputs = taught_inputs(5)
    loss, _ = trrd_loss(**inputs, alpha=1.0, evidence_weight=0.5)
    del inputs["teacher_logprobs"]
    torch.testing.assert_close(loss, srpo_loss(**inputs)[0], atol=1e-12, rtol=0)


def test_the_config_of_trrd_asks_for_roles_only_with_a_weight():
    assert not TRRDConfig().weighs_roles
    assert TRRDConfig(evidence_weight=0.5).weighs_roles
    # Without a weight it still needs its evidence, as its function does.
    assert SRPOConfig(evidence_weight=0.0).weighs_roles
    with pytest.raises(UserError, match=r"objective.evidence_weight is not available on TRL"):
        require_engine("trl", TRRDConfig(evidence_weight=0.5))
