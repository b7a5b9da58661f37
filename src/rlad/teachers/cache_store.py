"""Log-probs on disk by key, in one SQLite file: atomic, for several processes at once, bounded in
size.

What goes wrong on the disk costs stored answers, never a run and never a number: an entry whose
checksum does not fit counts as absent, a damaged file is set aside, and where nothing can be
written any more, what is stored is still read. Each is said once.
"""

import fcntl
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlad.errors import UserError

FILE = "logprobs-v1.sqlite"
"""the number is that of the format; a file of another format is left alone"""

_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, logprobs BLOB NOT NULL, checksum "
    "BLOB NOT NULL, used INTEGER)",
    "CREATE INDEX IF NOT EXISTS by_use ON entries (used)",
    "CREATE TABLE IF NOT EXISTS witnesses (key BLOB PRIMARY KEY, request BLOB NOT NULL, logprobs "
    "BLOB NOT NULL, digest BLOB)",
)
_OLDEST = "SELECT rowid FROM entries ORDER BY used LIMIT 16"
# Of an entry's row, its two index rows, and the page that it may begin.
_ENTRY_OVERHEAD_BYTES = 4096 + 256
_MAX_JOURNAL_BYTES, _WAIT_SECONDS = 64 * 1024**2, 60.0
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Witness:
    """One request with its answer, by which answers of the same origin are known; its key says for
    whom it speaks."""

    key: bytes
    request: bytes
    logprobs: Tensor

    @property
    def digest(self) -> bytes:
        """16 bytes."""
        answer = _to_bytes(self.logprobs)
        return _checksum(self.key, len(answer).to_bytes(8, "little") + answer + self.request)


class LogprobStore:
    """Log-probs, float32 `[token]` on the CPU, by 32-byte keys. Use in the thread that made it.

    Beyond `max_bytes` the entries used least recently are deleted; witnesses stay. Raises
    `UserError` when `folder` cannot be used.
    """

    def __init__(self, folder: Path, *, max_bytes: int):
        self._folder, self._path, self._max_bytes = folder, folder / FILE, max_bytes
        self._writes = True
        self._said: set[str] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                self._open()
            except sqlite3.DatabaseError as error:
                if not _is_damage(error):
                    raise
                self._set_aside(error)
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"the teacher's cache {folder} cannot be opened ({error}); free some space, mend "
                "its permissions, or name "
                "another teacher.directory."
            ) from None

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Those of the keys that are stored and whole."""
        found: dict[bytes, Tensor] = {}
        try:
            for key in keys:
                row = self._db.execute(
                    "SELECT logprobs, checksum FROM entries WHERE key = ?", (key,)
                ).fetchone()
                if row and row[1] == _checksum(key, row[0]):
                    found[key] = _to_tensor(row[0])
        except sqlite3.Error as error:
            self._bear(error)
        uses = [(time.time_ns(), key) for key in found]
        if uses:
            self._write(
                lambda: self._db.executemany("UPDATE entries SET used = ? WHERE key = ?", uses)
            )
        return found

    def put(self, entries: Mapping[bytes, Tensor]) -> None:
        """Store them; none where that cannot be."""

        def insert() -> None:
            for key, values in entries.items():
                stored = _to_bytes(values)
                if self._make_room(len(stored) + _ENTRY_OVERHEAD_BYTES):
                    row = (key, stored, _checksum(key, stored), time.time_ns())
                    self._db.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?)", row)

        if entries:
            self._write(insert)

    def witness(self, key: bytes) -> Witness | None:
        """The one stored under this key, if it is whole."""
        try:
            return self._read_witness(key)
        except sqlite3.Error as error:
            self._bear(error)
            return None

    def claim(self, witness: Witness) -> Witness | None:
        """The witness under its key, the same for all processes: this one where there was none.
        None where none can be kept."""

        def insert() -> None:
            request, answer = witness.request, _to_bytes(witness.logprobs)
            if self._read_witness(witness.key) is None and self._make_room(
                len(request) + len(answer) + _ENTRY_OVERHEAD_BYTES
            ):
                row = (witness.key, request, answer, witness.digest)
                self._db.execute("INSERT OR REPLACE INTO witnesses VALUES (?, ?, ?, ?)", row)

        if held := self.witness(witness.key):
            return held
        self._write(insert)
        return self.witness(witness.key)

    def _read_witness(self, key: bytes) -> Witness | None:
        row = self._db.execute(
            "SELECT request, logprobs, digest FROM witnesses WHERE key = ?", (key,)
        ).fetchone()
        if row is None or len(row[1]) % 4:
            return None
        witness = Witness(key, row[0], _to_tensor(row[1]))
        return witness if witness.digest == row[2] else None

    def close(self) -> None:
        self._db.close()

    def _open(self) -> None:
        with self._alone():  # two processes that make one file at once would lock each other out
            self._db = sqlite3.connect(self._path, timeout=_WAIT_SECONDS, isolation_level=None)
            self._inode = os.stat(self._path).st_ino
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._db.execute("PRAGMA journal_mode = WAL")
        # After a power failure the last transactions may be missing, but the file is whole.
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute(f"PRAGMA journal_size_limit = {_MAX_JOURNAL_BYTES}")
        self._transact(lambda: [self._db.execute(statement) for statement in _SCHEMA])
        self._transact(lambda: self._make_room(0))
        self._db.executescript(
            "PRAGMA incremental_vacuum"
        )  # `execute` would free one page and stop

    # --- size ---------------------------------------------------------------------------------------------------------

    def _make_room(self, num_bytes: int) -> bool:
        """Delete what was used least recently until so much more fits; False when it never can."""
        while self._used_bytes() + num_bytes > self._max_bytes:
            if not self._db.execute(f"DELETE FROM entries WHERE rowid IN ({_OLDEST})").rowcount:
                return False
        return True

    def _used_bytes(self) -> int:
        """Of the pages that hold something; deleted entries leave theirs to those that come."""
        pages, free, size = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    # --- what can go wrong --------------------------------------------------------------------------------------------

    def _write(self, work: Callable[[], object]) -> None:
        """A transaction, unless one has failed before."""
        if not self._writes:
            return
        try:
            self._transact(work)
        except sqlite3.Error as error:
            self._bear(error)

    def _transact(self, work: Callable[[], object]) -> None:
        """All of the work or nothing."""
        try:
            self._db.execute("BEGIN IMMEDIATE")
            work()
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _bear(self, error: sqlite3.Error) -> None:
        """Go on without what failed, and say so."""
        if not _is_damage(error):
            self._writes = False
            self._say(
                f"the teacher's cache {self._folder} stores nothing more in this run ({error}); "
                "the run goes on without"
            )
            return
        try:
            self._set_aside(error)
        except (OSError, sqlite3.Error) as another:
            self._writes = False
            self._say(
                f"the teacher's cache {self._folder} is damaged and cannot be set aside "
                f"({another}); the run goes on"
            )

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Rename the damaged file, unless another process has done so, and begin a new one."""
        self._db.close()
        with self._alone():
            if self._path.exists() and os.stat(self._path).st_ino == self._inode:
                aside = self._folder / f"{FILE}.damaged-{time.time_ns()}"
                for ending in ("", "-wal", "-shm"):
                    if (part := self._path.with_name(FILE + ending)).exists():
                        part.rename(aside.with_name(aside.name + ending))
                self._say(
                    f"the teacher's cache was damaged ({error}): it is now {aside}, to be deleted, "
                    "and a new one begins"
                )
        self._open()

    def _alone(self) -> "_Lock":
        return _Lock(self._folder / ".lock")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.warning("rlad: %s", text)


class _Lock:
    """Held by one process at a time."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> None:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _to_bytes(values: Tensor) -> bytes:
    return values.numpy().astype("<f4").tobytes()


def _to_tensor(stored: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(stored, dtype="<f4").astype(np.float32))


def _checksum(key: bytes, stored: bytes) -> bytes:
    return hashlib.blake2b(stored, key=key, digest_size=16).digest()


def _is_damage(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED
