"""Completions from vLLM servers, on another device or host.

This process writes the student's weights to a folder, and the servers read them from it. Servers
share the prompts and take over if one fails. Completions can be sampled ahead while this process
does something else.
"""

import math
import threading
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import TimeoutError
from multiprocessing.pool import AsyncResult, ThreadPool
from queue import Empty, SimpleQueue
from shutil import rmtree
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from rlad.config.run import RolloutConfig
from rlad.errors import RunFailedError, UserError
from rlad.models.adapters import merged_weights
from rlad.models.loading import LanguageModel
from rlad.models.pictures import PicturedPrompt, held
from rlad.models.sent_pictures import require_same_ids, with_pictures
from rlad.replicas import ReplicaClient, ServerUnavailableError
from rlad.rollouts.copied_student import CopiedStudent, Limits, Prompts, request_limits
from rlad.rollouts.types import Completion
from rlad.rollouts.vllm_protocol import (
    GENERATE,
    Needs,
    generation_request,
    load_weights,
    read_completions,
    require_usable,
    write_weights,
)
from rlad.rollouts.weights_folder import WeightsFolder

Result = TypeVar("Result")
SECONDS_BETWEEN_LOOKS = 0.2
MOST_ANSWER_BYTES = 2**30


def probe_prompts(vocabulary: int) -> list[list[int]]:
    """Return the prompts on which a server's weights are compared at the start, before any prompt
    of the run is known."""
    return [[token % vocabulary for token in prompt] for prompt in ([3, 4, 5, 6], [7, 8, 9])]


def make_client(rollout: RolloutConfig) -> ReplicaClient:
    return ReplicaClient(
        rollout.vllm,
        whose="sampler",
        section="rollout.vllm",
        advice="check rollout.vllm.urls and the server's log",
        max_concurrent_requests=rollout.max_batch_rows,
        max_answer_bytes=MOST_ANSWER_BYTES,
    )


class _Batch:
    """A batch of prompts that are being completed."""

    def __init__(self, prompts: Prompts, seed: int):
        self.prompts = [held(prompt) for prompt in prompts]
        self.seed = seed
        self.given_up = threading.Event()
        self.results: list[AsyncResult[list[Completion]]] = []
        self.finished: SimpleQueue[int] = SimpleQueue()
        """Indices of prompts, as their completions arrive."""

    def is_of(self, prompts: Prompts, seed: int) -> bool:
        return self.seed == seed and self.prompts == [held(prompt) for prompt in prompts]


class VLLMServerSampler(CopiedStudent):
    """The sampler that uses copies of a student on vLLM servers."""

    def __init__(
        self,
        student: LanguageModel,
        rollout: RolloutConfig,
        before_work: Callable[[], None] = lambda: None,
    ):
        """Check the servers, and hand the student over. `before_work` is called while waiting for
        them; it may raise. Raises `UserError` for a server that cannot sample for the student."""
        super().__init__(student, rollout)
        settings = rollout.vllm
        self._before_work = before_work
        self._urls = settings.urls
        self._client = make_client(rollout)
        dtype = str(student.compute_dtype).removeprefix("torch.")
        self._needs = Needs.of(rollout, student.model.config, dtype)
        self._infos = {url: require_usable(self._client, url, self._needs) for url in self._urls}
        self._max_tokens = min(info.max_tokens for info in self._infos.values())
        version = self._infos[self._urls[0]].version
        self.description = f"vLLM {version}, on a server at {' and at '.join(self._urls)}"
        self._pool = ThreadPool(rollout.max_batch_rows)
        self._begun: _Batch | None = None
        self._loading = threading.Lock()
        # Another run with the same servers has other version names.
        self._run = uuid.uuid4().hex[:12]
        self._num_versions = 0
        self._weights = WeightsFolder(settings.weights_directory, self._run)
        self._folder = self._weights.path
        try:
            self._start(before_work)
        except BaseException:
            self.close()
            raise

    def _start(self, before_work: Callable[[], None]) -> None:
        """Hand the student over for the first time."""
        self._most_retries = 0.0
        try:
            self.update_weights()
        except RunFailedError as error:
            raise UserError(str(error)) from None
        self._most_retries = math.inf
        probe = probe_prompts(self._needs.vocabulary)
        difference, server = self._difference(probe, before_work)
        if not difference <= self._tolerance:  # NaN too
            raise UserError(
                f"with the student's weights the log-probs of {server} differ from the student's "
                f"by {difference:.2g} nats on average, but rollout.vllm.tolerance is "
                f"{self._tolerance:g}, so it computes another model; start the server with "
                "student.model."
            )

    def begin(
        self,
        prompts: Prompts,
        *,
        group_size: int,
        max_completion_tokens: int,
        temperature: float,
        seed: int,
        before_token: Callable[[], None] = lambda: None,
    ) -> None:
        self._make_current(prompts, [max_completion_tokens] * len(prompts), before_token)
        limits = self._limits(group_size, max_completion_tokens, temperature)
        self._begun = self._submit(prompts, limits, seed)

    def has_begun(self, prompts: Prompts, seed: int) -> bool:
        return self._begun is not None and self._begun.is_of(prompts, seed)

    def close(self) -> None:
        if self._begun is not None:
            self._begun.given_up.set()
        self._pool.terminate()
        self._client.close()
        self._weights.delete()

    @property
    def _more_tokens(self) -> str:
        return "start the server with a larger --max-model-len"

    # --- completions ------------------------------------------------------------------------------

    def _complete(
        self,
        prompts: Prompts,
        limits: Limits,
        seed: int,
        before_token: Callable[[], None],
        after_request: Callable[[int, list[Completion]], None],
    ) -> None:
        if self._begun is not None and self._begun.is_of(prompts, seed):
            batch = self._begun
            self._begun = None
        else:
            batch = self._submit(prompts, limits, seed)
        try:
            for _ in batch.results:
                number = _next_finished(batch, before_token)
                after_request(number, batch.results[number].get())
        except ServerUnavailableError as error:
            raise RunFailedError(
                f"no vLLM server writes, after {self._client.settings.num_retries} retries "
                f"({error}); start it again as it was, then resume the run."
            ) from None
        finally:
            batch.given_up.set()

    def _submit(self, prompts: Prompts, limits: Limits, seed: int) -> _Batch:
        """Request completions of all prompts, without waiting."""
        batch = _Batch(prompts, seed)
        takes_seeds = all(info.takes_seeds for info in self._infos.values())
        for number, prompt in enumerate(batch.prompts):
            own_limits, own_seed = request_limits(limits, number, seed)
            body = self._request(prompt, own_limits, own_seed if takes_seeds else None)

            def tell(_: Any, number: int = number) -> None:
                batch.finished.put(number)

            arguments = (prompt, body, limits["n"], batch.given_up)
            batch.results.append(
                self._pool.apply_async(self._write, arguments, callback=tell, error_callback=tell)
            )
        return batch

    def _request(self, prompt: Sequence[int], limits: Limits, seed: int | None) -> dict[str, Any]:
        student = self._student
        body = generation_request(
            prompt, limits, student.eos_token_ids, seed, never=student.never_written
        )
        if isinstance(prompt, PicturedPrompt):
            assert student.vision is not None
            body |= with_pictures(prompt, (), student.vision)
        return body

    def _write(
        self,
        prompt: Sequence[int],
        body: dict[str, Any],
        num_completions: int,
        given_up: threading.Event,
    ) -> list[Completion]:
        """Complete one prompt on any server."""
        if given_up.is_set():
            raise ServerUnavailableError("given up")
        read = partial(self._read, prompt, num_completions)
        return self._client.complete(GENERATE, body, given_up=given_up, read=read)

    def _read(
        self, prompt: Sequence[int], num_completions: int, url: str, answer: dict[str, Any]
    ) -> list[Completion]:
        """Return the completions of an answer, if the student's weights wrote them."""
        if isinstance(prompt, PicturedPrompt):
            require_same_ids(answer, prompt, url)
        completions, versions = read_completions(answer, never=self._student.never_written)
        if len(completions) != num_completions:
            raise ServerUnavailableError(f"{url}: {len(completions)} completions came")
        if versions != {self._version}:
            self._give_back(url)
            raise ServerUnavailableError(f"{url}: it wrote with other weights, and was given ours")
        return completions

    # --- weights ----------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        self._settle()
        former = self._folder / self._version
        self._num_versions += 1
        try:
            sees = self._student.vision is not None
            weights = merged_weights(self._student.model, language_part=sees)
            with torch.no_grad():
                write_weights(
                    weights, self._folder / self._version, dtype=self._student.compute_dtype
                )
        except (OSError, SafetensorError) as error:
            raise RunFailedError(
                f"the student's weights cannot be written to {self._folder} ({error}); make room "
                "there, or set rollout.vllm.weights_directory to another folder, then resume the "
                "run."
            ) from None
        given_up = threading.Event()
        retrying = self._client.retrying(given_up, most=self._most_retries)
        try:
            self._wait_for(self._pool.apply_async(retrying, (self._load_everywhere,)))
        except ServerUnavailableError as error:
            raise RunFailedError(
                f"no vLLM server takes the weights of {self._student.name!r} ({error}); see that "
                f"it was started with student.model and reaches {self._folder} "
                "(rollout.vllm.weights_directory), start it again, then resume the run."
            ) from None
        finally:
            given_up.set()
        rmtree(former, ignore_errors=True)

    @property
    def _version(self) -> str:
        """The name of the weights that should sample."""
        return f"{self._run}-{self._num_versions}"

    def _settle(self) -> None:
        """Wait until all completions that were begun are finished, with the weights of their
        start."""
        for result in self._begun.results if self._begun else ():
            while not result.ready():
                self._before_work()
                result.wait(SECONDS_BETWEEN_LOOKS)

    def _load_everywhere(self) -> None:
        """Make all servers load the weights. A server that is down gets them when it is back.
        Raises `ServerUnavailableError` if all are down."""
        with ThreadPool(len(self._urls)) as pool:
            errors = pool.map(self._try_to_load, self._urls)
        reasons = [str(error) for error in errors if error is not None]
        if len(reasons) == len(self._urls):
            raise ServerUnavailableError("; ".join(reasons))

    def _try_to_load(self, url: str) -> ServerUnavailableError | None:
        try:
            self._load(url)
        except ServerUnavailableError as error:
            self._client.let_rest(url, error)
            return error
        return None

    def _load(self, url: str) -> None:
        folder = self._folder / self._version
        load_weights(
            self._client,
            url,
            folder,
            version=self._version,
            info=self._infos[url],
            sees=self._student.vision is not None,
        )

    def _give_back(self, url: str) -> None:
        """Hand the current weights to a server that was restarted."""
        with self._loading:  # several requests may notice the restart at once
            if self._client.ask_once(url, "/weight_info").get("weight_version") != self._version:
                self._infos[url] = require_usable(self._client, url, self._needs)
                self._load(url)
                self._is_checked = False

    def _written_by_each_copy(
        self, prompts: Prompts, limits: Limits, before_token: Callable[[], None]
    ) -> dict[str, list[Completion]]:
        def complete(url: str, prompt: Sequence[int], body: dict[str, Any]) -> Completion:
            return self._read(prompt, 1, url, self._client.ask_once(url, GENERATE, body))[0]

        # Done here, since a tokenizer must stay in one thread.
        bodies = [self._request(prompt, limits, None) for prompt in prompts]
        asked: dict[str, list[AsyncResult[Completion]]] = {}
        for url in self._urls:
            retrying = self._client.retrying(threading.Event(), most=2)
            asked[url] = [
                self._pool.apply_async(retrying, (complete, url, *one))
                for one in zip(prompts, bodies, strict=True)
            ]
        written = {}
        reasons = []
        for url, results in asked.items():
            try:
                written[f"vLLM at {url}"] = [self._wait_for(result) for result in results]
            except ServerUnavailableError as error:
                self._client.let_rest(url, error)
                reasons.append(str(error))
        if not written:
            raise RunFailedError(
                f"no vLLM server writes ({'; '.join(reasons)}); start it again as it was, then "
                "resume the run."
            )
        return written

    def _wait_for(self, result: AsyncResult[Result]) -> Result:
        """Wait for a result; the run may be stopped while waiting."""
        while True:
            self._before_work()
            try:
                return result.get(timeout=SECONDS_BETWEEN_LOOKS)
            except TimeoutError:
                continue


def _next_finished(batch: _Batch, before_token: Callable[[], None]) -> int:
    """Wait for the next prompt whose completions are finished or have failed."""
    while True:
        before_token()
        try:
            return batch.finished.get(timeout=SECONDS_BETWEEN_LOOKS)
        except Empty:
            continue
