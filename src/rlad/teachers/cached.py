"""A teacher with a cache on disk, so that a completion is scored once for all runs.

key = sha256(format, fingerprint of the teacher, temperature, witness, prompt, completion)

Columns (the log-probs of K entries of the vocabulary at each token) have other keys, with
"teacher_top_k" and K, or "student_top_k" and the entries' ids.

The witness is one completion with its log-probs: the longest completion of the first rollout batch
scored with a fingerprint and temperature. Each session scores it again before it uses or stores
anything, and sees only entries of the same witness. So answers of two teachers are never mixed,
even if a server offers another model under the same name.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlad.config.teacher import CachedTeacherConfig
from rlad.errors import UserError
from rlad.findings import Finding
from rlad.scoring.columns import TokenColumns
from rlad.teachers import build_teacher
from rlad.teachers import check_teacher as check_inner
from rlad.teachers.base import (
    Answer,
    Setting,
    Teacher,
    TeacherRequest,
    TeacherWrapper,
    require_texts,
)
from rlad.teachers.cache_store import CacheStore

_FORMAT = "rlad log-probs 3"

Tokens = tuple[tuple[int, ...], tuple[int, ...]]
"""A prompt and its completion."""


class CachedTeacher(TeacherWrapper):
    """A wrapper that asks its inner teacher only for what is not stored. Only complete and finite
    answers are stored.

    Raises `UserError` if the new answer to the witness differs on average by more than `tolerance`
    nats per token from the stored one. Until the witness is answered completely, nothing is used or
    stored.
    """

    share_metric = "teacher/cache_hits/frac"

    def __init__(
        self, teacher: Teacher, store: CacheStore, *, temperature: float, tolerance: float
    ):
        assert not teacher.state(), "a teacher that moves cannot be cached"
        super().__init__(teacher)
        self._store = store
        self._tolerance = tolerance
        self._witness_key = _key(_FORMAT, teacher.fingerprint, temperature)
        self._witness: bytes | None = None
        """The witness that this session made or confirmed."""
        self._open: set[Tokens] = set()
        """Completions of the current batch that still wait for an answer."""
        self._whole: dict[Tokens, Tensor] = {}
        """Complete answers of the current batch; they are stored once all answers have arrived."""

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        # At the start of a batch, a stored witness that this session has not confirmed is scored
        # again: nothing stored is used before it is known to be this teacher's.
        if not self._open and not self._witness:
            for witness in self._store.get([self._witness_key]).values():
                self._confirm(witness)
        require_texts(requests, "a cache of answers")
        rows = [(tuple(one.prompt), tuple(one.completion)) for one in requests]
        asked = dict(zip(rows, requests, strict=True))
        keys = {self._entry_key(tokens): tokens for tokens in asked} if self._witness else {}
        answers = {}
        for key, value in self._store.get(list(keys)).items():
            logprobs = np.frombuffer(value, dtype="<f4").astype(np.float32)
            answers[keys[key]] = Answer.finished(torch.from_numpy(logprobs))
        self.num_asked += len(rows)
        self.num_counted += sum(tokens in answers for tokens in rows)

        # Ask for what is not stored, each completion once.
        unknown = [tokens for tokens in asked if tokens not in answers]
        submitted = self.teacher.submit([asked[tokens] for tokens in unknown]) if unknown else []
        for tokens, answer in zip(unknown, submitted, strict=True):
            answers[tokens] = Answer(partial(self._wait_for, tokens, answer), answer.spans)
        self._open.update(unknown)
        return [answers[tokens] for tokens in rows]

    @property
    def gives_distributions(self) -> bool:
        return False

    def columns(
        self, requests: Sequence[TeacherRequest], *, top_k: int, ids: Tensor | None = None
    ) -> TokenColumns:
        require_texts(requests, "a cache of answers")
        if requests and not self._witness:
            self._make_witness(requests)
        lengths = [len(one.completion) for one in requests]
        own_ids: list[Any] = [None] * len(requests)
        if ids is not None:
            own_ids = list(ids.cpu().split(lengths))
        keys = []
        if self._witness:
            tokens = [(tuple(one.prompt), tuple(one.completion)) for one in requests]
            keys = [
                self._column_key(row, top_k, own) for row, own in zip(tokens, own_ids, strict=True)
            ]
        stored = self._store.get(keys)
        found = {
            i: _columns_from_bytes(stored[key], lengths[i], top_k)
            for i, key in enumerate(keys)
            if key in stored
        }
        self.num_asked += len(requests)
        self.num_counted += len(found)

        # Ask for everything that is not stored in one request, and store the complete answers.
        unknown = [i for i in range(len(requests)) if i not in found]
        if unknown:
            asked = self.teacher.columns(
                [requests[i] for i in unknown],
                top_k=top_k,
                ids=None if ids is None else torch.cat([own_ids[i] for i in unknown]),
            )
            # Convert them as they will be read later, so that a resumed run finds the same numbers.
            asked = TokenColumns(asked.ids.cpu(), asked.logprobs.cpu().float())
            found |= zip(unknown, asked.split([lengths[i] for i in unknown]), strict=True)
        if keys:
            whole = [i for i in unknown if not found[i].logprobs.isnan().any()]
            self._store.put({keys[i]: _columns_to_bytes(found[i]) for i in whole})
        parts = [found[i] for i in range(len(requests))]
        return TokenColumns.joined([TokenColumns.missing(0, top_k), *parts])

    def cancel(self) -> None:
        self._open.clear()
        self._whole.clear()
        super().cancel()

    def close(self) -> None:
        self._store.close()
        super().close()

    def _wait_for(self, tokens: Tokens, answer: Answer) -> Tensor:
        """Wait for the inner teacher's answer. After the last one of a batch, store the batch."""
        logprobs = answer.result()
        # The same answer may be waited for twice, or after the batch was given up.
        if tokens in self._open:
            self._open.remove(tokens)
            if _is_whole(logprobs, tokens):
                self._whole[tokens] = logprobs
            if not self._open and self._whole:
                self._store_batch()
        return logprobs

    def _store_batch(self) -> None:
        """Store the batch under the witness that all sessions agree on; make one if there is
        none."""
        # The longest completion distinguishes two teachers best.
        longest = max(self._whole, key=lambda tokens: len(tokens[1]))
        self._claim_witness(longest, self._whole[longest])
        if self._witness:
            entries = {
                # Little-endian float32 on every machine.
                self._entry_key(tokens): logprobs.numpy().astype("<f4").tobytes()
                for tokens, logprobs in self._whole.items()
            }
            self._store.put(entries)
        self._whole.clear()

    def _claim_witness(self, tokens: Tokens, logprobs: Tensor) -> None:
        """Agree with all sessions on one witness; store this one if there is none."""
        ours = self._witness or json.dumps([*tokens, logprobs.tolist()]).encode()
        # Two sessions may come here at once: the witness of the first is used by both.
        held = self._store.claim(self._witness_key, ours)
        if held == ours:
            self._witness = ours
        elif held:  # another process was first, or the file was lost and created again
            self._confirm(held)

    def _make_witness(self, requests: Sequence[TeacherRequest]) -> None:
        """Confirm the stored witness, or score the longest of these completions as the witness."""
        for witness in self._store.get([self._witness_key]).values():
            self._confirm(witness)
            return
        longest = max(requests, key=lambda one: len(one.completion))
        tokens = (tuple(longest.prompt), tuple(longest.completion))
        (answer,) = self.teacher.logprobs([TeacherRequest(*tokens)])
        if _is_whole(answer, tokens):
            self._claim_witness(tokens, answer)

    def _confirm(self, witness: bytes) -> None:
        """Raise `UserError` if the stored answer is another teacher's. An incomplete answer
        confirms nothing."""
        self._witness = None
        prompt, completion, stored = json.loads(witness)
        (answer,) = self.teacher.logprobs([TeacherRequest(prompt, completion)])
        if not _is_whole(answer, (prompt, completion)):
            return
        # Servers round differently from batch to batch, so the same teacher gives only nearly the
        # same answer.
        difference = float((answer - torch.tensor(stored)).abs().mean())
        if difference > self._tolerance:
            raise UserError(
                f"the cache {self._store.folder} holds log-probs of another teacher than "
                f"{self.identity!r}: a completion of {len(answer)} tokens, asked for again, "
                f"differs by {difference:.3g} nats per token (teacher.tolerance is "
                f"{self._tolerance:g}); delete that folder, or name another teacher.directory."
            )
        self._witness = witness

    def _entry_key(self, tokens: Tokens) -> bytes:
        assert self._witness is not None
        return _key(self._witness_key.hex(), self._witness.decode(), *tokens)

    def _column_key(self, tokens: Tokens, top_k: int, ids: Tensor | None) -> bytes:
        support = ["teacher_top_k", top_k]
        if ids is not None:
            content = ids.numpy().astype("<i8").tobytes()
            support = ["student_top_k", top_k, hashlib.sha256(content).hexdigest()]
        return _key(self._entry_key(tokens).hex(), *support)


def _key(*parts: Any) -> bytes:
    """Return a hash of 32 bytes, equal only for equal parts."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _columns_to_bytes(columns: TokenColumns) -> bytes:
    """Return little-endian int32 ids, then float32 log-probs, on every machine."""
    ids = columns.ids.numpy().astype("<i4").tobytes()
    return ids + columns.logprobs.numpy().astype("<f4").tobytes()


def _columns_from_bytes(content: bytes, num_tokens: int, top_k: int) -> TokenColumns:
    num_ids = num_tokens * top_k
    ids = np.frombuffer(content, dtype="<i4", count=num_ids).astype(np.int64)
    logprobs = np.frombuffer(content, dtype="<f4", offset=4 * num_ids).astype(np.float32)
    return TokenColumns(
        torch.from_numpy(ids).view(num_tokens, top_k),
        torch.from_numpy(logprobs).view(num_tokens, top_k + 1),
    )


def _is_whole(logprobs: Tensor, tokens: Sequence[Sequence[int]]) -> bool:
    return len(logprobs) == len(tokens[1]) and bool(logprobs.isfinite().all())


def check_teacher(settings: CachedTeacherConfig, setting: Setting) -> list[Finding]:
    # A cache is keyed by the student's tokens, so the teacher must see nothing else and must not
    # change.
    inner = settings.teacher
    advice = {"ema": "leave the cache out", "cached": "remove one of the two"}
    if inner.type in advice or inner.children:
        message = (
            f"the answers of a teacher of type {inner.type!r} cannot be cached; "
            f"{advice.get(inner.type, 'put the cache inside it')}."
        )
        return [Finding("error", "cache", message)]
    # If the folder does not exist yet, its nearest existing parent must be writable.
    folder = Path(settings.directory)
    parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    findings = check_inner(inner, setting)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        message = f"{folder} cannot be written in {parent}; name another teacher.directory."
        findings.append(Finding("error", "cache", message))
    return findings


def make_teacher(settings: CachedTeacherConfig, setting: Setting) -> CachedTeacher:
    return CachedTeacher(
        build_teacher(settings.teacher, setting),
        CacheStore(Path(settings.directory), max_bytes=int(settings.max_gib * 2**30)),
        temperature=setting.temperature,
        tolerance=settings.tolerance,
    )
