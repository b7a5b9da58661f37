"""Requests to a vLLM server as the sampler of a run, and the reading of its answers.

Its routes for token ids report for every token the version of the weights that wrote it. So tokens
of a restarted server are never mistaken for the student's.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import save_file
from torch import Tensor

from rlad.config.run import RolloutConfig
from rlad.errors import UserError
from rlad.replicas import ReplicaClient, ServerRefusedError, ServerUnavailableError
from rlad.rollouts.types import Completion
from rlad.rollouts.vllm_pictures import log_normaliser, never_drawn

TESTED_VLLM = "0.32"
GENERATE = "/inference/v1/generate"
EXTENSION = "rlad.rollouts.vllm_worker.StudentWeights"
SERVE = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs"
)
_MOST_FILE_BYTES = 2 * 2**30


# --- start ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Needs:
    """The requirements of a student on a server."""

    num_tokens: int
    """most tokens of a prompt with its completion"""
    dtype: str
    vocabulary: int
    """rows of the embeddings"""
    width: int
    is_tied: bool

    @classmethod
    def of(cls, rollout: RolloutConfig, model_config: Any, dtype: str) -> "Needs":
        text_config = model_config.get_text_config()
        return cls(
            (rollout.max_prompt_tokens or 1) + rollout.max_completion_tokens,
            dtype,
            text_config.vocab_size,
            text_config.hidden_size,
            bool(text_config.tie_word_embeddings),
        )


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server reports about itself."""

    version: str
    max_tokens: int
    dtype: str
    logprobs_mode: str
    has_extension: bool
    on_cpu: bool
    splits_prompts: bool

    @property
    def takes_seeds(self) -> bool:
        """Whether requests may have seeds. When vLLM on the CPU computes a prompt in parts, several
        seeded requests crash its engine: a part would rewind random numbers, which the CPU's
        generator cannot do."""
        return not (self.on_cpu and self.splits_prompts)


def ask_for_info(client: ReplicaClient, url: str) -> ServerInfo:
    """Ask a server about itself. Raises `UserError` if it is down, has another version, or takes no
    weights."""
    start = f"start it by `{SERVE}`"
    try:
        version = str(client.ask(url, "/version").get("version"))[:40]
    except ServerUnavailableError as error:
        raise UserError(
            f"no vLLM server answers ({error}); {start}, or correct rollout.vllm.urls."
        ) from None
    except ServerRefusedError as error:
        raise UserError(
            f"{error.said}, so it is not a vLLM server; correct rollout.vllm.urls."
        ) from None
    if not version.startswith(f"{TESTED_VLLM}."):
        raise UserError(
            f"vLLM {version} runs at {url}, but {TESTED_VLLM} is the tested version; start it."
        )
    try:
        info = client.ask(url, "/server_info?config_format=json")["vllm_config"]
        model, scheduler = info["model_config"], info["scheduler_config"]
        return ServerInfo(
            version,
            int(model["max_model_len"]),
            str(model["dtype"]).removeprefix("torch."),
            str(model["logprobs_mode"]),
            info["parallel_config"]["worker_extension_cls"] == EXTENSION,
            info["device_config"]["device"] == "cpu",
            bool(scheduler["enable_chunked_prefill"]),
        )
    except ServerRefusedError:
        raise UserError(
            f"the server at {url} takes no weights, because it was started without the "
            f"environment variable VLLM_SERVER_DEV_MODE=1; {start}."
        ) from None
    except (ServerUnavailableError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the server at {url} does not say how it was started ({error}); {start}."
        ) from None


def require_usable(client: ReplicaClient, url: str, needs: Needs) -> ServerInfo:
    """Check whether a server can sample for a student. Raises `UserError` if not."""
    info = ask_for_info(client, url)
    wrong = ""
    if info.max_tokens < needs.num_tokens:
        wrong = (
            f"takes {info.max_tokens} tokens, but the limits of [rollout] need {needs.num_tokens}; "
            f"start it with --max-model-len {needs.num_tokens}"
        )
    elif info.dtype != needs.dtype:
        wrong = (
            f"computes in {info.dtype}, but the student in {needs.dtype}; start it with --dtype "
            f"{needs.dtype}, or change student.dtype"
        )
    elif info.logprobs_mode != "processed_logprobs":
        wrong = (
            f"reports {info.logprobs_mode}, which are not those at the sampling temperature; "
            "start it with --logprobs-mode processed_logprobs"
        )
    elif info.on_cpu and needs.is_tied and not info.has_extension:
        wrong = (
            "would not update the tied output layer of the student (a fault of vLLM on the CPU); "
            f"start it with --worker-extension-cls {EXTENSION}"
        )
    elif (shapes := _embeddings(client, url)) and (needs.vocabulary, needs.width) not in shapes:
        wrong = (
            f"has another model, with embeddings of {max(shapes)}, but the student's are "
            f"{(needs.vocabulary, needs.width)}; start it with student.model"
        )
    if wrong:
        raise UserError(f"the server at {url} {wrong}.")
    try:
        # This route is closed unless the server was started with an option.
        client.ask(url, GENERATE, {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except ServerRefusedError as error:
        raise UserError(
            f"the server at {url} does not complete token ids ({error.said}); start it with "
            "--enable-scale-out."
        ) from None
    return info


def _embeddings(client: ReplicaClient, url: str) -> list[tuple[int, int]]:
    """Return rows and columns of a server's embeddings, for tokens and anything else that it
    embeds; empty if it does not report them."""
    try:
        results = client.ask(url, "/collective_rpc", {"method": "get_model_inspection"})["results"]
    except (ServerUnavailableError, ServerRefusedError, KeyError):
        return []
    found = re.findall(r"num_embeddings=(\d+)\D.*?embedding_dim=(\d+)", str(results))
    return [(int(rows), int(columns)) for rows, columns in found]


# --- weights --------------------------------------------------------------------------------------


def write_weights(
    weights: Iterable[tuple[str, Tensor]], folder: Path, *, dtype: torch.dtype
) -> None:
    """Write a model's weights as safetensors files of a bounded size."""
    folder.mkdir()
    part: dict[str, Tensor] = {}
    num_files = 0
    size = 0

    def write() -> None:
        save_file(part, folder / f"model-{num_files:05}.safetensors")

    for name, value in weights:
        value = value.to(dtype).contiguous()
        if part and size + value.nbytes > _MOST_FILE_BYTES:
            write()
            part, num_files, size = {}, num_files + 1, 0
        part[name] = value
        size += value.nbytes
    write()


def load_weights(
    client: ReplicaClient,
    url: str,
    folder: Path,
    *,
    version: str,
    info: ServerInfo,
    sees: bool = False,
) -> None:
    """Make a server load the weights in a folder, under the name `version`. `sees`: it may have
    read pictures."""
    method = "load_student_weights" if info.has_extension else "reload_weights"
    loading = f"loading-{version}"
    # First change the version: another user of the server then sees that its weights are gone.
    client.ask_once(url, "/update_weight_version", {"new_version": loading})
    kwargs = {"weights_path": str(folder)}
    client.ask_once(url, "/collective_rpc", {"method": method, "kwargs": kwargs})
    if sees:
        # The workers have lost their picture features, but the scheduler assumes that they exist.
        client.ask_once(url, "/reset_encoder_cache", {}, may_be_empty=True)
    # Discard keys and values of prompts that were computed with the old weights.
    if not client.ask_once(url, "/reset_prefix_cache", {}).get("success"):
        raise ServerUnavailableError(f"{url} still completes prompts of somebody else")
    if client.ask_once(url, "/weight_info").get("weight_version") != loading:
        raise ServerUnavailableError(f"{url} was given somebody else's weights in the meantime")
    client.ask_once(url, "/update_weight_version", {"new_version": version})


# --- completions ----------------------------------------------------------------------------------


# The parts of an answer that are read; a wrong type makes it unusable.
class _Likely(BaseModel):
    token_id: int
    logprob: float


class _Token(_Likely):
    top_logprobs: list[_Likely] = []


class _Logprobs(BaseModel):
    content: list[_Token] = Field(min_length=1)


class _Span(BaseModel):
    version: str


class _Choice(BaseModel):
    index: int
    finish_reason: str
    logprobs: _Logprobs
    weight_versions: list[_Span]


class _Generated(BaseModel):
    choices: list[_Choice] = Field(min_length=1)


def generation_request(
    prompt: Sequence[int],
    limits: dict[str, Any],
    end_tokens: Sequence[int],
    seed: int | None,
    *,
    never: Sequence[int] = (),
) -> dict[str, Any]:
    """Make the request for completions of token ids, with the log-prob of each sampled token.
    Tokens in `never` are not drawn."""
    sampling = limits | {
        "stop_token_ids": list(end_tokens),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    sampling |= never_drawn(never, limits["temperature"])
    if seed is not None:
        sampling["seed"] = seed
    return {"token_ids": list(prompt), "sampling_params": sampling}


def read_completions(
    answer: dict[str, Any], *, never: Sequence[int] = ()
) -> tuple[list[Completion], set[str]]:
    """Return the completions of an answer in order, and the versions of the weights that wrote
    them. `never` is the request's.

    Raises `ServerUnavailableError` for an unusable answer.
    """
    try:
        choices = sorted(_Generated.model_validate(answer).choices, key=lambda one: one.index)
    except ValidationError as error:
        raise ServerUnavailableError(f"its answer is none ({error.errors()[0]['msg']})") from None
    completions = []
    versions = set()
    for choice in choices:
        # A server that is being stopped cuts completions off.
        if choice.finish_reason not in ("stop", "length"):
            raise ServerUnavailableError(f"a completion ended by {choice.finish_reason[:40]!r}")
        tokens = choice.logprobs.content
        ids = tuple(token.token_id for token in tokens)
        try:
            logprobs = tuple(token.logprob - _left_out(token, never) for token in tokens)
        except KeyError:
            raise ServerUnavailableError("a log-prob that was asked for is missing") from None
        completions.append(Completion(ids, logprobs, choice.finish_reason == "length"))
        versions.update(span.version for span in choice.weight_versions)
    return completions, versions


def _left_out(token: _Token, never: Sequence[int]) -> float:
    if not never:
        return 0.0
    return log_normaliser({one.token_id: one for one in token.top_logprobs}, never)
