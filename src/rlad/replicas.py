"""HTTP to the replicas of one model: retries with growing pauses, failover, bounded answers."""

import itertools
import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2
import tenacity
from pydantic import SecretStr

from rlad.config.addresses import LOOPBACK, is_this_machine
from rlad.errors import RunFailedError, UserError
from rlad.text import printable

LONGEST_PAUSE_SECONDS = 60.0
REST_SECONDS = 30.0
"""For this long a replica that failed is asked only after the others."""
CONNECT_SECONDS = 10.0
MAX_ANSWER_BYTES = 32 * 1024**2
"""Far more than an answer about the longest text needs."""
PASSING_STATUSES = {408, 425, 429}
"""The statuses from 400 to 499 that waiting can fix."""

_log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Replicas(Protocol):
    """A config section with the addresses of one model's servers, and the limits of retries."""

    @property
    def urls(self) -> tuple[str, ...]: ...
    @property
    def api_key_variable(self) -> str: ...
    @property
    def timeout_seconds(self) -> float: ...
    @property
    def num_retries(self) -> int: ...
    @property
    def retry_pause_seconds(self) -> float: ...


class ServerUnavailableError(Exception):
    """The error for a missing or unusable answer, which waiting may fix."""


class ServerRefusedError(RunFailedError):
    """The error for a request that the server refuses, now and later."""

    def __init__(self, said: str, advice: str):
        super().__init__(f"{said}; {advice}.")
        self.said = said


class ReplicaClient:
    """A client that sends requests to any replica that answers. The key is a bearer token that is
    never shown; redirects are refused."""

    def __init__(
        self,
        settings: Replicas,
        *,
        whose: str,
        section: str,
        advice: str,
        max_concurrent_requests: int,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ):
        """Errors say `whose` server it is and in which `section` its settings are; `advice` is what
        to check when it refuses requests. Raises `UserError` for a key that cannot be sent in a
        header.
        """
        self.settings = settings
        self._whose = whose
        self._section = section
        self._refusal_advice = advice
        self._max_answer_bytes = max_answer_bytes
        self.key = read_key(settings.api_key_variable)
        self.rests_until: dict[str, float] = {}
        """URL of a replica that failed -> `time.monotonic()`"""
        self._turns = itertools.count()
        self._last_answer = 0.0
        headers = {"Accept-Encoding": "identity"}  # so that bytes counted are bytes held
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key.get_secret_value()}"
        seconds = settings.timeout_seconds
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=max_concurrent_requests),
            # No proxy need see what stays on this machine.
            mounts={f"all://{host}": None for host in own_hosts(settings.urls)},
        )

    def complete(
        self,
        path: str,
        body: dict[str, Any],
        *,
        given_up: threading.Event,
        read: Callable[[str, dict[str, Any]], Result],
    ) -> Result:
        """Return the result of `read` on a replica's URL and its answer to a POST.

        All replicas are tried in turn, then again after a pause, `num_retries` times or until given
        up. `read` raises `ServerUnavailableError` for an unusable answer. Raises
        `ServerUnavailableError` if all attempts fail, `ServerRefusedError` if a server refuses
        permanently.
        """
        started = time.monotonic()
        retrying = self.retrying(given_up)
        try:
            answer = retrying(self._ask_replicas, path, body, read)
        except ServerUnavailableError:
            # Where another request was answered meanwhile, the fault is this request's own.
            if self._last_answer < started:
                given_up.set()
            raise
        self._last_answer = time.monotonic()
        return answer

    def ask(self, url: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return one replica's answer to a POST, or to a GET without a body."""
        retrying = self.retrying(threading.Event(), most=2)
        return retrying(self.ask_once, url, path, body)

    def close(self) -> None:
        self._http.close()

    def retrying(self, given_up: threading.Event, *, most: float = math.inf) -> tenacity.Retrying:
        """Retry what a server cannot do now, with doubling pauses and random jitter."""
        # The random part keeps requests that failed together from coming back together.
        pause = self.settings.retry_pause_seconds
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServerUnavailableError),
            stop=tenacity.stop_after_attempt(int(min(self.settings.num_retries, most)) + 1)
            | tenacity.stop_when_event_set(given_up),
            wait=tenacity.wait_exponential(multiplier=pause, max=LONGEST_PAUSE_SECONDS)
            + tenacity.wait_random(0, pause),
            sleep=tenacity.sleep_using_event(given_up),
            reraise=True,
        )

    def _ask_replicas(
        self, path: str, body: dict[str, Any], read: Callable[[str, dict[str, Any]], Result]
    ) -> Result:
        # Each request begins with the next replica. One that failed lately is asked only when the
        # others fail too, so that one that is down costs no waiting.
        urls = self.settings.urls
        now = time.monotonic()
        turn = next(self._turns) % len(urls)
        in_turn = [*urls[turn:], *urls[:turn]]
        reasons: list[str] = []
        for url in sorted(in_turn, key=lambda url: self.rests_until.get(url, 0) > now):
            try:
                answer = read(url, self.ask_once(url, path, body))
            except ServerUnavailableError as error:
                reasons.append(str(error))
                self.let_rest(url, error)
            else:
                if self.rests_until.pop(url, None) is not None:
                    _log.warning("the %s's server at %s answers again", self._whose, url)
                return answer
        raise ServerUnavailableError("; ".join(reasons))

    def let_rest(self, url: str, error: ServerUnavailableError) -> None:
        """For a while, ask a replica that failed only after the others. The failure is logged once
        until it answers again."""
        rests_until = time.monotonic() + REST_SECONDS
        # Several threads share the replicas; only the first one to see a change logs it.
        if self.rests_until.setdefault(url, rests_until) == rests_until:
            message = "the %s's server does not answer, waiting for it: %s"
            _log.warning(message, self._whose, error)
        self.rests_until[url] = rests_until

    def ask_once(
        self,
        url: str,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        may_be_empty: bool = False,
    ) -> dict[str, Any]:
        """Return one replica's answer as `ask` does, without trying again."""
        address = _address(url, path)
        # The timeout of the HTTP client is for each piece of an answer. A server that sends a byte
        # now and then, or an endless answer, is ended by the deadline and the limit here.
        deadline = time.monotonic() + self.settings.timeout_seconds
        method = "GET" if body is None else "POST"
        content = bytearray()
        try:
            with self._http.stream(method, address, json=body) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > self._max_answer_bytes or time.monotonic() > deadline:
                        raise httpx2.ReadError("the answer is too large or takes too long")
        except httpx2.RequestError as error:
            reason = printable(str(error)) or type(error).__name__
            raise ServerUnavailableError(f"{address}{proxy_of(address)}: {reason}") from None
        # What comes is one of three: an answer; a fault that may pass, which is tried again; a
        # refusal, which no waiting changes and which ends the run with advice.
        status = response.status_code
        answer = {} if may_be_empty and not content else _json_object(content)
        if status == 200 and answer is not None:
            return answer
        said = f"HTTP {status}: {self._words_of(answer)}"
        if status in {200, *PASSING_STATUSES} or status >= 500:
            raise ServerUnavailableError(f"{address}: {said}")
        raise ServerRefusedError(
            f"{address} refuses the {self._whose}'s requests ({said})", self._advice(response)
        )

    def _advice(self, response: httpx2.Response) -> str:
        if response.status_code in (401, 403):
            holds = "holds a key that it does not take" if self.key else "is not set"
            variable = self.settings.api_key_variable
            return f"the environment variable {variable} {holds}: set it to the server's key"
        if response.is_redirect:
            setting = f"{self._section}.urls"
            return f"it redirects, which is not followed: give the new address in {setting}"
        return self._refusal_advice

    def _words_of(self, answer: dict[str, Any] | None) -> str:
        """Return the shortened text of an error answer, without the key, which some servers
        repeat."""
        if answer is None:
            return "the answer is no JSON object"
        error = answer.get("error", answer)
        if isinstance(error, dict):
            error = error.get("message") or error.get("detail") or "no reason given"
        text = str(error)
        # The message goes into logs and error texts, which people share.
        if self.key is not None:
            text = text.replace(self.key.get_secret_value(), "***")
        return " ".join(printable(text).split())[:200].rstrip(".")


def own_hosts(urls: Sequence[str]) -> set[str]:
    """Return httpx patterns for addresses of this machine: those that are always its own, and those
    among `urls`."""
    written = [urlsplit(url).hostname or "" for url in urls if is_this_machine(url)]
    return {f"[{host}]" if ":" in host else host for host in (*LOOPBACK, *written)}


def proxy_of(address: str) -> str:
    """Say through which proxy of the environment an address is reached; empty without one."""
    host = urlsplit(address).hostname or ""
    if is_this_machine(address) or proxy_bypass(host):
        return ""
    proxies = getproxies()
    name = next((each for each in (urlsplit(address).scheme, "all") if proxies.get(each)), None)
    return f" (by the proxy of {name.upper()}_PROXY)" if name else ""


def _address(url: str, path: str) -> str:
    # vLLM's routes of token ids are beside its OpenAI-compatible ones, not below them.
    return (url.removesuffix("/v1") if path.startswith("/inference/") else url) + path


def read_key(variable: str) -> SecretStr | None:
    """Read the key in an environment variable, if there is one. `UserError`, which does not show
    it, when no header can hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"environment variable {variable} holds spaces, line breaks or letters that no key can "
            "have; set it to the key."
        )
    return SecretStr(key) if key else None


def _json_object(content: bytes | bytearray) -> dict[str, Any] | None:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or far too long a number
        return None
    return answer if isinstance(answer, dict) else None
