"""A teacher whose answers are kept on disk: the same completion is scored once, by whichever run
asks first.

key = sha256( format, fingerprint of the teacher, sampling temperature, prompt token ids, completion
token ids, witness )

The witness is the longest completion of the rollout batch that was first scored under a fingerprint
and temperature, with its answer. Each session asks for it again before it uses or stores anything,
and sees only entries that were stored under the same witness: so no two teachers' answers are
mixed, whatever they have in common.
"""

import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rlad.config.teacher import CachedTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.teachers import build_teacher
from rlad.teachers import check_teacher as check_any_teacher
from rlad.teachers.base import Answer, Setting, Teacher, TeacherRequest, TeacherWrapper
from rlad.teachers.cache_store import LogprobStore, Witness

_FORMAT = b"rlad log-probs 2"
_GIB = 1024**3

# What a cached teacher may be: one whose answer depends on its weights and the tokens alone.
_CACHEABLE = ("local", "adapter", "served")
_NOT_CACHEABLE = {
    "ema": "the student's moving average gives another answer after each step; leave the cache out",
    "privileged": "a privileged teacher's answer depends on more than the student's tokens; put the cache inside it: "
    "type = 'privileged' in [teacher], type = 'cached' in [teacher.teacher]",
    "several": "several teachers are cached one by one; put the cache inside: type = 'several' in [teacher], type = 'cached' "
    "in each of its teachers",
    "cached": "it is cached already; take one of the two away",
}


class CachedTeacher(TeacherWrapper):
    """Asks the teacher behind it for what is not stored; complete, finite answers alone are stored.

    Raises `UserError` when its answer to the witness differs on average by more than `tolerance`
    nats a token from the stored one. While the witness is not answered whole, nothing is used or
    stored.
    """

    def __init__(
        self,
        teacher: Teacher,
        store: LogprobStore,
        *,
        directory: str,
        temperature: float,
        tolerance: float,
    ):
        assert not teacher.state(), "a teacher that moves cannot be cached"
        super().__init__(teacher)
        self._store, self._directory = store, directory
        self._temperature, self._tolerance = temperature, tolerance
        self._fingerprint = teacher.fingerprint
        self._witness: Witness | None = None
        """the one that this session gave or confirmed"""
        self._witness_key = _digest_of(
            _FORMAT, self._fingerprint.encode(), struct.pack("<d", temperature)
        )
        self._open: set[bytes] = set()
        """the keys of what is asked for and not yet answered, in the present batch"""
        self._whole: dict[bytes, tuple[TeacherRequest, Tensor]] = {}
        """what was answered whole in the present batch, and is stored at its end"""
        self._is_stored = False
        """whether the present batch may be stored"""
        self._num_asked = self._num_hits = 0

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        if not self._open:
            self._begin_batch()
        keys = [entry_key(self._fingerprint, self._temperature, request) for request in requests]
        asked = dict(zip(keys, requests, strict=True))
        known = self._known(asked)
        self._num_asked += len(keys)
        self._num_hits += sum(key in known for key in keys)
        unknown = [key for key in asked if key not in known]
        self._open.update(unknown)
        answers = {key: Answer.finished(values) for key, values in known.items()}
        if unknown:
            submitted = self.teacher.submit([asked[key] for key in unknown])
            for key, answer in zip(unknown, submitted, strict=True):
                wait = partial(self._wait_for, key, asked[key], answer)
                answers[key] = Answer(wait, answer.spans)
        return [answers[key] for key in keys]

    def cancel(self) -> None:
        self._open.clear()
        self._whole.clear()
        super().cancel()

    def _begin_batch(self) -> None:
        """Before anything else, ask again for a witness that this session has not seen
        confirmed."""
        self._whole.clear()
        stored = self._witness or self._store.witness(self._witness_key)
        if stored and not self._witness:
            self._confirm(stored)
        self._is_stored = self._witness is not None or stored is None

    def _wait_for(self, key: bytes, request: TeacherRequest, answer: Answer) -> Tensor:
        """The teacher's answer. The batch is stored when the last of its answers has come: a first
        witness is the longest of them all."""
        values = answer.result()
        if key in self._open:
            self._open.remove(key)
            if _is_whole(values, request):
                self._whole[key] = (request, values)
            if self._is_stored and not self._open:
                self._keep()
        return values

    def _known(self, asked: Mapping[bytes, TeacherRequest]) -> dict[bytes, Tensor]:
        """The stored ones."""
        if not self._witness:
            return {}
        names = {_digest_of(key, self._witness.digest): key for key in asked}
        found = {names[name]: values for name, values in self._store.get(list(names)).items()}
        return {key: values for key, values in found.items() if _is_whole(values, asked[key])}

    def _keep(self) -> None:
        """Store the batch's answers under the witness that all sessions agree on, which is this
        one's where there is none."""
        if not self._whole:
            return
        request, values = max(self._whole.values(), key=lambda answered: len(answered[1]))
        ours = self._witness or Witness(self._witness_key, _pack(request), values)
        held = self._store.claim(ours)
        if held and held.digest == ours.digest:
            self._witness = ours
        elif held:  # another process was first, or the file was lost and begun anew
            self._confirm(held)
        if self._witness:
            self._store.put(
                {
                    _digest_of(key, self._witness.digest): values
                    for key, (_, values) in self._whole.items()
                }
            )
        self._whole.clear()

    def _confirm(self, stored: Witness) -> None:
        """`UserError` when the stored answer is another teacher's. An answer that does not come
        whole confirms nothing."""
        self._witness = None
        request = _unpack(stored.request)
        (answer,) = self.teacher.logprobs([request])
        if not _is_whole(answer, request):
            return
        if (mean := float((answer - stored.logprobs).abs().mean())) > self._tolerance:
            raise UserError(
                f"the cache {self._directory} holds log-probs of another teacher than "
                f"{self.identity!r}: a completion of {len(answer)} tokens, asked for again, differs "
                f"by {mean:.3g} nats a token (teacher.tolerance is {self._tolerance:g}); delete "
                "that folder, or name another teacher.directory."
            )
        self._witness = stored

    def pop_metrics(self) -> dict[str, float]:
        """Share of the completions asked for since the last call that were stored."""
        metrics = super().pop_metrics()
        if self._num_asked:
            metrics["teacher/cache_hits/frac"] = self._num_hits / self._num_asked
        self._num_asked = self._num_hits = 0
        return metrics

    def close(self) -> None:
        self._store.close()
        super().close()


def entry_key(fingerprint: str, temperature: float, request: TeacherRequest) -> bytes:
    """32 bytes; equal for equal questions to equal teachers, and for no others."""
    tokens = (
        np.asarray(ids, dtype="<i8").tobytes() for ids in (request.prompt, request.completion)
    )
    return _digest_of(_FORMAT, fingerprint.encode(), struct.pack("<d", temperature), *tokens)


def _digest_of(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(struct.pack("<Q", len(part)))  # where one part ends and the next begins
        digest.update(part)
    return digest.digest()


def _pack(request: TeacherRequest) -> bytes:
    return json.dumps(
        [[int(token) for token in ids] for ids in (request.prompt, request.completion)]
    ).encode()


def _unpack(packed: bytes) -> TeacherRequest:
    return TeacherRequest(*json.loads(packed))


def _is_whole(values: Tensor, request: TeacherRequest) -> bool:
    return len(values) == len(request.completion) and bool(torch.isfinite(values).all())


def check_teacher(settings: CachedTeacherConfig, setting: Setting) -> list[Finding]:
    if settings.teacher.type not in _CACHEABLE:
        return [Finding("error", "cache", f"{_NOT_CACHEABLE[settings.teacher.type]}.")]
    return [
        *check_any_teacher(settings.teacher, setting),
        _check_directory(Path(settings.directory)),
    ]


def _check_directory(directory: Path) -> Finding:
    there = next(
        path for path in (directory.absolute(), *directory.absolute().parents) if path.exists()
    )
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return Finding(
            "ok",
            "cache",
            f"{directory} can be written" if directory.exists() else f"{directory} will be made",
        )
    return Finding(
        "error",
        "cache",
        f"{directory} cannot be made or written in {there}; name another teacher.directory.",
    )


def make_teacher(settings: CachedTeacherConfig, setting: Setting) -> CachedTeacher:
    store = LogprobStore(Path(settings.directory), max_bytes=int(settings.max_gib * _GIB))
    try:
        teacher = build_teacher(settings.teacher, setting)
    except BaseException:
        store.close()
        raise
    return CachedTeacher(
        teacher,
        store,
        directory=settings.directory,
        temperature=setting.temperature,
        tolerance=settings.tolerance,
    )
