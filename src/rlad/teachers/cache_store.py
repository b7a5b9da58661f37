"""Values on disk by key, in one SQLite file: atomic, for several processes, bounded in size.

A failure of the disk costs stored values, never a run and never a number. An entry whose checksum
does not fit counts as absent. Where nothing can be written any more, stored entries are still read.
"""

import fcntl
import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlad.errors import UserError

FILE = "logprobs-v2.sqlite"
"""The number is that of the format: a file of another format is left alone."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS entries
        (key BLOB PRIMARY KEY, value BLOB NOT NULL, checksum BLOB NOT NULL, used INTEGER NOT NULL);
    CREATE INDEX IF NOT EXISTS by_use ON entries (used);
"""
_NUM_BYTES = """
    SELECT (page_count - freelist_count) * page_size
    FROM pragma_page_count, pragma_freelist_count, pragma_page_size
"""
_DELETE_OLDEST = """
    DELETE FROM entries
    WHERE rowid IN (SELECT rowid FROM entries WHERE used < :pinned ORDER BY used LIMIT 16)
"""
_PINNED = 2**63 - 1
"""The time of use of an entry that is never deleted."""
_ENTRY_OVERHEAD_BYTES = 4096 + 256
"""Of an entry's row, its two index rows, and the page that it may begin."""
_WAIT_SECONDS = 60.0
_log = logging.getLogger(__name__)


class CacheStore:
    """Values by 32-byte keys. Use it in the thread that made it.

    Beyond `max_bytes` the entries used least recently are deleted. Raises `UserError` when `folder`
    cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int):
        self.folder = folder
        self._max_bytes = max_bytes
        self._has_failed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"the teacher's cache {folder} cannot be opened ({error}); free some space, fix "
                f"its permissions, delete {FILE} where it is damaged, or name another "
                "teacher.directory."
            ) from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The values of those keys that are stored and whole."""
        try:
            found = {key: value for key in keys if (value := self._read(key)) is not None}
        except sqlite3.Error as error:
            self._warn(error)
            return {}
        # What was used now is deleted last.
        uses = [(time.time_ns(), key, _PINNED) for key in found]
        update = "UPDATE entries SET used = ? WHERE key = ? AND used < ?"
        self._write(lambda: self._db.executemany(update, uses))
        return found

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Store all of them, or none where that cannot be."""
        now = time.time_ns()
        self._write(lambda: [self._insert(key, one, used=now) for key, one in entries.items()])

    def claim(self, key: bytes, value: bytes) -> bytes | None:
        """The value of a key, the same for all processes: this one where there was none. It is
        never deleted. None where it cannot be stored."""
        self._write(lambda: self._read(key) or self._insert(key, value, used=_PINNED))
        return self.get([key]).get(key)

    def close(self) -> None:
        self._db.close()

    def _open(self) -> None:
        # Two processes that make one file at the same time would lock each other out.
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._db = sqlite3.connect(
                self.folder / FILE, timeout=_WAIT_SECONDS, isolation_level=None
            )
            # Full vacuum: what is deleted leaves the file. The write-ahead log lets one process
            # write while others read.
            self._db.execute("PRAGMA auto_vacuum = FULL")
            self._db.execute("PRAGMA journal_mode = WAL")
            # After a power failure the last transactions may be missing, but the file is whole.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        self._write(lambda: self._make_room(0))

    def _read(self, key: bytes) -> bytes | None:
        # The checksum covers the key too, so that a value under the wrong key is not whole.
        row = self._db.execute(
            "SELECT value, checksum FROM entries WHERE key = ?", (key,)
        ).fetchone()
        return row[0] if row and row[1] == _checksum(key, row[0]) else None

    def _insert(self, key: bytes, value: bytes, *, used: int) -> None:
        if self._make_room(len(value) + _ENTRY_OVERHEAD_BYTES):
            row = (key, value, _checksum(key, value), used)
            self._db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)

    def _make_room(self, num_bytes: int) -> bool:
        """Delete the entries used least recently until so much more fits; False when it never
        can."""
        # A few at a time, as only the file itself shows how much a deletion has freed.
        while self._db.execute(_NUM_BYTES).fetchone()[0] + num_bytes > self._max_bytes:
            if not self._db.execute(_DELETE_OLDEST, {"pinned": _PINNED}).rowcount:
                return False
        return True

    def _write(self, work: Callable[[], object]) -> None:
        """Do all of the work or nothing of it. After a failure nothing more is written."""
        # A disk that is full or locked would cost another wait at every batch.
        if self._has_failed:
            return
        try:
            # The lock is taken at once: one taken at the first write could fail in the middle,
            # after a read.
            self._db.execute("BEGIN IMMEDIATE")
            work()
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._warn(error)
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _warn(self, error: sqlite3.Error) -> None:
        if not self._has_failed:
            _log.warning(
                "rlad: the teacher's cache %s stores nothing more in this run (%s); free some "
                "space, or delete the folder if it is damaged",
                self.folder,
                error,
            )
        self._has_failed = True


def _checksum(key: bytes, value: bytes) -> bytes:
    return hashlib.blake2b(value, key=key, digest_size=16).digest()
