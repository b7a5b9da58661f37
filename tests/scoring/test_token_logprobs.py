"""Log-probs in tiles against `log_softmax`."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlad.scoring import token_logprobs as in_tiles
from rlad.scoring.distributions import Distributions
from rlad.scoring.tiles import tile_shape, tokens_per_chunk
from tiny_models import LargestTensor

INF = math.inf


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    with_entropy: bool = True,
    tile: tuple[int, int] | None = None,
    **readout: Any,
) -> tuple[Tensor, Tensor]:
    distributions = Distributions(hidden, weight, bias, **readout)
    return in_tiles.token_logprobs(distributions, ids, with_entropy=with_entropy, tile=tile)


def inputs(
    num_tokens: int = 37, hidden: int = 8, vocabulary: int = 23, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_tokens, hidden), (vocabulary, hidden), (vocabulary,))
    floats = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]
    return [*floats, torch.randint(vocabulary, (num_tokens,), generator=generator)]


def direct(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The definition, with the whole matrix of logits."""
    logprobs = ((hidden @ weight.T + (0 if bias is None else bias)) / temperature).log_softmax(
        dim=-1
    )
    return logprobs[torch.arange(len(ids)), ids], -(logprobs.exp() * logprobs).sum(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tile", [(1, 1), (5, 23), (37, 4), (10, 7), (256, 256)])
def test_values_and_gradients_are_those_of_log_softmax(
    tile: tuple[int, int], has_bias: bool, temperature: float
) -> None:
    hidden, weight, bias, ids = inputs()
    leaves = [hidden, weight, bias] if has_bias else [hidden, weight]
    upstream = torch.randn(
        len(ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )

    expected, expected_entropy = direct(
        hidden, weight, bias if has_bias else None, ids, temperature
    )
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
    ours, entropy = token_logprobs(
        hidden, weight, bias if has_bias else None, ids, temperature=temperature, tile=tile
    )
    gradients = torch.autograd.grad((ours * upstream).sum(), leaves)

    assert torch.allclose(ours, expected, rtol=0, atol=1e-13)
    assert torch.allclose(entropy, expected_entropy, rtol=0, atol=1e-13)
    assert not entropy.requires_grad
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-12)


def test_without_entropy_the_rest_is_the_same_and_entropy_is_nan() -> None:
    hidden, weight, bias, ids = inputs()
    whole, _ = token_logprobs(hidden, weight, bias, ids)
    alone, entropy = token_logprobs(hidden, weight, bias, ids, with_entropy=False)
    assert torch.equal(whole, alone) and bool(entropy.isnan().all())
    gradients = [
        torch.autograd.grad(values.sum(), [hidden, weight, bias]) for values in (whole, alone)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("vocabulary", "expected"), [(333, 12595), (50_000, 83), (151_936, 27), (2**20, 16)]
)
def test_a_chunk_holds_the_same_number_of_logits_whatever_the_vocabulary(
    vocabulary: int, expected: int
) -> None:
    assert tokens_per_chunk("cpu", vocabulary) == expected


@pytest.mark.parametrize(
    ("num_tokens", "vocabulary", "expected"),
    [
        (100_000, 150_000, (724, 724)),
        (512, 150_000, (512, 1024)),
        (1, 150_000, (1, 150_000)),
        (100_000, 400, (1310, 400)),
        (100, 400, (100, 400)),
        (0, 400, (1, 400)),
    ],
)
def test_a_tile_is_near_a_square_or_all_there_is(
    num_tokens: int, vocabulary: int, expected: tuple[int, int]
) -> None:
    assert tile_shape("cpu", num_tokens, vocabulary) == expected
    assert expected[0] * expected[1] <= 2**19


def test_a_token_outside_of_the_vocabulary_has_no_logprob() -> None:
    """NaN, which is what a missing score is everywhere; the others are as without it."""
    hidden, weight, bias, ids = inputs()
    whole, _ = token_logprobs(hidden, weight, bias, ids)
    ids[[3, 5]] = torch.tensor([23, -1])
    logprobs, _ = token_logprobs(hidden, weight, bias, ids, tile=(10, 7))
    assert logprobs.isnan().nonzero().squeeze(1).tolist() == [3, 5]
    kept = ~logprobs.isnan()
    assert torch.allclose(logprobs[kept], whole[kept], rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_the_weights_can_be_added_to_a_sum(dtype: torch.dtype) -> None:
    """As autograd would add it, and autograd is given none; the sum is float32 where the weights
    are computed in bfloat16."""
    hidden, weight, bias, ids = inputs(
        dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    total = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    before, narrow = total.clone(), [tensor.to(dtype) for tensor in (hidden, weight, bias)]
    expected = torch.autograd.grad(token_logprobs(*narrow, ids)[0].sum(), [hidden, weight, bias])
    loss = token_logprobs(
        *(tensor.to(dtype) for tensor in (hidden, weight, bias)), ids, weight_grad=total
    )[0].sum()
    ours = torch.autograd.grad(loss, [hidden, weight, bias], allow_unused=True)
    assert ours[1] is None
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[2], expected[2])
    # What autograd hands on is rounded to bfloat16.
    rounding = 1e-13 if dtype == torch.float64 else float(expected[1].abs().max()) / 2**8
    assert torch.allclose(total - before, expected[1], rtol=0, atol=rounding)
    assert float(expected[1].abs().max()) > 1


def test_gradcheck() -> None:
    hidden, weight, bias, ids = inputs(num_tokens=5, hidden=3, vocabulary=4)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, b, ids, temperature=0.7, tile=(2, 3))[0],
        (hidden, weight, bias),
    )


def test_gradients_only_where_they_are_wanted() -> None:
    hidden, weight, bias, ids = inputs()
    whole = torch.autograd.grad(
        token_logprobs(hidden, weight, bias, ids)[0].sum(), [hidden, weight]
    )
    (only_hidden,) = torch.autograd.grad(
        token_logprobs(hidden, weight.detach(), None, ids)[0].sum(), [hidden]
    )
    (without_bias,) = torch.autograd.grad(
        token_logprobs(hidden, weight, None, ids)[0].sum(), [hidden]
    )
    assert torch.equal(only_hidden, without_bias)
    (only_weight,) = torch.autograd.grad(
        token_logprobs(hidden.detach(), weight, bias.detach(), ids)[0].sum(), [weight]
    )
    assert torch.equal(only_weight, whole[1])


def test_a_second_derivative_is_refused() -> None:
    """The backward pass is not itself differentiable; a wrong number would be worse than an
    error."""
    hidden, weight, bias, ids = inputs()
    loss = token_logprobs(hidden, weight, bias, ids)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_bfloat16_inputs_are_exact_but_for_the_logits_rounding() -> None:
    """bfloat16 keeps 8 bits: a logit of size x is off by at most x/2^8, the log-prob by at most
    twice the largest.

    Over 6000 tiles, whose gradients are summed in float32: in bfloat16 their errors would be .0075
    and more.
    """
    hidden, weight, bias, ids = inputs(
        num_tokens=300, hidden=16, vocabulary=500, dtype=torch.bfloat16
    )
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, bias)]
    ours, _ = token_logprobs(hidden, weight, bias, ids, tile=(5, 5))
    expected, _ = direct(*wide, ids)
    largest_logit = float((wide[0] @ wide[1].T + wide[2]).detach().abs().max())
    assert ours.dtype == torch.float32
    assert float((ours - expected).detach().abs().max()) < 2 * largest_logit / 2**8

    gradients = torch.autograd.grad(ours.sum(), [hidden, weight, bias])
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected.sum(), wide), strict=True):
        assert gradient.dtype == torch.bfloat16
        assert float((gradient - wanted).norm() / wanted.norm()) < 0.0065


@pytest.mark.parametrize("spread", [1.0, 8.0, 24.0])
@pytest.mark.parametrize("tile", [(300, 500), (50, 60)])
def test_entropy_in_float32_is_exact_of_peaked_distributions_too(
    tile: tuple[int, int], spread: float
) -> None:
    hidden, weight, bias, ids = (
        t.detach() for t in inputs(num_tokens=300, hidden=16, vocabulary=500, dtype=torch.float32)
    )
    hidden = hidden * (spread / 4)  # 16 products of two standard normals have the spread 4
    logits = torch.nn.functional.linear(hidden, weight, bias).double()
    logprobs = logits.log_softmax(dim=-1)
    _, entropy = token_logprobs(hidden, weight, bias, ids, tile=tile)
    assert torch.allclose(
        entropy.double(), -(logprobs.exp() * logprobs).sum(dim=-1), rtol=0, atol=1e-5
    )


def test_no_tokens_give_no_logprobs_and_zero_gradient() -> None:
    hidden, weight, bias, ids = inputs(num_tokens=0)
    logprobs, entropy = token_logprobs(hidden, weight, bias, ids)
    assert (logprobs.shape, entropy.shape, logprobs.dtype) == ((0,), (0,), torch.float64)
    logprobs.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == hidden.shape
    assert weight.grad is not None
    assert (weight.grad == 0).all()


def test_a_token_of_probability_zero() -> None:
    """A bias of -inf: log-prob -inf for that token, finite entropy and gradients for the others."""
    hidden, weight, bias, ids = inputs()
    with torch.no_grad():
        bias[3] = -INF
    ids[:] = 5
    logprobs, entropy = token_logprobs(hidden, weight, bias, ids)
    assert torch.isfinite(entropy).all()
    assert all(
        torch.isfinite(g).all() for g in torch.autograd.grad(logprobs.sum(), [hidden, weight, bias])
    )
    ids[0] = 3
    assert token_logprobs(hidden, weight, bias, ids)[0][0] == -INF


@pytest.mark.parametrize("bias_of_others", [-INF, -1e300])
def test_a_tile_without_any_probability_changes_nothing(bias_of_others: float) -> None:
    """The entries of a padded vocabulary, say: a bias of -inf for all of a tile is as good as no
    such entries."""
    hidden, weight, bias, ids = inputs()
    ids %= 20
    with torch.no_grad():
        bias[20:] = bias_of_others
    logprobs, entropy = token_logprobs(hidden, weight, bias, ids, tile=(10, 5))
    short, short_entropy = token_logprobs(hidden, weight[:20], bias[:20], ids)
    assert torch.allclose(logprobs, short, rtol=0, atol=1e-13) and torch.allclose(
        entropy, short_entropy, rtol=0, atol=1e-13
    )
    gradients, expected = (
        torch.autograd.grad(values.sum(), [hidden, weight, bias]) for values in (logprobs, short)
    )
    assert all(
        torch.allclose(ours, right, rtol=0, atol=1e-12)
        for ours, right in zip(gradients, expected, strict=True)
    )


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    num_tokens, vocabulary = 4096, 512
    hidden, weight, _, ids = inputs(
        num_tokens=num_tokens, hidden=4, vocabulary=vocabulary, dtype=torch.float32
    )
    with LargestTensor() as ours:
        token_logprobs(hidden, weight, None, ids, tile=(64, 256))[0].sum().backward()
    assert (
        ours.num_elements == 64 * 256 == num_tokens * 4
    )  # a tile of logits is as large as the hidden states here
    with LargestTensor() as whole:
        direct(hidden, weight, None, ids)[0].sum().backward()
    assert whole.num_elements == num_tokens * vocabulary


# --- scaled and capped logits ---------------------------------------------------------------------

TRANSFORMS = [(0.25, None), (1.0, 1.5), (3.0, 2.0), (1.0, 30.0)]


def capped(logits: Tensor, scale: float, soft_cap: float | None) -> Tensor:
    return logits * scale if soft_cap is None else soft_cap * torch.tanh(logits * scale / soft_cap)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("scale", "soft_cap"), TRANSFORMS)
def test_scaled_and_capped_logits_have_the_gradient_of_log_softmax(
    scale, soft_cap, has_bias, temperature
) -> None:
    hidden, weight, bias, ids = inputs()
    leaves = [hidden, weight, *([bias] if has_bias else [])]
    upstream = torch.randn(
        len(ids), generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    logits = capped(hidden @ weight.T + (bias if has_bias else 0), scale, soft_cap) / temperature
    logprobs = logits.log_softmax(dim=-1)
    expected = logprobs[torch.arange(len(ids)), ids]
    ours, entropy = token_logprobs(
        hidden, weight, bias if has_bias else None, ids,
        scale=scale, soft_cap=soft_cap, temperature=temperature, tile=(5, 6),
    )  # fmt: skip
    assert torch.allclose(ours, expected, rtol=0, atol=1e-13)
    assert torch.allclose(entropy, -(logprobs.exp() * logprobs).sum(dim=-1), rtol=0, atol=1e-13)
    gradients, wanted = (
        torch.autograd.grad((values * upstream).sum(), leaves) for values in (ours, expected)
    )
    for gradient, right in zip(gradients, wanted, strict=True):
        assert (
            torch.allclose(gradient, right, rtol=1e-12, atol=1e-12)
            and float(right.abs().max()) > 0.01
        )


def test_a_capped_log_prob_by_hand() -> None:
    """Two tokens of logits 3 x 1 and 3 x -1 under a cap of 2: log sigmoid of twice 2 tanh(1.5);
    slope 1 - tanh(1.5)^2."""
    hidden, weight = (
        torch.ones(1, 1, dtype=torch.float64, requires_grad=True),
        torch.tensor([[1.0], [-1.0]]).double(),
    )
    logprobs, _ = token_logprobs(hidden, weight, None, torch.tensor([0]), scale=3.0, soft_cap=2.0)
    difference = 2 * 2 * math.tanh(1.5)
    assert logprobs.item() == pytest.approx(-math.log1p(math.exp(-difference)), abs=1e-14)
    logprobs.sum().backward()
    assert hidden.grad is not None
    slope = 2 * 3 * (1 - math.tanh(1.5) ** 2)
    assert hidden.grad.item() == pytest.approx(slope / (1 + math.exp(difference)), rel=1e-12)


def test_a_cap_that_nothing_reaches_changes_nothing() -> None:
    hidden, weight, bias, ids = inputs()
    plain, far = (token_logprobs(hidden, weight, bias, ids, soft_cap=cap)[0] for cap in (None, 1e6))
    assert torch.allclose(plain, far, rtol=0, atol=1e-9)


def test_gradcheck_of_scaled_and_capped_logits() -> None:
    hidden, weight, bias, ids = inputs(num_tokens=5, hidden=3, vocabulary=4)

    def logprobs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_logprobs(h, w, b, ids, scale=0.5, soft_cap=1.0, temperature=0.7, tile=(2, 3))[
            0
        ]

    assert torch.autograd.gradcheck(logprobs, (hidden, weight, bias))


def test_capped_logits_exist_for_a_tile() -> None:
    hidden, weight, _, ids = inputs(num_tokens=4096, hidden=4, vocabulary=512, dtype=torch.float32)
    with LargestTensor() as largest:
        token_logprobs(hidden, weight, None, ids, scale=0.5, soft_cap=2.0, tile=(128, 512))[
            0
        ].sum().backward()
    assert largest.num_elements == 128 * 512
