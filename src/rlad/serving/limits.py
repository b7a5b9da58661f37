"""What bounds a teacher server's memory and patience: room for answers, answers in pieces,
connections that are cut."""

import asyncio
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_OPEN_REQUESTS = 256
_PIECE_BYTES = 256 * 1024


class Room:
    """So many units for all together; those who find too few free wait their turn."""

    def __init__(self, size: int):
        self.size = self.num_free = size
        self._turn, self._freed = asyncio.Lock(), asyncio.Event()

    async def take(self, size: int) -> int:
        """Waits for so many units, at most all; returns how many to give back."""
        size = min(size, self.size)
        async with (
            self._turn
        ):  # first come, first served: a large request is not passed over for ever
            while self.num_free < size:
                self._freed.clear()
                await self._freed.wait()
            self.num_free -= size
        return size

    def give_back(self, size: int) -> None:
        self.num_free += size
        self._freed.set()


class AnswerInPieces(Response):
    """Sends its content no faster than it is read; `then` is called when it is sent, or its reader
    has gone."""

    def __init__(self, content: bytes, then: Callable[[], None]):
        super().__init__(content, media_type="application/json")
        self._then = then

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        content = memoryview(self.body)
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            for start in range(0, len(content), _PIECE_BYTES):
                piece = bytes(content[start : start + _PIECE_BYTES])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self._then()


class ImpatientProtocol(H11Protocol):
    """Cuts connections that do not come to the end of a request's head, or leave an answer unread.

    Of those that have asked nothing yet only so many are kept, the newest: they must not take the
    place of others.
    """

    head_seconds, unread_seconds, max_silent = 10.0, 30.0, 128
    _head_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.opened = self.loop.time()
        self._wait_for_head()
        silent: list[Any] = [
            each for each in self.connections if getattr(each, "cycle", None) is None
        ]
        if len(silent) > self.max_silent:
            min(silent, key=lambda each: each.opened).transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread_timer = _cancelled(self._unread_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_timer, self._unread_timer = (
            _cancelled(self._head_timer),
            _cancelled(self._unread_timer),
        )
        super().connection_lost(exc)

    def _wait_for_head(self) -> None:
        """The time that a head may take begins with its first byte, or with the connection."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._head_timer = _cancelled(self._head_timer)
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self.transport.abort)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def server_config(app: Any, **settings: Any) -> uvicorn.Config:
    """How uvicorn serves a teacher; `settings` join or replace those here."""
    own: dict[str, Any] = {
        "http": ImpatientProtocol,
        "ws": "none",
        "log_level": "error",  # warnings are of what clients do wrong: a line for each would fill a disk, or block a full pipe
        "access_log": False,
        "limit_concurrency": MAX_OPEN_REQUESTS,
        "timeout_graceful_shutdown": 5,
    }
    return uvicorn.Config(app, **(own | settings))
