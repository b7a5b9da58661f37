"""The settings of vLLM as the sampler, and of the correction for its different probabilities.
Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator

from rlad.config.addresses import ServerURL, VariableName, is_this_machine
from rlad.config.types import (
    Count,
    Mark,
    NonNegative,
    NonNegativeInt,
    Positive,
    Section,
    Share,
)


def _without_v1(url: str) -> str:
    """Remove `/v1` from an address: none of the routes in use is below it."""
    return url.removesuffix("/v1")


class VLLMConfig(Section):
    """vLLM in the process of the run, on the student's device. With `urls`, vLLM servers, which
    decide about their memory, rows and sleep themselves."""

    urls: Annotated[
        tuple[Annotated[ServerURL, AfterValidator(_without_v1)], ...], Mark.NO_NUMBER
    ] = ()
    """vLLM servers, such as ["http://127.0.0.1:8000"], which hold copies of the student and share
    the groups among them"""
    weights_directory: Annotated[str | None, Mark.NO_NUMBER] = None
    """folder for the student's weights that the run and the servers reach under the same path; by
    default a temporary folder, which only servers on this machine reach"""
    api_key_variable: Annotated[VariableName, Mark.NO_NUMBER] = "RLAD_ROLLOUT_API_KEY"
    """environment variable with the servers' key, if they ask for one"""
    timeout_seconds: Annotated[Positive, Mark.NO_NUMBER] = 1800.0
    """limit for one group, from the request to the last completion"""
    num_retries: Annotated[NonNegativeInt, Mark.NO_NUMBER] = 10
    """retries of a group that every server failed; with the default pause, the run stops after 6
    minutes"""
    retry_pause_seconds: Annotated[Positive, Mark.NO_NUMBER] = 2.0
    """pause before the first retry; doubles with each retry up to a minute, with random jitter"""
    gpu_memory_utilization: Annotated[Share, Mark.ROUNDING] = 0.3
    """share of the GPU's memory for vLLM's weights and cache; the trainer uses the rest"""
    max_num_seqs: Annotated[Count | None, Mark.ROUNDING] = None
    """most completions sampled at once; by default rollout.max_batch_rows"""
    max_model_len: Annotated[Count | None, Mark.ROUNDING] = None
    """longest prompt with its completion; by default what the limits of [rollout] and the model
    allow"""
    sleep: Annotated[Literal["auto", "always", "never"], Mark.ROUNDING] = "auto"
    """free vLLM's memory while the student is updated; `auto` does so on a GPU"""
    tolerance: Annotated[Positive | None, Mark.NO_NUMBER] = None
    """mean difference in nats between the log-probs of sampler and trainer at which a weight update
    counts as failed; by default 0.001 in float32 and 0.1 in bfloat16"""

    def problems(self) -> Iterator[str]:
        if len(set(self.urls)) < len(self.urls):
            yield "urls names a server twice; name each once"
        elsewhere = [url for url in self.urls if not is_this_machine(url)]
        if elsewhere and self.weights_directory is None:
            yield (
                f"the server {elsewhere[0]} is on another machine, and cannot read the "
                "temporary folder to which weights are written; set "
                "rollout.vllm.weights_directory to a folder that both reach"
            )


class CorrectionConfig(Section):
    """Importance weights for completions that were not sampled by the trainer's own model. They
    multiply each token's loss (`rlad.objectives.rollout_weights`)."""

    mode: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "token_truncate"
    )
    """weights of tokens or of sequences; a weight out of bounds becomes the bound (truncate) or 0
    (mask)"""
    clip_min: NonNegative | None = None
    """smallest weight; by default no bound"""
    clip_max: Positive | None = 2.0
    """greatest weight"""

    def problems(self) -> Iterator[str]:
        if (self.clip_min or 0.0) > 1 or (self.clip_max is not None and self.clip_max < 1):
            yield (
                f"the bounds from {self.clip_min} to {self.clip_max} exclude the weight 1, at "
                "which sampler and trainer agree; give a clip_min of at most 1 and a clip_max of "
                "at least 1"
            )
