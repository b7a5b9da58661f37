"""The self-test of a server, before training: it is asked with the student's tokens what it offers,
and whether its scores can be trusted. Each answer becomes a `Finding`."""

import gc
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, get_args
from urllib.parse import urlsplit

from rlad.config.teacher import ServedTeacherConfig
from rlad.findings import Finding
from rlad.models.files import require_weights
from rlad.models.loading import load_language_model, load_model_config
from rlad.scoring.scorer import Scorer
from rlad.teachers.base import Setting
from rlad.teachers.compatibility import compare_contexts
from rlad.teachers.served.client import (
    CompletionsClient,
    ServerRefusedError,
    ServerUnavailableError,
    is_this_machine,
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
from rlad.teachers.served.token_strings import (
    differing_tokens,
    ids_of_strings,
    probe_ids,
    spread_ids,
)

NUM_CUTS = 4
"""places in the probe at which the server continues it"""
NUM_WRITTEN = 5
"""tokens that it writes at each of them"""
NUM_LIKELIEST = 5
NUM_STRINGS = 200
"""tokens all over the vocabulary whose strings are compared"""
TEMPERATURE_PRECISION = 0.1
"""of the distance between the temperature and 1"""
MODEL_LIST_BYTES = 4 * 1024**2


class SelfTestFailed(Exception):
    """One sentence about what does not fit."""


class SelfTest:
    """The questions, in their order: each method asks one thing, and raises `SelfTestFailed` where
    the next cannot be asked."""

    def __init__(self, client: CompletionsClient, settings: ServedTeacherConfig, setting: Setting):
        self.client = client
        self.settings = settings
        self.setting = setting
        self.tokenizer = setting.student_tokenizer
        self.identity = settings.model
        self.context: int | None = None
        self.scoring: Scoring = "prompt_logprobs"
        self.text = probe_ids(self.tokenizer)

    def findings(self) -> list[Finding]:
        """Ask everything, up to the first error."""
        found = key_findings(self.client)
        questions = {
            "server": self.ask_for_model,
            "context": self.compare_context,
            "scoring": self.find_scoring,
            "vocabulary": self.compare_strings,
            "temperature": self.check_temperature,
            "replicas": self.compare_replicas,
            "local model": self.compare_with_local,
        }
        for subject, question in questions.items():
            try:
                found += question()
            except (SelfTestFailed, ServerRefusedError) as error:
                return [*found, Finding("error", subject, str(error))]
            except ServerUnavailableError as error:
                message = f"the server stopped answering: {error}; look into its log."
                return [*found, Finding("error", subject, message)]
        return found

    def ask_for_model(self) -> list[Finding]:
        """Every replica can be reached and offers the model."""
        cards = [self._card(url) for url in self.settings.urls]
        # vLLM names the weights as root where they are served under another name: both identify the
        # teacher.
        root = str(cards[0].get("root") or self.identity)[:200]
        if root != self.identity:
            self.identity += f" ({root})"
        stated = [card.get("max_model_len") for card in cards]
        self.context = min((size for size in stated if isinstance(size, int)), default=None)
        if self.context is not None:
            # The probe must leave room for what the server is to write after it.
            self.text = self.text[: self.context - NUM_WRITTEN - 1]
        return [Finding("ok", "server", f"{self.identity} at {', '.join(self.settings.urls)}")]

    def compare_context(self) -> list[Finding]:
        """The longest prompt with its completion fits."""
        rollout = self.setting.config.rollout
        return [compare_contexts(rollout, self.setting.student_context, self.context)]

    def find_scoring(self) -> list[Finding]:
        """In one of the ways to ask, scores of text that the server wrote are those of writing."""
        wanted = self.settings.scoring
        reasons: list[str] = []
        # Servers differ in how they score given tokens: the first way that proves right is taken.
        for scoring in get_args(Scoring) if wanted == "auto" else (wanted,):
            self.scoring = scoring
            try:
                return [Finding("ok", "scoring", self._agreement_with_writing())]
            except (SelfTestFailed, ServerUnavailableError, ServerRefusedError) as error:
                reasons.append(f"{scoring}: {str(error).rstrip('.')}")
        raise SelfTestFailed(
            f"{'; '.join(reasons)}; serve the model with vLLM or `rlad serve-teacher`."
        )

    def compare_strings(self) -> list[Finding]:
        """Tokens all over the vocabulary are the same strings for the server."""
        # A teacher of another tokenizer gives plausible numbers for other words, which no loss
        # would show.
        tokens = spread_ids(self.tokenizer, min(NUM_STRINGS, (self.context or NUM_STRINGS + 2) - 2))
        # Nothing is said of a text's first token.
        strings = self._scores([tokens[-1], *tokens], as_ids=False).strings[1:]
        compared, differing = differing_tokens(self.tokenizer, tokens, strings)
        if differing:
            token, ours, theirs = differing[0]
            raise SelfTestFailed(
                f"{len(differing)} of {compared} token ids compared differ, the first is id "
                f"{token}, {ours!r} for the student and {theirs[:100]!r} for the server; serve a "
                "teacher of the student's tokenizer family."
            )
        if compared:
            message = f"{compared} tokens all over the student's vocabulary are the server's"
            return [Finding("ok", "vocabulary", message)]
        message = (
            "the server does not show the strings of tokens; that it has the student's tokenizer "
            "is taken on trust."
        )
        return [Finding("warning", "vocabulary", message)]

    def check_temperature(self) -> list[Finding]:
        """At a sampling temperature T other than 1, differences of log-probs at one position are
        those at 1, divided by T.

        The temperature found is the least-squares one over all pairs: sum d1^2 / sum (d1 dT).
        """
        wanted = self.setting.temperature
        if wanted == 1:
            return [Finding("ok", "temperature", "1: the server's log-probs are those of sampling")]
        advice = (
            "set rollout.temperature = 1, or serve the model with `rlad serve-teacher`, which "
            f"scores at {wanted:g}."
        )
        try:
            plain, tempered = (
                self._scores(self.text, num_likeliest=NUM_LIKELIEST, temperature=temperature)
                for temperature in (1.0, wanted)
            )
        except ServerRefusedError as error:
            raise SelfTestFailed(
                f"the server gives no log-probs at temperature {wanted:g} ({error}); {advice}"
            ) from None
        # Log-probs at temperature T are logits / T less a constant, which differences at one
        # position do not contain: a difference at T is the one at 1 divided by T.
        pairs = list(_differences(plain, tempered))
        # Without any difference that could be divided the temperature is NaN, which fails below.
        product = sum(d1 * dt for d1, dt in pairs)
        found = sum(d1 * d1 for d1, _ in pairs) / product if product > 0 else math.nan
        if not abs(found - wanted) <= TEMPERATURE_PRECISION * abs(1 - wanted):
            raise SelfTestFailed(
                f"the run samples at temperature {wanted:g}, but the server's log-probs are those "
                f"at {found:.2f}; {advice}"
            )
        message = f"{wanted:g}: the server applies it (found {found:.4f})"
        return [Finding("ok", "temperature", message)]

    def compare_replicas(self) -> list[Finding]:
        """All replicas give the probe the same log-probs, at the sampling temperature."""
        first, *others = self.settings.urls
        findings = []
        for url in others:
            difference = self._require_equal(
                self._tempered_logprobs(url),
                self._tempered_logprobs(first),
                f"{url} gives other log-probs than {first}",
            )
            message = f"{url} agrees with {first} ({difference})"
            findings.append(Finding("ok", "replicas", message))
        return findings

    def compare_with_local(self) -> list[Finding]:
        """A forward pass in this process gives the same log-probs, at the sampling temperature.

        Weights are loaded only where those of the run are, too: where the setting has its student.
        They are computed on the CPU, as the GPU is the run's.
        """
        name = self.settings.local_model
        if name is None:
            return []
        load_model_config(name)
        require_weights(name)
        # Without the student this is a check before the run, which loads no weights.
        if self.setting.student is None:
            return [Finding("ok", "local model", f"{name} is compared when the models are loaded")]
        scorer = Scorer(
            load_language_model(name, device="cpu"),
            temperature=self.setting.temperature,
            tokens_per_batch=len(self.text),
        )
        local = scorer.score([self.text[:1]], [self.text[1:]])[0].tolist()
        del scorer
        gc.collect()  # a model is freed with the last of its references, some of which are circles
        served = self._tempered_logprobs(self.settings.urls[0])
        otherwise = f"the server's log-probs are not those of {name}"
        difference = self._require_equal(served, local, otherwise)
        return [Finding("ok", "local model", f"the server agrees with {name} ({difference})")]

    @cached_property
    def _ids_of_strings(self) -> dict[str, int]:
        return ids_of_strings(self.tokenizer)

    def _card(self, url: str) -> dict[str, Any]:
        """What a server says of the model."""
        model = self.settings.model
        try:
            answer = self.client.ask(url, "/models", max_bytes=MODEL_LIST_BYTES)
        except ServerUnavailableError as error:
            raise SelfTestFailed(
                f"no answer that can be used: {error}; start the server, or correct teacher.urls."
            ) from None
        cards = answer.get("data")
        cards = (
            [card for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        )
        for card in cards:
            if card.get("id") == model:
                return card
        offered = ", ".join(repr(str(card.get("id"))[:100]) for card in cards[:10]) or "no model"
        raise SelfTestFailed(
            f"{url} offers {offered}, not {model!r}; set teacher.model to what it offers."
        )

    def _scores(self, tokens: Sequence[int], url: str | None = None, **wanted: Any) -> TokenScores:
        body = scoring_request(self.scoring, self.settings.model, tokens, **wanted)
        max_bytes = max_answer_bytes(len(tokens), NUM_LIKELIEST)
        url = url or self.settings.urls[0]
        answer = self.client.ask(url, "/completions", body, max_bytes=max_bytes)
        return read_scores(self.scoring, answer, tokens)

    def _logprobs(self, tokens: Sequence[int], **wanted: Any) -> list[float]:
        """The log-prob of each token but the first, of which none may be missing."""
        logprobs = self._scores(tokens, **wanted).logprobs[1:]
        if missing := sum(map(math.isnan, logprobs)):
            raise SelfTestFailed(
                f"it gives no finite log-prob for {missing} of {len(logprobs)} given tokens"
            )
        return logprobs

    def _tempered_logprobs(self, url: str) -> list[float]:
        return self._logprobs(self.text, url=url, temperature=self.setting.temperature)

    def _agreement_with_writing(self) -> str:
        """Let the server continue the probe from several places, and score what it wrote."""
        writing: list[float] = []
        scoring: list[float] = []
        # Log-probs of tokens that the server has just written are known from writing them. If
        # scoring the same tokens gives other numbers, its scores are shifted, or those of another
        # text, model or temperature.
        for cut in range(1, NUM_CUTS + 1):
            prompt = self.text[: max(2, len(self.text) * cut // NUM_CUTS)]
            body = generation_request(self.settings.model, prompt, NUM_WRITTEN)
            max_bytes = max_answer_bytes(NUM_WRITTEN)
            url = self.settings.urls[0]
            answer = self.client.ask(url, "/completions", body, max_bytes=max_bytes)
            ids, values = read_generation(answer, self._ids_of_strings)
            if not ids:
                raise SelfTestFailed(
                    "it does not say which tokens it writes with which log-probs (`logprobs`, "
                    "`return_tokens_as_token_ids`), so that its scores cannot be checked"
                )
            writing += values
            scoring += self._logprobs([*prompt, *ids])[-len(ids) :]
        difference = self._require_equal(
            scoring,
            writing,
            "what the server wrote has other log-probs when it scores it, as when scores are "
            "shifted by one token, or are of another text or model",
        )
        return (
            f"by {self.scoring}; scores of text that the server wrote agree with those it gave "
            f"when writing ({difference})"
        )

    def _require_equal(
        self, found: Sequence[float], wanted: Sequence[float], otherwise: str
    ) -> str:
        """Return how far the log-probs differ; fail when one does by more than the tolerance."""
        sizes = [abs(a - b) for a, b in zip(found, wanted, strict=True)]
        tolerance = self.settings.tolerance
        mean = sum(sizes) / len(sizes)
        largest = max(sizes)
        difference = f"mean {mean:.2g}, max {largest:.2g} nats over {len(sizes)} tokens"
        if largest > tolerance:
            raise SelfTestFailed(f"{otherwise} ({difference}; teacher.tolerance is {tolerance:g}).")
        return difference


def _differences(plain: TokenScores, tempered: TokenScores) -> Iterator[tuple[float, float]]:
    """Of the likeliest token and each other at a position: the differences of their log-probs,
    plain and tempered."""
    for ours, theirs in zip(plain.likeliest, tempered.likeliest, strict=True):
        # Both answers must name a token for it to be compared; the likeliest one comes last.
        both = sorted((ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
        both = [pair for pair in both if not any(map(math.isnan, pair))]
        for one, tempered_one in both[:-1]:
            yield both[-1][0] - one, both[-1][1] - tempered_one


def key_findings(client: CompletionsClient) -> list[Finding]:
    """A key may not go unencrypted to another machine without a warning."""
    urls = [url for url in client.settings.urls if not is_this_machine(url)]
    bare = [parts.netloc for parts in map(urlsplit, urls) if parts.scheme == "http"]
    if client.key is None or not bare:
        return []
    message = f"the key goes unencrypted to {bare[0]}; use https, or a tunnel to 127.0.0.1."
    return [Finding("warning", "server", message)]
