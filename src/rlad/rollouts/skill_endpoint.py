"""Skills written by another model, on a server with an OpenAI-compatible `/v1/chat/completions`."""

import threading
from collections.abc import Callable
from contextlib import closing
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from typing import Any

from rlad.config.context import SkillEndpointConfig
from rlad.errors import RunFailedError, UserError
from rlad.replicas import ReplicaClient, ServerRefusedError, ServerUnavailableError
from rlad.rollouts.skill_writer import fields_or_rules, writing_request
from rlad.rollouts.skills import Fields
from rlad.rollouts.types import RolloutGroup

_SECONDS_BETWEEN_LOOKS = 0.2
_PATH = "/chat/completions"


class EndpointWriter:
    """The writer of skills that asks a model on a server about a group."""

    def __init__(self, settings: SkillEndpointConfig, before_work: Callable[[], None]):
        """Connect. `before_work` is called while waiting for the server; it may raise."""
        self._settings = settings
        self._before_work = before_work

    def __call__(self, group: RolloutGroup) -> Fields:
        text = writing_request(group, self._settings.max_attempt_characters)
        try:
            written = self._ask(self._body(text, self._settings.max_tokens))
        except ServerUnavailableError as error:
            raise RunFailedError(
                f"the summariser's server does not answer ({error}); start it again, or name "
                "another in teacher.context.skill.endpoint.urls, then resume the run."
            ) from None
        return fields_or_rules(written, group)

    def require_answer(self) -> None:
        """Ask for one token. Raises `UserError` if none comes."""
        try:
            with closing(self._client()) as client:
                for url in self._settings.urls:
                    _text_of(url, client.ask(url, _PATH, self._body("Hello", 1)))
        except ServerRefusedError as error:
            raise UserError(str(error)) from None
        except ServerUnavailableError as error:
            raise UserError(
                f"the summariser's server does not answer ({error}); start it, correct "
                "teacher.context.skill.endpoint.urls, or set summariser = 'rules'."
            ) from None

    def _body(self, text: str, max_tokens: int) -> dict[str, Any]:
        return {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }

    def _ask(self, body: dict[str, Any]) -> str:
        """Wait for the server's answer; the run may be stopped while waiting."""
        given_up = threading.Event()
        with closing(self._client()) as client, ThreadPool(1) as pool:
            asked = {"given_up": given_up, "read": _text_of}
            result = pool.apply_async(client.complete, (_PATH, body), asked)
            try:
                while True:
                    self._before_work()
                    try:
                        return result.get(timeout=_SECONDS_BETWEEN_LOOKS)
                    except TimeoutError:
                        continue
            finally:
                given_up.set()

    def _client(self) -> ReplicaClient:
        return ReplicaClient(
            self._settings,
            whose="summariser",
            section="teacher.context.skill.endpoint",
            advice="check urls, which mostly end in /v1, and model in "
            "[teacher.context.skill.endpoint], and the server's log",
            max_concurrent_requests=1,
        )


def _text_of(url: str, answer: dict[str, Any]) -> str:
    """Return the model's text, which may be empty."""
    match answer:
        case {"choices": [{"message": {"content": str() | None as text}}, *_]}:
            return text or ""
    raise ServerUnavailableError(f"{url}: the answer has no choices with a message")
