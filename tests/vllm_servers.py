"""A real vLLM server of a tiny student on the CPU, in a process of its own."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel
from rlad.rollouts.samplers import make_sampler
from rlad.rollouts.vllm_protocol import EXTENSION
from rlad.scoring.scorer import Scorer
from running_servers import server_process
from tiny_models import EOS, SECOND_EOS, tiny_language_model

VLLM_PYTHON = os.environ.get("RLAD_VLLM_PYTHON")
CONTEXT = 128
TEMPERATURE = 0.7
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
# What docs/rollouts.md says of a server on the CPU.
REMEDY = ("--worker-extension-cls", EXTENSION)
FLAGS = (
    "--enable-scale-out",
    *("--logprobs-mode", "processed_logprobs"),
    *("--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096"),
)


def tied_student(**settings: Any) -> LanguageModel:
    """Its heads have 32 numbers, which vLLM's attention on the CPU can do."""
    shape = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": True, **settings}
    return tiny_language_model(eos_token_ids=(EOS, SECOND_EOS), **shape)


@contextmanager
def vllm_server(
    folder: Path, port: int, *flags: str, takes_weights: bool = True
) -> Iterator[subprocess.Popen[bytes]]:
    """A server of the model in `folder`, ready; `kill` ends it with all its processes."""
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), *flags]
    environment = os.environ | {
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_SERVER_DEV_MODE": str(int(takes_weights)),
    }
    log = folder / "vllm.log"
    with server_process(command, port, log, seconds=600, environment=environment) as process:
        yield process


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def sampler_at(port: int, model: LanguageModel, **settings: Any) -> Any:
    servers = {"urls": [f"http://127.0.0.1:{port}"], "retry_pause_seconds": 1.0}
    servers |= settings.pop("vllm", {})
    limits = {"max_prompt_tokens": 16, "max_completion_tokens": 24, "max_batch_rows": 64}
    rollout = {"engine": "vllm", "temperature": TEMPERATURE, **limits, **settings, "vllm": servers}
    return make_sampler(model, RolloutConfig.model_validate(rollout))


def move(model: LanguageModel, scale: float = 0.05) -> None:
    """An update of the weights."""
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def written(sampler: Any, *, num_tokens: int = 24, **settings: Any) -> list[Any]:
    settings = {"group_size": 8, "seed": 1, "temperature": TEMPERATURE} | settings
    return sampler.sample(PROMPTS, max_completion_tokens=num_tokens, **settings)


def distances(model: LanguageModel, groups: list[Any]) -> list[float]:
    """|log-prob of vLLM - log-prob of the trainer| of each token."""
    pairs = [(prompt, one) for prompt, group in zip(PROMPTS, groups, strict=True) for one in group]
    scorer = Scorer(model, temperature=TEMPERATURE, tokens_per_batch=4096)
    scores = scorer.score([prompt for prompt, _ in pairs], [one.token_ids for _, one in pairs])
    return [
        abs(ours - theirs)
        for row, (_, one) in zip(scores, pairs, strict=True)
        for ours, theirs in zip(row.tolist(), one.logprobs, strict=True)
    ]
