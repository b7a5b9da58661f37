"""A key-value store in one SQLite file: atomic, shared by several processes, bounded in size.

A disk failure may lose stored values, but never stops a run or changes a number. An entry with a
wrong checksum counts as absent. If nothing can be written any more, stored entries are still read.
"""

import fcntl
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlad.errors import UserError

FILE = "logprobs-v3.sqlite"
"""The number is the version of the format. Files of other versions are not touched."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS entries
        (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL)
"""
_WAIT_SECONDS = 60.0
_PAGE_BYTES = 4096
_log = logging.getLogger(__name__)


class CacheStore:
    """A store of values by 32-byte keys. Use it only in the thread that made it.

    The file does not grow beyond `max_bytes`. Raises `UserError` if `folder` cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int):
        self.folder = folder
        self._has_failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Two processes that create the file at the same time would lock each other out.
            with (folder / ".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._db = sqlite3.connect(
                    folder / FILE, timeout=_WAIT_SECONDS, isolation_level=None
                )
                # The write-ahead log lets one process write while others read. After a power
                # failure the last transactions may be missing, but the file is whole.
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
                self._db.execute(_SCHEMA)
            self._db.execute(f"PRAGMA max_page_count = {max(max_bytes // _PAGE_BYTES, 1)}")
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"the teacher's cache {folder} cannot be opened ({error}); free some space, fix "
                f"its permissions, delete {FILE} where it is damaged, or name another "
                "teacher.directory."
            ) from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return the values of those keys that are stored and intact."""
        try:
            return {key: value for key in keys if (value := self._read(key)) is not None}
        except sqlite3.Error as error:
            self._warn(error)
            return {}

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Store all entries, or none if that fails."""
        self._write(lambda: [self._insert(key, value) for key, value in entries.items()])

    def claim(self, key: bytes, value: bytes) -> bytes | None:
        """Return the value of a key, the same for all processes. If there is none, store `value`
        first. Returns None if it cannot be stored."""
        self._write(lambda: self._read(key) or self._insert(key, value))
        return self.get([key]).get(key)

    def close(self) -> None:
        self._db.close()

    def _read(self, key: bytes) -> bytes | None:
        # The checksum covers the key too, so that a value under the wrong key counts as damaged.
        row = self._db.execute(
            "SELECT value, checksum FROM entries WHERE key = ?", (key,)
        ).fetchone()
        return row[0] if row and row[1] == _checksum(key, row[0]) else None

    def _insert(self, key: bytes, value: bytes) -> None:
        row = (key, value, _checksum(key, value))
        self._db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", row)

    def _write(self, work: Callable[[], object]) -> None:
        """Do all of the work, or none of it. After a failure nothing more is written."""
        # Otherwise a full or locked disk would cost another wait at every batch.
        if self._has_failed:
            return
        try:
            # Take the lock at once: a lock taken at the first write could fail in the middle, after
            # a read.
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                work()
        except sqlite3.Error as error:
            self._warn(error)

    def _warn(self, error: sqlite3.Error) -> None:
        if not self._has_failed:
            _log.warning(
                "rlad: the teacher's cache %s stores nothing more in this run (%s); free some "
                "space, raise teacher.max_gib, or delete the folder if it is damaged",
                self.folder,
                error,
            )
        self._has_failed = True


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key, digest_size=16).digest()
