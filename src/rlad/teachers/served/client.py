"""HTTP to the replicas of one model: retries with growing pauses, failover, answers of bounded
size."""

import json
import logging
import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import httpx2
import tenacity
from pydantic import SecretStr

from rlad.config.teacher import ServedTeacherConfig
from rlad.errors import RunFailedError, UserError
from rlad.text import printable

LONGEST_PAUSE_SECONDS = 60.0
REST_SECONDS = 30.0
"""for which a replica that failed is asked only after the others"""
CONNECT_SECONDS = 10.0
PASSING_STATUSES = {408, 425, 429}
"""of 400 to 499: what waiting mends"""

_log = logging.getLogger(__name__)


class ServerUnavailableError(Exception):
    """No usable answer, which waiting may mend: refused connection, timeout, HTTP 429 or 5xx, an
    answer that is no JSON."""

    def __init__(self, reason: str, *, is_connected: bool = True, pause_seconds: float = 0.0):
        self.is_connected, self.pause_seconds = is_connected, pause_seconds
        super().__init__(reason)


class ServerRefusedError(RunFailedError):
    """The server will not answer such a request, now or later."""

    def __init__(self, message: str, *, status: int):
        self.status = status
        super().__init__(message)


@dataclass(slots=True)
class Replica:
    url: str
    num_open_requests: int = 0
    rests_until: float = 0.0
    """`time.monotonic()`"""


class Patience:
    """Whether requests that belong together still wait for a server: not once one of them has
    waited in vain."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self._last_answer = 0.0

    def answered(self) -> None:
        self._last_answer = time.monotonic()

    def waited_in_vain(self, since: float) -> None:
        """A request was given up. Where others had answers meanwhile, it is that request's own
        fault."""
        if self._last_answer < since:
            self.is_over.set()


class CompletionsClient:
    """Sends requests to whichever replica answers. The key is a bearer token that is shown nowhere;
    redirects are refused."""

    def __init__(self, settings: ServedTeacherConfig):
        """Raises `UserError` for a key that cannot be sent in a header."""
        self.replicas = [Replica(url) for url in settings.urls]
        self.key = read_key(settings.api_key_variable)
        self._settings, self._lock = settings, threading.Lock()
        headers = {"Accept-Encoding": "identity"}  # so that bytes counted are bytes held
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key.get_secret_value()}"
        seconds = settings.timeout_seconds
        self._http = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS)),
            limits=httpx2.Limits(max_connections=settings.max_concurrent_requests),
            trust_env=not all(
                map(is_this_machine, settings.urls)
            ),  # no proxy need see what stays here
        )

    def complete(
        self, body: dict[str, Any], *, max_bytes: int, patience: Patience
    ) -> dict[str, Any]:
        """The answer of any replica to a completion request.

        All replicas are tried in turn, then all again after a pause, `num_retries` times or until
        patience is over. Raises `ServerUnavailableError` when that was in vain,
        `ServerRefusedError` when one refuses for good.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ServerUnavailableError),
            stop=tenacity.stop_after_attempt(self._settings.num_retries + 1)
            | tenacity.stop_when_event_set(patience.is_over),
            wait=self._pause(),
            sleep=tenacity.sleep_using_event(patience.is_over),
            reraise=True,
        )
        started = time.monotonic()
        try:
            answer = retrying(self._of_any_replica, body, max_bytes)
        except ServerUnavailableError:
            patience.waited_in_vain(since=started)
            raise
        patience.answered()
        return answer

    def ask(
        self, url: str, path: str, body: dict[str, Any] | None = None, *, max_bytes: int
    ) -> dict[str, Any]:
        """The answer of one replica to a POST, or to a GET without a body. Asked thrice, but only
        once when nothing listens."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, ServerUnavailableError) and error.is_connected
            ),
            stop=tenacity.stop_after_attempt(min(self._settings.num_retries, 2) + 1),
            wait=self._pause(),
            reraise=True,
        )
        return retrying(self._once, url + path, body, max_bytes)

    def close(self) -> None:
        self._http.close()

    def _of_any_replica(self, body: dict[str, Any], max_bytes: int) -> dict[str, Any]:
        reasons: dict[str, ServerUnavailableError] = {}
        while len(reasons) < len(self.replicas):
            replica = self._take(reasons)
            try:
                answer = self._once(replica.url + "/completions", body, max_bytes)
            except ServerUnavailableError as error:
                reasons[replica.url] = error
                self._note_failure(replica, error)
            else:
                self._note_answer(replica)
                return answer
            finally:
                with self._lock:
                    replica.num_open_requests -= 1
        raise ServerUnavailableError(
            "; ".join(str(reason) for reason in reasons.values()),
            pause_seconds=min(reason.pause_seconds for reason in reasons.values()),
        )

    def _take(self, tried: dict[str, Any]) -> Replica:
        """The replica to ask next: of those that were not tried, one that did not fail lately and
        has the least to do."""
        with self._lock:
            now = time.monotonic()
            left = [replica for replica in self.replicas if replica.url not in tried]
            replica = min(
                left, key=lambda replica: (replica.rests_until > now, replica.num_open_requests)
            )
            replica.num_open_requests += 1
            return replica

    def _note_failure(self, replica: Replica, error: ServerUnavailableError) -> None:
        with self._lock:
            is_news, replica.rests_until = replica.rests_until == 0, time.monotonic() + REST_SECONDS
        if is_news:
            _log.warning("the teacher's server does not answer, waiting for it: %s", error)

    def _note_answer(self, replica: Replica) -> None:
        with self._lock:
            is_news, replica.rests_until = replica.rests_until > 0, 0.0
        if is_news:
            _log.warning("the teacher's server at %s answers again", replica.url)

    def _pause(self) -> Any:
        """Seconds before the next try: exponential with jitter; what the server asks for with
        Retry-After if that is more."""
        first = self._settings.retry_pause_seconds
        growing = tenacity.wait_exponential(
            multiplier=first, max=LONGEST_PAUSE_SECONDS
        ) + tenacity.wait_random(0, first)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            asked = error.pause_seconds if isinstance(error, ServerUnavailableError) else 0.0
            return max(growing(state), min(asked, LONGEST_PAUSE_SECONDS))

        return pause

    def _once(self, address: str, body: dict[str, Any] | None, max_bytes: int) -> dict[str, Any]:
        deadline = time.monotonic() + self._settings.timeout_seconds
        try:
            with self._http.stream(
                "GET" if body is None else "POST", address, json=body
            ) as response:
                content = _read(response, address, max_bytes, deadline)
        except httpx2.RequestError as error:
            is_connected = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
            reason = printable(str(error)) or type(error).__name__
            raise ServerUnavailableError(
                f"{address}: {reason}", is_connected=is_connected
            ) from None
        if response.status_code in PASSING_STATUSES or response.status_code >= 500:
            reason = f"{address}: HTTP {response.status_code}{self._words_of(content)}"
            raise ServerUnavailableError(reason, pause_seconds=_retry_after(response))
        if response.status_code != 200:
            raise ServerRefusedError(
                self._refusal(address, response, content), status=response.status_code
            )
        return _parsed(content, address)

    def _refusal(self, address: str, response: httpx2.Response, content: bytes) -> str:
        status, variable = response.status_code, self._settings.api_key_variable
        said = (
            f"{address} refuses the teacher's requests (HTTP {status}{self._words_of(content)}); "
        )
        if status in (401, 403):
            state = (
                "is not set: set it to the server's key"
                if self.key is None
                else "holds a key that it does not take"
            )
            return f"{said}the environment variable {variable} {state}."
        if response.is_redirect:
            return f"{said}it redirects, which is not followed: give the address it redirects to in teacher.urls."
        return f"{said}check teacher.urls, teacher.model and the server's own log."

    def _words_of(self, content: bytes) -> str:
        """What an error answer says, in short, without the key that some servers repeat."""
        text = content.decode("utf-8", "replace")
        try:
            answer = _parsed(content, "")
            error = answer.get("error", answer)
            text = str(
                (error.get("message") or error.get("detail") or "")
                if isinstance(error, dict)
                else error
            )
        except ServerUnavailableError:
            text = "" if "<" in text else text  # a web page
        if self.key is not None:
            text = text.replace(self.key.get_secret_value(), "***")
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return f": {text[:200].rstrip('.')}" if text else ""


def is_this_machine(url: str) -> bool:
    return httpx2.URL(url).host in ("127.0.0.1", "localhost", "::1")


def read_key(variable: str) -> SecretStr | None:
    """The key in an environment variable, or None. `UserError`, which does not show it, when no
    header can hold it."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"environment variable {variable} holds spaces, line breaks or letters that no key can "
            "have; set it to the key."
        )
    return SecretStr(key) if key else None


def _read(response: httpx2.Response, address: str, max_bytes: int, deadline: float) -> bytes:
    """The whole body. `ServerUnavailableError` when it is larger than allowed, or slower than the
    deadline."""
    pieces: list[bytes] = []
    size = 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > max_bytes:
            raise ServerUnavailableError(
                f"{address}: the answer is larger than the {max_bytes} bytes it can need"
            )
        if time.monotonic() > deadline:
            raise ServerUnavailableError(
                f"{address}: the answer takes longer than teacher.timeout_seconds"
            )
    return b"".join(pieces)


def _parsed(content: bytes, address: str) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        raise ServerUnavailableError(f"{address}: the answer is no JSON object")
    return answer


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that the server asks to wait; 0 when it names none (a date counts as none)."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdecimal() and text.isascii() else 0.0
