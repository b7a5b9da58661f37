"""Completions from vLLM in the process of the run, under a student whose weights move.

vLLM holds a second copy of the student. After an update that copy is stale: the trainer's weights
are handed over before the next completions are written, and a few sampled tokens are scored by the
trainer to see that they have arrived. The only file that calls vLLM.
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from pydantic import ValidationError

from rlad.config.run import RolloutConfig
from rlad.errors import RunFailedError, UserError
from rlad.models.adapters import merged_weights
from rlad.models.loading import LanguageModel
from rlad.rollouts.types import Completion, Sampler
from rlad.scoring.scorer import Scorer
from rlad.text import first_line

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# The check of a hand-over: so many prompts, one completion of so many tokens each.
_NUM_CHECKED_PROMPTS = 4
_NUM_CHECKED_TOKENS = 16
_MOST_CPU_CACHE_BYTES = 4 * 2**30
_CPU_BLOCK_TOKENS = 128


def prepare_environment() -> None:
    """Set what vLLM reads when it is imported: its engine in this process, where the weights are,
    and no usage statistics; and unless set, threads that the trainer may use too, and silence."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")


class VLLMSampler(Sampler):
    """Samples from vLLM's copy of a student."""

    name = "vllm"
    is_trainers_own = False

    def __init__(self, student: LanguageModel, rollout: RolloutConfig):
        """Start vLLM. Raises `UserError` when it cannot start with this model and these limits."""
        self._student = student
        self._rollout = rollout
        self._scorer = Scorer(student, temperature=rollout.temperature, tokens_per_batch=2**14)
        self._on_gpu = student.model.device.type == "cuda"
        self._sleeps = {"auto": self._on_gpu, "always": True, "never": False}[rollout.vllm.sleep]
        self._tolerance = rollout.vllm.tolerance or TOLERANCE[student.compute_dtype]
        self._is_stale = True
        self._is_checked = False
        self._is_asleep = False
        self._num_requests = 0
        self._length = _longest(rollout, student.context_tokens)
        if rollout.vllm.sleep == "always" and not self._on_gpu:
            raise UserError(
                "rollout.vllm.sleep = 'always', but vLLM sleeps on a GPU alone; set it to 'auto'."
            )
        with torch.random.fork_rng():  # which vLLM seeds
            self._llm: Any = self._start()

    def weights_changed(self) -> None:
        self._is_stale = True

    def update_weights(self) -> None:
        if self._is_stale:
            self._hand_over()
            self._is_checked = False

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
        before_token: Callable[[], None] = lambda: None,
        after_group: Callable[[int, list[Completion]], None] = lambda number, completions: None,
    ) -> list[list[Completion]]:
        """Sample as `rlad.rollouts.sampling.sample` documents.

        Each completion has a seed of its own, so it does not depend on the others but for rounding.
        """
        longest = max(map(len, prompts)) + max_completion_tokens
        if longest > self._length:
            raise UserError(
                f"a prompt and its completion may have {longest} tokens, and vLLM was started for "
                f"{self._length}; lower rollout.max_completion_tokens, or raise "
                "rollout.max_prompt_tokens or rollout.vllm.max_model_len."
            )
        self.update_weights()
        self._wake_up("kv_cache")
        if not self._is_checked:
            self._check(prompts[:_NUM_CHECKED_PROMPTS], before_token)
            self._is_checked = True
        # The likeliest tokens are the same each time, and vLLM writes them once.
        num_written = group_size if temperature else 1

        def after_request(number: int, written: list[Completion]) -> None:
            groups[number] = written * (group_size // num_written)
            after_group(number, groups[number])

        groups: dict[int, list[Completion]] = {}
        limits = {"n": num_written, "max_tokens": max_completion_tokens, "temperature": temperature}
        self._complete(prompts, limits, seed, before_token, after_request)
        if self._sleeps:
            # What is asleep on this level has lost its weights; they are handed over again.
            self._llm.sleep(level=2)
            self._is_asleep = True
            self._is_stale = True
        return [groups[number] for number in range(len(prompts))]

    def close(self) -> None:
        if self._llm is not None:
            if self._is_asleep:
                self._llm.wake_up()
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    # --- completions ------------------------------------------------------------------------------

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        limits: dict[str, Any],
        seed: int,
        before_token: Callable[[], None],
        after_request: Callable[[int, list[Completion]], None],
    ) -> None:
        """Have all prompts completed; `after_request` gets each number and its completions."""
        vllm: Any = import_module("vllm")
        whole_groups = import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        engine = self._llm.llm_engine
        eos = list(self._student.eos_token_ids)
        waiting: dict[str, int] = {}
        try:
            for number, prompt in enumerate(prompts):
                settings = vllm.SamplingParams(
                    **limits,
                    # vLLM adds the place in the group.
                    seed=(seed + number * limits["n"]) % 2**63,
                    stop_token_ids=eos,
                    ignore_eos=True,
                    logprobs=0,
                    detokenize=False,
                    output_kind=whole_groups,
                )
                name = str(self._num_requests)
                self._num_requests += 1
                waiting[name] = number
                engine.add_request(name, {"prompt_token_ids": list(prompt)}, settings)
            while engine.has_unfinished_requests():
                before_token()
                # A request comes back when the last completion of its group has ended.
                for output in engine.step():
                    ordered = sorted(output.outputs, key=lambda one: one.index)
                    after_request(waiting.pop(output.request_id), list(map(_completion, ordered)))
        finally:
            engine.abort_request(list(waiting))

    # --- weights ----------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give vLLM the student's weights."""
        self._wake_up("weights")
        arguments = {"weights_iterator": merged_weights(self._student.model)}
        try:
            with torch.no_grad():
                self._llm.collective_rpc("reload_weights", kwargs=arguments)
        except ValueError as error:  # a name that its model does not have
            raise RunFailedError(
                f"vLLM does not take the weights of {self._student.name!r} ({first_line(error)}); "
                "use rollout.engine = 'native' for this model."
            ) from error
        if not self._on_gpu:
            self._llm.collective_rpc(_repack_tied_output_layer)
        self._llm.reset_prefix_cache()
        self._is_stale = False

    def _check(self, prompts: Sequence[Sequence[int]], before_token: Callable[[], None]) -> None:
        """Compare the log-probs of a few sampled tokens with the trainer's.

        Weights that have not arrived are handed over once more. Raises `RunFailedError` when that
        does not help.
        """
        difference = self._difference(prompts, before_token)
        if difference > self._tolerance:
            self._hand_over()
            difference = self._difference(prompts, before_token)
        if not difference <= self._tolerance:  # NaN too
            raise RunFailedError(
                f"vLLM does not sample from the student's weights: after two hand-overs its "
                f"log-probs differ from the trainer's by {difference:.2g} nats on average, and "
                f"rollout.vllm.tolerance is {self._tolerance:g}; start a new run with "
                "rollout.engine = 'native' and the last checkpoint as student.model, and report "
                "the model and the version of vLLM."
            )

    def _difference(
        self, prompts: Sequence[Sequence[int]], before_token: Callable[[], None]
    ) -> float:
        """Measure the mean absolute difference in nats over the tokens of a short completion of
        each prompt."""
        limits = {
            "n": 1,
            "max_tokens": min(_NUM_CHECKED_TOKENS, self._rollout.max_completion_tokens),
            "temperature": self._rollout.temperature,
        }
        completed: dict[int, Completion] = {}
        self._complete(
            prompts,
            limits,
            self._num_requests,
            before_token,
            lambda number, group: completed.update({number: group[0]}),
        )
        written = [completed[number] for number in range(len(prompts))]
        scores = self._scorer.score(prompts, [one.token_ids for one in written])
        theirs = torch.tensor([value for one in written for value in one.logprobs])
        return float((torch.cat(scores) - theirs).abs().mean())

    # --- start, memory ----------------------------------------------------------------------------

    def _start(self) -> Any:
        prepare_environment()
        vllm: Any = import_module("vllm")
        self.description = f"vLLM {vllm.__version__}, in this process"
        rollout = self._rollout
        settings = rollout.vllm
        model = self._student.model
        num_rows = settings.max_num_seqs or rollout.max_batch_rows
        length = self._length
        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if not self._on_gpu:
            block = _CPU_BLOCK_TOKENS * _cache_bytes_per_token(model)
            blocks_per_row = -(-length // _CPU_BLOCK_TOKENS)
            most = max(_MOST_CPU_CACHE_BYTES // block, blocks_per_row + 1)
            memory = {
                "kv_cache_memory_bytes": min(num_rows * blocks_per_row + 1, most) * block,
                "enforce_eager": True,
                # A part of a prompt would set back the random numbers of its completion, which
                # those of the CPU cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, length),
            }
        if self._sleeps:
            memory["enable_sleep_mode"] = True
        with TemporaryDirectory() as folder:
            # The weights follow with the first hand-over: of the files vLLM needs the config alone.
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(Path(folder))
            try:
                return vllm.LLM(
                    model=folder,
                    load_format="dummy",
                    skip_tokenizer_init=True,
                    dtype=str(self._student.compute_dtype).removeprefix("torch."),
                    max_model_len=length,
                    max_num_seqs=num_rows,
                    logprobs_mode="processed_logprobs",
                    **memory,
                )
            except (ValueError, RuntimeError) as error:
                reasons = error.errors() if isinstance(error, ValidationError) else []
                reason = reasons[0]["msg"] if reasons else first_line(error)
                raise UserError(
                    f"vLLM does not start with student {self._student.name!r} ({reason}); "
                    "lower rollout.vllm.max_num_seqs or max_model_len, give it more memory by "
                    "rollout.vllm.gpu_memory_utilization, or set rollout.engine = 'native'."
                ) from error

    def _wake_up(self, part: str) -> None:
        """Take back the memory of the weights or of the cache after sleep."""
        if self._is_asleep:
            self._llm.wake_up(tags=[part])
            self._is_asleep = part == "weights"


def _completion(output: Any) -> Completion:
    """Convert one of vLLM's: the end token is its last one, and has a log-prob too."""
    ids = tuple(output.token_ids)
    logprobs = tuple(
        entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)
    )
    return Completion(ids, logprobs, is_truncated=output.finish_reason == "length")


def _repack_tied_output_layer(worker: Any) -> None:
    """Pack the output layer of tied embeddings again, on the CPU.

    vLLM 0.32 keeps a packed copy of the matrix there, which `reload_weights` leaves as it was: the
    old weights would go on sampling, without a word.
    """
    layers: Any = import_module("vllm.model_executor.layers.utils")
    model = worker.model_runner.model
    if getattr(model.config, "tie_word_embeddings", False) and hasattr(model, "lm_head"):
        layers.dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def _longest(rollout: RolloutConfig, context: int | None) -> int:
    """Return the most tokens of a prompt with its completion. Raises `UserError` where the model
    takes fewer."""
    wanted = rollout.vllm.max_model_len
    needed = (rollout.max_prompt_tokens or 1) + rollout.max_completion_tokens
    if wanted is not None and not needed <= wanted <= (context or wanted):
        raise UserError(
            f"rollout.vllm.max_model_len = {wanted}, but the limits of [rollout] need {needed} "
            f"tokens, and the student's context has {context}; give a number between, or leave it "
            "out."
        )
    if wanted is None and rollout.max_prompt_tokens is not None:
        wanted = needed
    limits = [limit for limit in (wanted, context) if limit is not None]
    return min(limits, default=4 * rollout.max_completion_tokens)


def _cache_bytes_per_token(model: Any) -> int:
    """Return the size of one token's keys and values in all layers, in float32."""
    config = model.config.get_text_config()
    num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * 4 * config.num_hidden_layers * num_heads * head
