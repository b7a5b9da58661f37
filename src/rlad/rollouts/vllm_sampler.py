"""Completions from vLLM in the process of the run. No other file calls vLLM there."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from rlad.models.pictures import PicturedPrompt
from rlad.rollouts import vllm_pictures as pictures
from rlad.rollouts.copied_student import CopiedStudent, Limits, Prompts, request_limits
from rlad.rollouts.types import Completion
from rlad.rollouts.vllm_worker import repack_tied_output_layer
from rlad.text import first_line

_MOST_CPU_CACHE_BYTES = 4 * 2**30
_CPU_BLOCK_TOKENS = 128


def prepare_environment() -> None:
    """Set the environment variables that vLLM reads on import: its engine runs in this process,
    where the weights are, and sends no usage statistics. Unless already set, also leave threads to
    the trainer and turn off its output."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")


class VLLMSampler(CopiedStudent):
    """The sampler that uses vLLM in this process, on the student's device."""

    def __init__(self, student: LanguageModel, rollout: RolloutConfig):
        """Start vLLM. Raises `UserError` if it cannot start with this model and these limits."""
        super().__init__(student, rollout)
        self._on_gpu = student.model.device.type == "cuda"
        self._sleeps = {"auto": self._on_gpu, "always": True, "never": False}[rollout.vllm.sleep]
        self._is_asleep = False
        self._stays_awake = False
        self._num_requests = 0
        self._max_tokens = _longest(rollout, student.context_tokens)
        if rollout.vllm.sleep == "always" and not self._on_gpu:
            raise UserError(
                "rollout.vllm.sleep = 'always', but vLLM sleeps only on a GPU; set it to 'auto'."
            )
        with torch.random.fork_rng():  # which vLLM seeds
            self._llm: Any = self._start()

    def sample(self, prompts: Prompts, **settings: Any) -> list[list[Completion]]:
        groups = super().sample(prompts, **settings)
        if not self._stays_awake:
            self._go_to_sleep()
        return groups

    @contextmanager
    def at_work(self) -> Iterator[None]:
        self._stays_awake = True
        try:
            yield
        finally:
            self._stays_awake = False
        self._go_to_sleep()

    def _go_to_sleep(self) -> None:
        if self._sleeps and not self._is_asleep:
            # At this sleep level vLLM loses its weights; they are handed over again.
            self._llm.sleep(level=2)
            self._is_asleep = True
            self._is_stale = True

    def close(self) -> None:
        if self._llm is not None:
            if self._is_asleep:
                self._llm.wake_up()
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None

    @property
    def _more_tokens(self) -> str:
        return "raise rollout.max_prompt_tokens or rollout.vllm.max_model_len"

    # --- completions ------------------------------------------------------------------------------

    def _complete(
        self,
        prompts: Prompts,
        limits: Limits,
        seed: int,
        before_token: Callable[[], None],
        after_request: Callable[[int, list[Completion]], None],
    ) -> None:
        self._wake_up("kv_cache")
        vllm: Any = import_module("vllm")
        whole_groups = import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY
        engine = self._llm.llm_engine
        eos = list(self._student.eos_token_ids)
        never = pictures.never_drawn(self._student.never_written, limits["temperature"])
        waiting: dict[str, int] = {}
        try:
            for number, prompt in enumerate(prompts):
                own_limits, own_seed = request_limits(limits, number, seed)
                settings = vllm.SamplingParams(
                    **own_limits,
                    **({"logprobs": 0} | never),
                    seed=own_seed,
                    stop_token_ids=eos,
                    ignore_eos=True,
                    detokenize=False,
                    output_kind=whole_groups,
                )
                name = str(self._num_requests)
                self._num_requests += 1
                waiting[name] = number
                engine.add_request(name, self._engine_prompt(prompt), settings)
            while engine.has_unfinished_requests():
                before_token()
                # A request is finished once the last completion of its group has ended.
                for output in engine.step():
                    ordered = sorted(output.outputs, key=lambda one: one.index)
                    written = [_completion(one, self._student.never_written) for one in ordered]
                    after_request(waiting.pop(output.request_id), written)
        finally:
            engine.abort_request(list(waiting))

    def _engine_prompt(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Return a prompt in the engine's form, with the features of its pictures."""
        vision = self._student.vision
        if vision is None or not isinstance(prompt, PicturedPrompt):
            return {"prompt_token_ids": list(prompt)}
        with torch.inference_mode(), self._student.autocast():
            sight = vision.sight(self._student.model, prompt)
        return pictures.engine_prompt(prompt, sight, vision)

    # --- weights ----------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        self._wake_up("weights")
        sees = self._student.vision is not None
        weights = merged_weights(self._student.model, language_part=sees)
        arguments = {"weights_iterator": weights}
        try:
            with torch.no_grad():
                self._llm.collective_rpc("reload_weights", kwargs=arguments)
        except ValueError as error:  # a name that its model does not have
            raise RunFailedError(
                f"vLLM does not take the weights of {self._student.name!r} ({first_line(error)}); "
                "use rollout.engine = 'native' for this model."
            ) from error
        self._llm.collective_rpc(repack_tied_output_layer)
        self._llm.reset_prefix_cache()
        if sees:
            # The features are stale if the tower was trained; and sleep discards all of them.
            self._llm.llm_engine.reset_encoder_cache()

    # --- start, memory ----------------------------------------------------------------------------

    def _start(self) -> Any:
        prepare_environment()
        vllm: Any = import_module("vllm")
        self.description = f"vLLM {vllm.__version__}, in this process"
        rollout = self._rollout
        settings = rollout.vllm
        model = self._student.model
        num_rows = settings.max_num_seqs or rollout.max_batch_rows
        length = self._max_tokens
        memory: dict[str, Any] = {"gpu_memory_utilization": settings.gpu_memory_utilization}
        if not self._on_gpu:
            block = _CPU_BLOCK_TOKENS * _cache_bytes_per_token(model)
            blocks_per_row = -(-length // _CPU_BLOCK_TOKENS)
            most = max(_MOST_CPU_CACHE_BYTES // block, blocks_per_row + 1)
            memory = {
                "kv_cache_memory_bytes": min(num_rows * blocks_per_row + 1, most) * block,
                "enforce_eager": True,
                # A part of a prompt would rewind the random numbers of its completion, which the
                # CPU's generator cannot do.
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(4096, length),
            }
        if self._sleeps:
            memory["enable_sleep_mode"] = True
        if self._student.vision is not None:
            memory |= pictures.engine_settings(model.config)
            pictures.leave_out_processor(type(model).__name__)
        with TemporaryDirectory() as folder:
            # The weights come with the first hand-over: of the files vLLM needs only the config.
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
                    f"vLLM does not start with student {self._student.name!r} "
                    f"({reason.rstrip('.')}); {self._less_memory}, or set rollout.engine = "
                    "'native'."
                ) from error

    @property
    def _less_memory(self) -> str:
        """Advice to the user if vLLM does not get enough memory."""
        settings = self._rollout.vllm
        rows = "rollout.max_batch_rows"
        if settings.max_num_seqs is not None:
            rows = "rollout.vllm.max_num_seqs"
        length = "rollout.max_prompt_tokens"
        if settings.max_model_len is not None:
            length = "rollout.vllm.max_model_len"
        advice = f"give {rows} and {length} lower numbers"
        if self._on_gpu:
            advice += ", rollout.vllm.gpu_memory_utilization a higher one"
        return advice

    def _wake_up(self, part: str) -> None:
        """Take back the memory of the weights or of the cache after sleep."""
        if self._is_asleep:
            self._llm.wake_up(tags=[part])
            self._is_asleep = part == "weights"


def _completion(output: Any, never: Sequence[int]) -> Completion:
    """Convert a completion of vLLM. Its last token is the end token, with a log-prob. Log-probs are
    over the whole vocabulary, including tokens that are never drawn."""
    ids = tuple(output.token_ids)
    logprobs = tuple(
        entry[token].logprob - pictures.log_normaliser(entry, never)
        for entry, token in zip(output.logprobs, ids, strict=True)
    )
    return Completion(ids, logprobs, is_truncated=output.finish_reason == "length")


def _longest(rollout: RolloutConfig, context: int | None) -> int:
    """Return the most tokens of a prompt with its completion. Raises `UserError` if the model takes
    fewer."""
    wanted = rollout.vllm.max_model_len
    needed = (rollout.max_prompt_tokens or 1) + rollout.max_completion_tokens
    if wanted is not None and not needed <= wanted <= (context or wanted):
        raise UserError(
            f"rollout.vllm.max_model_len = {wanted}, but the limits of [rollout] need {needed} "
            f"tokens, and the student's context has {context}; give a number between these, or "
            "leave it out."
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
