"""The self-test of a server, before training: each thing that is asked of it becomes a
`Finding`."""

import gc
import math
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

import psutil
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

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
from rlad.teachers.served.probe import (
    NUM_LIKELIEST,
    Errors,
    Offer,
    SelfTestFailed,
    ServerProbe,
    find_scoring,
)
from rlad.teachers.served.protocol import Scoring, TokenScores
from rlad.teachers.served.token_strings import differing_tokens, spread_ids

NUM_STRINGS = 200
"""tokens all over the vocabulary whose strings are compared"""
TEMPERATURE_PRECISION = 0.1
"""of the distance between the temperature and 1"""
_GIB = 1024**3


def check_server(
    client: CompletionsClient, settings: ServedTeacherConfig, setting: Setting
) -> list[Finding]:
    """Everything that is asked before training; it ends at the first thing without which the next
    cannot be asked."""
    findings: list[Finding] = []
    probes = [ServerProbe(client, url, settings, setting) for url in settings.urls]
    first, subject = probes[0], "server"
    try:
        findings += key_findings(client)
        offers = [probe.offer() for probe in probes]
        findings.append(_describe_offers(probes, offers))
        subject = "context"
        findings.append(_compare_context(setting, offers))
        subject = "scoring"
        scoring, message = find_scoring(first)
        findings.append(Finding("ok", "scoring", message))
        subject = "vocabulary"
        findings.append(_compare_strings(first, scoring, offers[0].context_tokens))
        subject = "temperature"
        findings.append(_check_temperature(first, scoring))
        subject = "replicas"
        findings += [_compare_replica(first, probe, scoring) for probe in probes[1:]]
        subject = "local model"
        findings += [_compare_with_local(first, scoring)] if settings.local_model else []
    except SelfTestFailed as error:
        findings.append(Finding("error", subject, str(error)))
    except (ServerUnavailableError, ServerRefusedError) as error:
        findings.append(Finding("error", subject, f"the server stopped answering: {error}"))
    return findings


def key_findings(client: CompletionsClient) -> list[Finding]:
    urls = [replica.url for replica in client.replicas if not is_this_machine(replica.url)]
    bare = [parts.netloc for parts in map(urlsplit, urls) if parts.scheme == "http"]
    if client.key is None or not bare:
        return []
    return [
        Finding(
            "warning",
            "server",
            f"the key goes unencrypted to {bare[0]}; use https, or a tunnel to 127.0.0.1.",
        )
    ]


def _describe_offers(probes: Sequence[ServerProbe], offers: Sequence[Offer]) -> Finding:
    for probe, offer in zip(probes, offers, strict=True):
        if not offer.is_listed:
            message = f"{probe.url} does not list its models; that it serves {probe.settings.model!r} is taken on trust."
            return Finding("warning", "server", message)
    where = ", ".join(probe.url for probe in probes)
    return Finding("ok", "server", f"{offers[0].identity} at {where}")


def _compare_context(setting: Setting, offers: Sequence[Offer]) -> Finding:
    stated = [offer.context_tokens for offer in offers if offer.context_tokens is not None]
    return compare_contexts(
        setting.config.rollout, setting.student_context, min(stated, default=None)
    )


def _compare_strings(probe: ServerProbe, scoring: Scoring, context: int | None) -> Finding:
    tokens = spread_ids(probe.tokenizer, min(NUM_STRINGS, (context or NUM_STRINGS + 2) - 2))
    try:
        # Nothing is said of a text's first token.
        strings = probe.score(scoring, [tokens[-1], *tokens], as_ids=False).strings[1:]
    except ServerRefusedError as error:
        raise SelfTestFailed(
            f"it refuses tokens of the student, so it has another tokenizer: {error}"
        ) from None
    compared, differing = differing_tokens(probe.tokenizer, tokens, strings)
    if differing:
        token, ours, theirs = differing[0]
        raise SelfTestFailed(
            f"{len(differing)} of {compared} token ids compared differ, the first is id {token}, "
            f"{ours!r} for the student and "
            f"{theirs[:100]!r} for the server; TRRD needs a teacher of the student's tokenizer "
            "family."
        )
    if not compared:
        return Finding(
            "warning",
            "vocabulary",
            "the server does not show the strings of tokens; that it has the student's tokenizer "
            "is taken on trust.",
        )
    return Finding(
        "ok", "vocabulary", f"{compared} tokens all over the student's vocabulary are the server's"
    )


def _check_temperature(probe: ServerProbe, scoring: Scoring) -> Finding:
    """At a sampling temperature T other than 1, differences of log-probs at one position must be
    those at 1, divided by T.

    The temperature found is the least-squares one over all pairs: sum d1^2 / sum (d1 dT).
    """
    temperature = probe.setting.temperature
    if temperature == 1:
        return Finding("ok", "temperature", "1: the server's log-probs are those of sampling")
    how = f"set rollout.temperature = 1, or serve the model with `rlad serve-teacher`, which scores at {temperature:g}."
    try:
        plain, tempered = (
            probe.complete_scores(scoring, probe.text, num_likeliest=NUM_LIKELIEST, temperature=t)
            for t in (1.0, temperature)
        )
    except (SelfTestFailed, ServerRefusedError) as error:
        reason = str(error).rstrip(".")
        raise SelfTestFailed(
            f"the server gives no log-probs at temperature {temperature:g} ({reason}); {how}"
        ) from None
    pairs = list(_differences(plain, tempered))
    product = sum(d1 * dt for d1, dt in pairs)
    if not pairs or not product > 0:
        raise SelfTestFailed(
            f"nothing shows that the server's log-probs are those at temperature {temperature:g}; "
            f"{how}"
        )
    found = sum(d1 * d1 for d1, _ in pairs) / product
    worst = max(abs(dt * temperature - d1) for d1, dt in pairs)
    if (
        abs(found - temperature) > TEMPERATURE_PRECISION * abs(1 - temperature)
        or worst > probe.settings.tolerance
    ):
        raise SelfTestFailed(
            f"the run samples at temperature {temperature:g}, but the server's log-probs are those "
            f"at {found:.2f}; {how}"
        )
    return Finding(
        "ok", "temperature", f"{temperature:g}: the server applies it (found {found:.4f})"
    )


def _differences(plain: TokenScores, tempered: TokenScores) -> Iterator[tuple[float, float]]:
    """Of the likeliest token and each other at a position: the differences of their log-probs,
    plain and tempered."""
    for ours, theirs in zip(plain.likeliest, tempered.likeliest, strict=True):
        both = sorted((ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
        both = [pair for pair in both if not any(map(math.isnan, pair))]
        for one, tempered_one in both[:-1]:
            yield both[-1][0] - one, both[-1][1] - tempered_one


def _compare_replica(first: ServerProbe, other: ServerProbe, scoring: Scoring) -> Finding:
    """Whether another replica gives the probe the same log-probs, at the sampling temperature."""
    temperature = first.setting.temperature
    text = min(first.text, other.text, key=len)  # cut to the context of each
    ours, theirs = (
        p.complete_scores(scoring, text, temperature=temperature).logprobs[1:]
        for p in (first, other)
    )
    errors = Errors.between(zip(theirs, ours, strict=True))
    if not errors.within(first.settings.tolerance):
        raise SelfTestFailed(
            f"{other.url} gives other log-probs than {first.url} ({errors}; teacher.tolerance is "
            f"{first.settings.tolerance:g}); replicas must serve one model."
        )
    return Finding("ok", "replicas", f"{other.url} agrees with {first.url} ({errors})")


def _compare_with_local(probe: ServerProbe, scoring: Scoring) -> Finding:
    """Whether a forward pass in this process gives the same log-probs, at the sampling temperature.

    Weights are loaded only where those of the run are, too: where the setting has its student.
    """
    settings, temperature = probe.settings, probe.setting.temperature
    assert settings.local_model is not None
    config = load_model_config(settings.local_model)
    require_weights(settings.local_model)
    if probe.setting.student is None:
        return Finding(
            "ok", "local model", f"{settings.local_model} is compared when the models are loaded"
        )
    if (num_bytes := _float32_bytes(config)) > (free := free_bytes()):
        raise SelfTestFailed(
            f"the float32 weights of {settings.local_model} take {num_bytes / _GIB:.1f} GiB, and "
            f"{free / _GIB:.1f} GiB of this "
            "machine's memory are free; leave teacher.local_model out."
        )
    served = probe.complete_scores(scoring, probe.text, temperature=temperature).logprobs[1:]
    errors = Errors.between(
        zip(served, _local_logprobs(settings.local_model, probe.text, temperature), strict=True)
    )
    gc.collect()  # a model is freed with the last of its references, some of which go in circles
    if not errors.within(settings.tolerance):
        raise SelfTestFailed(
            f"the server's log-probs are not those of {settings.local_model} ({errors}; "
            "teacher.tolerance is "
            f"{settings.tolerance:g}); serve that model, or correct teacher.local_model."
        )
    return Finding("ok", "local model", f"the server agrees with {settings.local_model} ({errors})")


def _float32_bytes(config: PretrainedConfig) -> int:
    """Of a model's weights, from its config."""
    with torch.device("meta"):
        return 4 * sum(
            parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters()
        )


def free_bytes() -> int:
    """Of this machine's memory, which is not the GPU's."""
    return psutil.virtual_memory().available


def _local_logprobs(name: str, text: Sequence[int], temperature: float) -> list[float]:
    """Of each token but the first; on the CPU, as the GPU is the run's."""
    scorer = Scorer(
        load_language_model(name, device="cpu"), temperature=temperature, tokens_per_batch=len(text)
    )
    return scorer.score([text[:1]], [text[1:]])[0].tolist()
