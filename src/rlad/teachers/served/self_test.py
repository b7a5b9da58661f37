"""The self-test of a server before training. Requests with the student's tokens show what it
offers, and whether its scores can be trusted. Each result becomes a `Finding`."""

import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args
from urllib.parse import urlsplit

import torch

from rlad.config.addresses import is_this_machine
from rlad.config.task import EpisodesConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.models.loading import load_language_model
from rlad.replicas import ServerRefusedError, ServerUnavailableError
from rlad.scoring.scorer import Scorer
from rlad.teachers.base import Setting
from rlad.teachers.compatibility import compare_contexts
from rlad.teachers.served.client import CompletionsClient
from rlad.teachers.served.columns import column_request, column_scoring, read_columns
from rlad.teachers.served.pictures import picture_findings
from rlad.teachers.served.protocol import (
    Scoring,
    TokenScore,
    generation_request,
    read_generation,
    read_scores,
    scoring_path,
    scoring_request,
)
from rlad.teachers.served.token_strings import differing_tokens, probe_ids, spread_ids

NUM_CUTS = 4
"""Positions in the probe from which the server continues it."""
NUM_WRITTEN = 5
"""Tokens that it writes at each of them."""
NUM_LIKELIEST = 5
NUM_STRINGS = 200
"""Tokens, spread over the vocabulary, whose strings are compared."""
TEMPERATURE_PRECISION = 0.1
"""Allowed error, as a share of the distance between the temperature and 1."""


class SelfTest:
    """The checks of a server, in order. Each method checks one thing; the first error ends the
    test."""

    def __init__(self, client: CompletionsClient, setting: Setting):
        self.client = client
        self.settings = client.settings
        self.setting = setting
        self.url = self.settings.urls[0]
        self.identity = self.settings.model
        self.context: int | None = None
        self.scoring: Scoring = "prompt_logprobs"
        self.takes_pictures = False
        self.text = probe_ids(setting.student_tokenizer)

    @property
    def scored_context(self) -> int | None:
        """The tokens of prompt and completion that it can score; None if it does not say."""
        return None if self.context is None else self.context - 1

    def findings(self, *subjects: str) -> list[Finding]:
        """Run the checks of the subjects, or all checks, up to the first error."""
        questions: dict[str, Callable[[], list[Finding]]] = {
            "server": self.ask_for_model,
            "scoring": self.find_scoring,
            "vocabulary": self.compare_strings,
            "pictures": self.look_at_pictures,
            "temperature": self.check_temperature,
            "columns": self.check_columns,
            "agreement": self.compare_with_others,
        }
        found: list[Finding] = []
        for subject in subjects or questions:
            try:
                found += questions[subject]()
            except ServerUnavailableError as error:
                advice = "start the server, or correct teacher.urls."
                message = f"no usable answer: {error}; {advice}"
                found.append(Finding("error", subject, message))
            except (ServerRefusedError, UserError) as error:
                found.append(Finding("error", subject, str(error)))
            if found[-1:] and found[-1].level == "error":
                break
        return found

    def ask_for_model(self) -> list[Finding]:
        """Check that every replica offers the model, with room for the longest prompt and
        completion."""
        findings = []
        elsewhere = [url for url in self.settings.urls if not is_this_machine(url)]
        bare = [parts.netloc for parts in map(urlsplit, elsewhere) if parts.scheme == "http"]
        if self.client.key is not None and bare:
            message = f"the key goes unencrypted to {bare[0]}; use https, or a tunnel to 127.0.0.1."
            findings.append(Finding("warning", "server", message))
        model = self.settings.model
        contexts: list[int] = []
        for url in self.settings.urls:
            cards = self.client.ask(url, "/models").get("data")
            cards = cards if isinstance(cards, list) else []
            by_name = {str(card.get("id")): card for card in cards if isinstance(card, dict)}
            if model not in by_name:
                offered = ", ".join(repr(name[:100]) for name in [*by_name][:10]) or "no model"
                message = f"{url} offers {offered}, not {model!r}"
                advice = "set teacher.model to what it offers."
                return [*findings, Finding("error", "server", f"{message}; {advice}")]
            # If weights are served under another name, vLLM reports the weights as root. Both names
            # identify the teacher.
            root = str(by_name[model].get("root") or model)[:200]
            if url == self.url and root != model:
                self.identity = f"{model} ({root})"
            size = by_name[model].get("max_model_len")
            contexts += [size] if isinstance(size, int) else []
        if contexts:
            self.context = min(contexts)
            # The probe must leave room for what the server will write after it.
            self.text = self.text[: self.context - NUM_WRITTEN - 1]
        message = f"{self.identity} at {', '.join(self.settings.urls)}"
        config = self.setting.config
        return [
            *findings,
            Finding("ok", "server", message),
            compare_contexts(
                config.rollout,
                self.setting.student_context,
                self.context,
                has_turns=isinstance(config.task, EpisodesConfig),
            ),
        ]

    def find_scoring(self) -> list[Finding]:
        """Find a request type for which scores of text that the server wrote equal the log-probs
        from writing it."""
        wanted = self.settings.scoring
        reasons: list[str] = []
        # Servers differ in how they score given tokens: the first way that is correct is used.
        for scoring in get_args(Scoring) if wanted == "auto" else (wanted,):
            self.scoring = scoring
            try:
                finding = self._compare_with_writing()
            except ServerUnavailableError as error:
                finding = Finding("error", "scoring", str(error))
            except ServerRefusedError as error:
                finding = Finding("error", "scoring", error.said)
            if finding.level == "ok":
                message = "; not by ".join([finding.message, *reasons])
                return [Finding("ok", "scoring", message)]
            reasons.append(f"{scoring}: {finding.message.rstrip('.')}")
        message = f"{'; '.join(reasons)}; serve the model with vLLM or `rlad serve-teacher`."
        return [Finding("error", "scoring", message)]

    def compare_strings(self) -> list[Finding]:
        """Check that tokens, spread over the vocabulary, are the same strings for the server."""
        # A teacher with another tokenizer gives plausible numbers for other words, which the loss
        # would not show.
        tokenizer = self.setting.student_tokenizer
        tokens = spread_ids(tokenizer, min(NUM_STRINGS, (self.context or NUM_STRINGS + 2) - 2))
        # A text's first token has no score, and a table of scores has no strings.
        has_strings = self.scoring != "prompt_logprob_token_ids"
        scoring = self.scoring if has_strings else "prompt_logprobs"
        scores = self._scores([tokens[-1], *tokens], scoring=scoring, as_ids=False)[1:]
        strings = [score.string for score in scores]
        compared, differing = differing_tokens(tokenizer, tokens, strings)
        level = "ok"
        message = f"{compared} tokens, spread over the student's vocabulary, are the server's"
        if differing:
            level = "error"
            token, ours, theirs = differing[0]
            message = (
                f"{len(differing)} of {compared} token ids compared differ, the first is id "
                f"{token}, {ours!r} for the student and {theirs[:100]!r} for the server; serve a "
                "teacher of the student's tokenizer family."
            )
        elif not compared:
            level = "warning"
            message = (
                "the server does not show the strings of tokens; it is assumed to have the "
                "student's tokenizer."
            )
        return [Finding(level, "vocabulary", message)]

    def look_at_pictures(self) -> list[Finding]:
        """Check that it takes pictures, if the student reads them."""
        found = picture_findings(self)
        self.takes_pictures = bool(found) and found[0].level == "ok"
        return found

    def check_temperature(self) -> list[Finding]:
        """Check that at a sampling temperature T other than 1, differences of log-probs at one
        position are those at 1, divided by T.

        The temperature found is the least-squares one over all pairs: sum d1^2 / sum (d1 dT).
        """
        wanted = self.setting.temperature
        if wanted == 1:
            message = "1: the server's log-probs are those of sampling"
            return [Finding("ok", "temperature", message)]
        plain = self._scores(self.text, num_likeliest=NUM_LIKELIEST)
        tempered = self._scores(self.text, num_likeliest=NUM_LIKELIEST, temperature=wanted)
        # Log-probs at temperature T are logits / T minus a constant. The constant cancels in
        # differences at one position, so a difference at T is the difference at 1 divided by T.
        pairs = list(_differences(plain, tempered))
        # Without any nonzero difference the temperature is NaN, which fails below.
        product = sum(d1 * dt for d1, dt in pairs)
        found = sum(d1 * d1 for d1, _ in pairs) / product if product > 0 else math.nan
        if abs(found - wanted) <= TEMPERATURE_PRECISION * abs(1 - wanted):
            message = f"{wanted:g}: the server applies it (found {found:.4f})"
            return [Finding("ok", "temperature", message)]
        message = (
            f"the run samples at temperature {wanted:g}, but the server's log-probs are those at "
            f"{found:.2f}; set rollout.temperature = 1, or serve the model with `rlad "
            f"serve-teacher`, which scores at {wanted:g}."
        )
        return [Finding("error", "temperature", message)]

    def check_columns(self) -> list[Finding]:
        """If the objective compares the K most likely tokens, check that the server gives that
        many, with the log-probs of scoring."""
        objective: Any = self.setting.config.objective
        support = objective.asked_of_teacher
        tokenizer = self.setting.student_tokenizer
        # A K larger than the vocabulary is refused later, once the student is loaded.
        if "top_k" not in support or objective.top_k > len(tokenizer):
            return []
        top_k = objective.top_k
        ids = None
        if support == "student_top_k":
            # The given token, and others spread over the vocabulary.
            others = spread_ids(tokenizer, top_k - 1)
            ids = torch.tensor([[token, *others] for token in self.text[1:]])
        scoring = column_scoring(self.scoring, ids)
        about: dict[str, Any] = {"start": 1, "top_k": top_k, "ids": ids}
        temperature = self.setting.temperature
        body = column_request(
            scoring, self.settings.model, self.text, temperature=temperature, **about
        )
        try:
            answer = self.client.ask(self.url, scoring_path(scoring), body)
        except ServerRefusedError as error:
            return [Finding("error", "columns", _refused_columns(support, top_k, error.said))]
        # Whether its ids are the student's is checked later, once the student is loaded.
        found = read_columns(scoring, answer, self.text, vocabulary=sys.maxsize, **about).logprobs
        if bool(found.isnan().any()):
            said = "some are missing in its answer"
            return [Finding("error", "columns", _refused_columns(support, top_k, said))]
        scores = read_scores(scoring, answer, self.text)[1:]
        of_given = [score.logprob for score in scores] if ids is None else found[:, 0].tolist()
        finding = self.compare(
            "columns",
            of_given,
            self._probe_logprobs(self.url),
            equal=f"{support}: {top_k} log-probs at each token, which agree with scoring",
            otherwise="a token's log-prob differs where those of others are asked for with it",
        )
        return [finding]

    def compare_with_others(self) -> list[Finding]:
        """Check that every other replica, and `local_model` in this process, give the probe the
        same log-probs at the sampling temperature."""
        others = {url: self._probe_logprobs(url) for url in self.settings.urls[1:]}
        # Load weights only if the run's weights are loaded too.
        name = self.settings.local_model
        if name is not None and self.setting.student is not None:
            others[name] = self._local_logprobs(name)
        ours = self._probe_logprobs(self.url) if others else []
        return [
            self.compare(
                "agreement",
                ours,
                theirs,
                equal=f"{self.url} agrees with {name}",
                otherwise=f"{self.url} gives other log-probs than {name}",
            )
            for name, theirs in others.items()
        ]

    def _local_logprobs(self, name: str) -> list[float]:
        # On the CPU, since the run needs the GPU.
        scorer = Scorer(
            load_language_model(name, device="cpu"),
            temperature=self.setting.temperature,
            tokens_per_batch=len(self.text),
        )
        logprobs = scorer.score([self.text[:1]], [self.text[1:]])[0].tolist()
        del scorer
        gc.collect()  # some references to the model are cycles
        return logprobs

    def _scores(
        self,
        tokens: Sequence[int],
        url: str | None = None,
        *,
        scoring: Scoring | None = None,
        start: int = 1,
        **wanted: Any,
    ) -> list[TokenScore]:
        scoring = scoring or self.scoring
        body = scoring_request(scoring, self.settings.model, tokens, start=start, **wanted)
        answer = self.client.ask(url or self.url, scoring_path(scoring), body)
        return read_scores(scoring, answer, tokens, start=start)

    def _probe_logprobs(self, url: str) -> list[float]:
        scores = self._scores(self.text, url, temperature=self.setting.temperature)
        return [score.logprob for score in scores[1:]]

    def _compare_with_writing(self) -> Finding:
        """Let the server continue the probe from several positions, and score what it wrote."""
        writing: list[float] = []
        scoring: list[float] = []
        # The server has just reported log-probs of the tokens that it wrote. If scoring the same
        # tokens gives other numbers, its scores are shifted, or are of another text, model or
        # temperature.
        for cut in range(1, NUM_CUTS + 1):
            prompt = self.text[: max(2, len(self.text) * cut // NUM_CUTS)]
            body = generation_request(self.settings.model, prompt, NUM_WRITTEN)
            written = read_generation(self.client.ask(self.url, "/completions", body))
            if not written:
                problem = (
                    "it does not say which tokens it writes with which log-probs (`logprobs`, "
                    "`return_tokens_as_token_ids`)"
                )
                return Finding("error", "scoring", problem)
            tokens = [*prompt, *(token for token, _ in written)]
            scores = self._scores(tokens, start=len(prompt))
            writing += [value for _, value in written]
            scoring += [score.logprob for score in scores[len(prompt) :]]
        return self.compare(
            "scoring",
            scoring,
            writing,
            equal=f"by {self.scoring}; scores of text that the server wrote agree with those it "
            "gave when writing",
            otherwise="the server scores its own text with other log-probs than when writing it; "
            "scores may be shifted by one token, or be of another text or model",
        )

    def compare(
        self, subject: str, ours: list[float], theirs: list[float], *, equal: str, otherwise: str
    ) -> Finding:
        """Report whether the log-probs differ by at most the tolerance, and by how much."""
        sizes = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        if missing := sum(map(math.isnan, sizes)):
            message = f"it gives no finite log-prob for {missing} of {len(sizes)} given tokens"
            return Finding("error", subject, message)
        tolerance = self.settings.tolerance
        mean = sum(sizes) / len(sizes)
        difference = f"mean {mean:.2g}, max {max(sizes):.2g} nats over {len(sizes)} tokens"
        if max(sizes) <= tolerance:
            return Finding("ok", subject, f"{equal} ({difference})")
        message = f"{otherwise} ({difference}; teacher.tolerance is {tolerance:g})."
        return Finding("error", subject, message)


def _refused_columns(support: str, top_k: int, said: str) -> str:
    said = said.rstrip(".")
    if support == "student_top_k":
        return (
            f"it gives no log-probs of {top_k} tokens that the student names ({said}); use the "
            "support 'teacher_top_k', a lower objective.top_k, or a vLLM on a GPU with "
            f"--enable-scale-out and --max-logprobs {top_k}."
        )
    return (
        f"it does not give its {top_k} most likely tokens ({said}); lower objective.top_k, or "
        f"start vLLM with --max-logprobs {top_k}."
    )


def _differences(
    plain: Sequence[TokenScore], tempered: Sequence[TokenScore]
) -> Iterator[tuple[float, float]]:
    """Yield the differences of log-probs, plain and tempered, between the most likely token and
    each other token at a position."""
    for one, other in zip(plain, tempered, strict=True):
        # Only tokens that both answers name are compared; the most likely one comes last.
        common = one.likeliest.keys() & other.likeliest.keys()
        both = sorted((one.likeliest[key], other.likeliest[key]) for key in common)
        both = [pair for pair in both if not any(map(math.isnan, pair))]
        for pair in both[:-1]:
            yield both[-1][0] - pair[0], both[-1][1] - pair[1]
