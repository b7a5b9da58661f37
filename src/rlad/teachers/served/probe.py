"""One server, asked with the student's tokens what it offers and whether its scores can be
trusted."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from rlad.config.teacher import ServedTeacherConfig
from rlad.teachers.base import Setting
from rlad.teachers.served.client import (
    CompletionsClient,
    ServerRefusedError,
    ServerUnavailableError,
)
from rlad.teachers.served.protocol import (
    Scoring,
    TokenScores,
    generation_request,
    max_answer_bytes,
    read_generation,
    read_scores,
    scoring_request,
)
from rlad.teachers.served.token_strings import ids_of_strings, probe_ids

NUM_CUTS, NUM_WRITTEN = 4, 5
"""places in the probe at which the server goes on writing, and how many tokens it writes"""
NUM_LIKELIEST = 5
MODEL_LIST_BYTES = 4 * 1024**2
MAX_ROOT_LETTERS = 200

Pairs = list[tuple[float, float]]


class SelfTestFailed(Exception):
    """One sentence about what does not fit."""


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server says of the model that it offers."""

    identity: str
    context_tokens: int | None
    is_listed: bool = True


@dataclass(frozen=True, slots=True)
class Errors:
    """Mean and maximum of |difference| in nats, NaN where a value is missing."""

    mean: float
    max: float
    num_tokens: int

    @classmethod
    def between(cls, pairs: Iterable[tuple[float, float]]) -> "Errors":
        sizes = [abs(a - b) for a, b in pairs]
        if not sizes or any(map(math.isnan, sizes)):
            return cls(math.nan, math.nan, len(sizes))
        return cls(sum(sizes) / len(sizes), max(sizes), len(sizes))

    def within(self, tolerance: float) -> bool:
        return self.max <= tolerance  # false for NaN

    def __str__(self) -> str:
        return f"mean {self.mean:.2g}, max {self.max:.2g} nats over {self.num_tokens} tokens"


class ServerProbe:
    """One replica, asked with the student's tokens."""

    def __init__(
        self, client: CompletionsClient, url: str, settings: ServedTeacherConfig, setting: Setting
    ):
        self.client, self.url, self.settings, self.setting = client, url, settings, setting
        self.tokenizer = setting.student_tokenizer
        self.text = probe_ids(self.tokenizer)

    def offer(self) -> Offer:
        """`SelfTestFailed` unless the server can be reached and offers the model."""
        model = self.settings.model
        try:
            answer = self.client.ask(self.url, "/models", max_bytes=MODEL_LIST_BYTES)
        except ServerUnavailableError as error:
            if not error.is_connected:
                raise SelfTestFailed(
                    f"nothing answers at {error}; start the server, or correct teacher.urls."
                ) from None
            raise SelfTestFailed(
                f"the server gives no answer that can be used: {error}; look into its log."
            ) from None
        except ServerRefusedError as error:
            if error.status != 404:
                raise SelfTestFailed(str(error)) from None
            self._require_no_version_missing()
            return Offer(model, None, is_listed=False)
        cards = answer.get("data")
        cards = (
            [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        )
        for card in cards:
            if card.get("id") == model:
                root, longest = card.get("root"), card.get("max_model_len")
                root = root[:MAX_ROOT_LETTERS] if isinstance(root, str) else ""
                identity = model if root in ("", model) else f"{model} ({root})"
                longest = longest if isinstance(longest, int) and longest > 0 else None
                self.text = self.text[: longest - NUM_WRITTEN - 1] if longest else self.text
                return Offer(identity, longest)
        offered = ", ".join(repr(str(card.get("id"))[:100]) for card in cards[:10]) or "no model"
        raise SelfTestFailed(
            f"{self.url} offers {offered}, not {model!r}; set teacher.model to what it offers."
        )

    def _require_no_version_missing(self) -> None:
        try:
            self.client.ask(self.url, "/v1/models", max_bytes=MODEL_LIST_BYTES)
        except (ServerUnavailableError, ServerRefusedError):
            return
        raise SelfTestFailed(
            f"there is no {self.url}/models, but {self.url}/v1/models; add /v1 to it in "
            "teacher.urls."
        )

    def score(self, scoring: Scoring, tokens: Sequence[int], **wanted: Any) -> TokenScores:
        body = scoring_request(scoring, self.settings.model, tokens, **wanted)
        max_bytes = max_answer_bytes(len(tokens), NUM_LIKELIEST)
        return read_scores(
            scoring, self.client.ask(self.url, "/completions", body, max_bytes=max_bytes), tokens
        )

    def complete_scores(
        self, scoring: Scoring, tokens: Sequence[int], **wanted: Any
    ) -> TokenScores:
        """`SelfTestFailed` unless each token but the first has a score."""
        scores = self.score(scoring, tokens, **wanted)
        if missing := sum(map(math.isnan, scores.logprobs[1:])):
            raise SelfTestFailed(
                f"it gives no finite log-prob for {missing} of {len(tokens) - 1} given tokens"
            )
        return scores

    def require_trustworthy(self, scoring: Scoring) -> str:
        """What shows that scores are right; `SelfTestFailed` with what shows that they are not."""
        tolerance = self.settings.tolerance
        first, second = (
            self.complete_scores(scoring, self.text, num_likeliest=1).logprobs[1:] for _ in range(2)
        )
        repeated = Errors.between(zip(second, first, strict=True))
        if not repeated.within(tolerance):
            raise SelfTestFailed(
                f"it gives other log-probs for the same text each time ({repeated}; "
                f"teacher.tolerance is {tolerance:g})"
            )
        scored: Pairs = []
        shifted: dict[str, Pairs] = {"row": [], "earlier": [], "later": []}
        for prompt, ids, values in self._writings():
            scores, start = (
                self.complete_scores(scoring, [*prompt, *ids], num_likeliest=1),
                len(prompt),
            )
            top = [
                max((v for v in entry.values() if not math.isnan(v)), default=math.nan)
                for entry in scores.likeliest
            ]
            scored += zip(scores.logprobs[start:], values, strict=True)
            # Its own token with the next row of logits; the value of another token.
            shifted["row"] += zip(top[start - 1 : -1], values, strict=True)
            shifted["earlier"] += zip(scores.logprobs[start - 1 : -1], values, strict=True)
            shifted["later"] += zip(scores.logprobs[start + 1 :], values[:-1], strict=True)
        agreement = Errors.between(scored)
        if agreement.within(tolerance):
            return (
                f"by {scoring}; scores of text that the server wrote agree with those it gave when "
                f"writing ({agreement}), and "
                f"repeated scores with the first ({repeated})"
            )
        is_shifted = any(Errors.between(pairs).within(tolerance) for pairs in shifted.values())
        what = (
            "the server's scores are shifted by one token"
            if is_shifted
            else "the server scores another text or model"
        )
        raise SelfTestFailed(
            f"{what}: what it wrote has other log-probs when it scores it ({agreement}; "
            f"teacher.tolerance is {tolerance:g})"
        )

    def _writings(self) -> Iterator[tuple[list[int], list[int], list[float]]]:
        """Prompts cut out of the probe, and what the server goes on with: ids and log-probs."""
        surfaces: dict[str, int] | None = None
        for cut in range(1, NUM_CUTS + 1):
            prompt = self.text[: max(2, len(self.text) * cut // NUM_CUTS)]
            body = generation_request(self.settings.model, prompt, NUM_WRITTEN)
            answer = self.client.ask(
                self.url, "/completions", body, max_bytes=max_answer_bytes(NUM_WRITTEN)
            )
            surfaces = ids_of_strings(self.tokenizer) if surfaces is None else surfaces
            ids, values = read_generation(answer, surfaces)
            if not ids:
                raise SelfTestFailed(
                    "it does not say which tokens it writes with which log-probs (`logprobs`, "
                    "`return_tokens_as_token_ids`), "
                    "so that its scores cannot be checked against them"
                )
            yield prompt, ids, values


def find_scoring(probe: ServerProbe) -> tuple[Scoring, str]:
    """How this server is to be asked, and what shows that it answers right; `SelfTestFailed` where
    no way passes."""
    wanted = probe.settings.scoring
    reasons: list[str] = []
    for scoring in get_args(Scoring) if wanted == "auto" else (wanted,):
        try:
            return scoring, probe.require_trustworthy(scoring)
        except (SelfTestFailed, ServerUnavailableError, ServerRefusedError) as error:
            reasons.append(f"{scoring}: {str(error).rstrip('.')}")
    raise SelfTestFailed(
        f"{'; '.join(reasons)}; serve the model with vLLM or `rlad serve-teacher`."
    )
