"""A cached teacher: the same numbers as the one behind it, whatever happens to the disk."""

import json
import logging
import os
import resource
import sqlite3
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import rlad
from rlad.cli.main import main
from rlad.errors import UserError
from rlad.runs.directory import METRICS, RunDirectory
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.teachers.cache_store import FILE, CacheStore
from rlad.teachers.cached import CachedTeacher
from rlad.teachers.fingerprint import weights_fingerprint
from rlad.teachers.local import LocalTeacher
from tiny_models import random_tokens, tiny_language_model
from tiny_runs import (
    OFTEN_CORRECT,
    remains,
    rlad_fails,
    run_config,
    write_config,
    write_model,
)

GIB = 1024**3
HITS = "teacher/cache_hits/frac"


class Asked(LocalTeacher):
    """A real teacher that notes what it is asked."""

    def __init__(self, seed: int = 3, *, temperature: float = 1.0):
        super().__init__(
            tiny_language_model(seed=seed), temperature=temperature, tokens_per_batch=10_000
        )
        self.asked: list[TeacherRequest] = []
        self.added = 0.0

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        self.asked += requests
        return [values + self.added for values in super().logprobs(requests)]


def requests(*lengths: int, seed: int = 0) -> list[TeacherRequest]:
    prompts, completions = (
        random_tokens(*[5] * len(lengths), seed=seed),
        random_tokens(*lengths, seed=seed + 100),
    )
    return [TeacherRequest(*pair) for pair in zip(prompts, completions, strict=True)]


def cached(
    teacher: Teacher, folder: Path, *, temperature: float = 1.0, max_bytes: int = GIB
) -> CachedTeacher:
    store = CacheStore(folder, max_bytes=max_bytes)
    return CachedTeacher(teacher, store, temperature=temperature, tolerance=0.1)


def same(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))


def close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Up to the rounding of other batches."""
    return all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


# --- hits -----------------------------------------------------------------------------------------


def test_a_hit_is_the_same_bit_for_bit_and_asks_nobody(tmp_path):
    """Each session first asks for the witness, the longest of the first; nothing else is asked for
    again."""
    wanted, teacher = requests(7, 3, 12), Asked()
    first = cached(teacher, tmp_path).logprobs(wanted)
    assert teacher.asked == wanted and same(first, LocalTeacher.logprobs(teacher, wanted))
    again, teacher = cached(later := Asked(), tmp_path), later
    assert same(again.logprobs(wanted), first) and teacher.asked == [wanted[2]]
    assert same(again.logprobs(wanted[::-1]), first[::-1]) and teacher.asked == [wanted[2]]


def test_what_is_missing_is_asked_for_alone_and_once(tmp_path):
    wanted, new = requests(4, 6), requests(5, seed=9)[0]
    teacher = Asked()
    both = cached(teacher, tmp_path)
    both.logprobs(wanted)
    assert both.pop_metrics() == {"teacher/cache_hits/frac": 0.0} and both.pop_metrics() == {}
    values = both.logprobs([new, wanted[1], new, wanted[0]])
    assert teacher.asked == [
        *wanted,
        new,
    ]  # the session that gave the witness need not be asked for it
    assert both.pop_metrics() == {"teacher/cache_hits/frac": 0.5}
    assert same(
        values,
        [
            LocalTeacher.logprobs(teacher, [request])[0]
            for request in (new, wanted[1], new, wanted[0])
        ],
    )


def test_only_complete_and_finite_answers_are_stored(tmp_path):
    class Faulty(Asked):
        def logprobs(self, requests):
            values = super().logprobs(requests)
            values[0][1] = torch.nan
            values[1] = values[1][:-1]
            return values

    wanted = requests(4, 6, 5)
    faulty = cached(Faulty(), tmp_path).logprobs(wanted)
    assert faulty[0][1].isnan() and len(faulty[1]) == 5
    teacher = Asked()
    assert same(
        cached(teacher, tmp_path).logprobs(wanted)[:2], LocalTeacher.logprobs(teacher, wanted)[:2]
    )
    assert teacher.asked == [wanted[2], *wanted[:2]]


# --- what the key knows ---------------------------------------------------------------------------


def test_the_key_changes_with_every_token(tmp_path):
    """Nothing but the same tokens, divided in the same way, is found."""
    wanted = TeacherRequest([1, 2], [3, 4])
    others = [
        TeacherRequest([1], [2, 3, 4]),
        TeacherRequest([1, 2, 3], [4]),
        TeacherRequest([1, 2], [3, 5]),
        TeacherRequest([1, 2], [3]),
        TeacherRequest([2, 1], [3, 4]),
    ]
    teacher = Asked()
    both = cached(teacher, tmp_path)
    both.logprobs([wanted])
    both.logprobs(others)
    both.logprobs([TeacherRequest((1, 2), (3, 4))])
    assert teacher.asked == [wanted, *others]


@pytest.mark.parametrize("change", ["temperature", "weights", "one weight", "dtype"])
def test_another_teacher_of_the_same_name_finds_nothing(tmp_path, change):
    wanted = requests(7, 3)
    cached(Asked(), tmp_path).logprobs(wanted)
    temperature = 0.5 if change == "temperature" else 1.0
    other = Asked(4 if change == "weights" else 3, temperature=temperature)
    if change == "one weight":
        next(other.language_model.model.parameters()).data[-1, -1] += 1e-3
    if change == "dtype":
        other.language_model = tiny_language_model(seed=3, dtype=torch.bfloat16)
    assert other.identity == Asked().identity
    cached(other, tmp_path, temperature=temperature).logprobs(wanted)
    assert other.asked == wanted


def test_the_fingerprint_is_that_of_the_weights():
    assert weights_fingerprint(tiny_language_model(seed=1)) == weights_fingerprint(
        tiny_language_model(seed=1)
    )
    assert weights_fingerprint(tiny_language_model(seed=1)) != weights_fingerprint(
        tiny_language_model(seed=2)
    )
    # The same weights in a model that turns positions faster.
    slow, fast = (
        tiny_language_model(rope_parameters={"rope_type": "default", "rope_theta": t})
        for t in (1e4, 1e3)
    )
    assert weights_fingerprint(slow) != weights_fingerprint(fast)


# --- the witness: a server with another model under the same name, which no fingerprint knows -----


class Elsewhere(Asked):
    """The same fingerprint, other numbers; does `meanwhile` before it answers for the first
    time."""

    def __init__(self, added: float, meanwhile: Callable[[], object] = lambda: None):
        super().__init__()
        self.added, self._meanwhile = added, meanwhile

    def logprobs(self, requests: Sequence[TeacherRequest]) -> list[Tensor]:
        meanwhile, self._meanwhile = self._meanwhile, lambda: None
        meanwhile()
        return super().logprobs(requests)


ANOTHER = r"holds log-probs of another teacher than 'tiny-llama': a completion of 12 tokens, ask"


def test_stored_answers_of_another_teacher_end_the_run(tmp_path):
    wanted = requests(7, 12)
    first = cached(Asked(), tmp_path).logprobs(wanted)
    assert same(
        cached(Elsewhere(0.05), tmp_path).logprobs(wanted), first
    )  # as far as rounding may go
    with pytest.raises(UserError, match=ANOTHER):
        cached(Elsewhere(-0.3), tmp_path).logprobs(wanted)


def test_another_teacher_is_found_without_a_hit_and_stores_nothing(tmp_path):
    """All that it is asked is the witness."""
    wanted = requests(12, 7, 3)
    cached(Asked(), tmp_path).logprobs(wanted[:1])
    another = Elsewhere(-4.0)
    with pytest.raises(UserError, match=ANOTHER):
        cached(another, tmp_path).logprobs(wanted[1:])
    assert another.asked == wanted[:1]
    teacher = Asked()
    values = cached(teacher, tmp_path).logprobs(wanted)
    assert close(values, LocalTeacher.logprobs(teacher, wanted)) and teacher.asked == [
        wanted[0],
        *wanted[1:],
    ]


@pytest.mark.parametrize("added", [0.0, -0.3])
def test_two_that_begin_at_once_agree_on_one_witness(tmp_path, added):
    """The second one stores its witness while the first one, who has seen none, scores."""
    wanted = requests(12, 7, 3)
    second = cached(Elsewhere(added), tmp_path)
    first = Elsewhere(0.0, meanwhile=lambda: second.logprobs(wanted[:1]))
    if added:
        with pytest.raises(UserError, match=ANOTHER):
            cached(first, tmp_path).logprobs(wanted[1:])
    else:
        cached(first, tmp_path).logprobs(wanted[1:])
    assert first.asked == [*wanted[1:], wanted[0]]
    third = Elsewhere(added)
    assert close(cached(third, tmp_path).logprobs(wanted), Elsewhere(added).logprobs(wanted))
    assert third.asked == (wanted if added else wanted[:1])


def test_the_witness_is_the_longest_of_the_batch_however_it_is_asked(tmp_path):
    """Group by group, while the student writes, as all at once."""
    wanted = requests(3, 12, 7)
    asked_in_groups = cached(Asked(), tmp_path)
    for (answer,) in [asked_in_groups.submit([request]) for request in wanted]:
        answer.result()
    teacher = Asked()
    cached(teacher, tmp_path).logprobs(wanted)
    assert teacher.asked == [wanted[1]]


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_entries_whose_witness_is_lost_are_not_used(tmp_path, how):
    """Nobody could tell whose they are."""
    wanted = requests(12, 7)
    first = cached(Asked(), tmp_path)
    first.logprobs(wanted)
    with sqlite3.connect(tmp_path / FILE) as database:
        change = (
            "DELETE FROM entries WHERE key = ?"
            if how == "deleted"
            else "UPDATE entries SET value = zeroblob(48) WHERE key = ?"
        )
        assert database.execute(change, (first._witness_key,)).rowcount == 1
    other = Elsewhere(-0.3)
    assert (
        same(cached(other, tmp_path).logprobs(wanted), Elsewhere(-0.3).logprobs(wanted))
        and other.asked == wanted
    )
    with pytest.raises(UserError, match=ANOTHER):
        cached(Asked(), tmp_path).logprobs(wanted)


@pytest.mark.parametrize("fault", ["nan", "one nan", "short"])
def test_a_witness_that_is_not_answered_confirms_nothing(tmp_path, fault):
    """Until it is answered whole, nothing stored is used, and nothing is stored."""

    class Faulty(Elsewhere):
        def logprobs(self, requests):
            values = super().logprobs(requests)
            lost = {"nan": slice(None), "one nan": slice(1), "": slice(0)}
            for one in values if fault in lost else []:
                one[lost[fault]] = torch.nan
            return [one[:-1] for one in values] if fault == "short" else values

    wanted = requests(12, 7)
    cached(Asked(), tmp_path).logprobs(wanted)
    moved = Faulty(-0.3)
    again = cached(moved, tmp_path)
    again.logprobs(wanted)
    assert moved.asked == [wanted[0], *wanted] and again.pop_metrics() == {HITS: 0.0}
    fault = ""  # the server is well again
    with pytest.raises(UserError, match=ANOTHER):
        again.logprobs(wanted)


def claim_at_once(folder: Path, number: int, start: Event, held: "Queue[bytes | None]") -> None:
    store = CacheStore(folder, max_bytes=GIB)
    start.wait(30)
    held.put(store.claim(bytes(32), str(number).encode()))


def test_processes_that_claim_at_once_hold_the_same_witness(tmp_path):
    context = get_context("fork")
    start, held = context.Event(), context.Queue()
    claims = [
        context.Process(target=claim_at_once, args=(tmp_path, number, start, held))
        for number in range(4)
    ]
    for process in claims:
        process.start()
    start.set()
    numbers = [held.get(timeout=60) for _ in claims]
    for process in claims:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert len(set(numbers)) == 1 and numbers[0] is not None


def test_a_witness_that_does_not_fit_is_not_claimed(tmp_path):
    """Nothing is stored then, and the numbers are the teacher's."""
    wanted, teacher = requests(200), Asked()
    assert CacheStore(tmp_path, max_bytes=10).claim(bytes(32), bytes(10_000)) is None
    for _ in range(2):
        values = cached(teacher, tmp_path, max_bytes=10).logprobs(wanted)
        assert same(values, LocalTeacher.logprobs(teacher, wanted))
    assert teacher.asked == wanted * 2


# --- size -----------------------------------------------------------------------------------------


def value_of(number: int, tokens: int = 2000) -> bytes:
    return number.to_bytes(4, "big") * tokens


def fill(store: CacheStore, numbers: range, *, tokens: int = 4000) -> list[bytes]:
    """One entry each, of `tokens` equal values; returns the keys."""
    keys = [number.to_bytes(32, "big") for number in numbers]
    for number, key in zip(numbers, keys, strict=True):
        store.put({key: value_of(number, tokens)})
    return keys


def test_a_full_store_keeps_its_size_and_what_it_has(tmp_path, caplog):
    """Entries of 16 kB in a store of 1 MB: about 50 fit."""
    store = CacheStore(tmp_path, max_bytes=10**6)
    keys = fill(store, range(100))
    assert (tmp_path / FILE).stat().st_size <= 10**6
    stored = store.get(keys)
    assert list(stored) == keys[: len(stored)] and 35 <= len(stored) <= 60
    (message,) = caplog.messages
    assert "stores nothing more in this run (" in message and "teacher.max_gib" in message


# --- several processes ----------------------------------------------------------------------------


def write_turns(folder: Path, turns: range) -> None:
    """10 entries a turn."""
    store = CacheStore(folder, max_bytes=GIB)
    for i in turns:
        numbers = range(10 * i, 10 * i + 10)
        store.put({n.to_bytes(32, "big"): value_of(n) for n in numbers})
        assert store.get([(10 * i).to_bytes(32, "big")])


def start_writer(folder: Path, turns: range) -> BaseProcess:
    process = get_context("fork").Process(target=write_turns, args=(folder, turns))
    process.start()
    return process


def stored_numbers(folder: Path, numbers: range) -> list[int]:
    """Those that are stored; their values must be right."""
    store = CacheStore(folder, max_bytes=GIB)
    found = store.get([number.to_bytes(32, "big") for number in numbers])
    store.close()
    for key, values in found.items():
        assert values == value_of(int.from_bytes(key, "big"))
    return sorted(int.from_bytes(key, "big") for key in found)


def test_two_processes_at_once(tmp_path):
    """Both begin with no file; half of what they write is the same."""
    writers = [start_writer(tmp_path / "cache", turns) for turns in (range(40), range(20, 60))]
    for process in writers:
        process.join(timeout=100)
        assert process.exitcode == 0
    assert stored_numbers(tmp_path / "cache", range(600)) == list(range(600))


def test_killed_while_it_writes(tmp_path):
    """What is there afterwards is right, in whole turns, and the next process writes on."""
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        process = start_writer(folder, range(10**6))
        deadline = time.monotonic() + 30
        while not (folder / f"{FILE}-wal").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05 * (attempt + 1))
        process.kill()
        process.join()
        there = stored_numbers(folder, range(20_000))
        assert there == list(range(len(there))) and len(there) % 10 == 0
        fill(CacheStore(folder, max_bytes=GIB), range(20_000, 20_001), tokens=2000)
        assert stored_numbers(folder, range(20_001)) == [*there, 20_000]


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_entry_is_asked_for_again(tmp_path):
    """One bit of one stored value flipped: the teacher answers, and the entry is stored again."""
    wanted = requests(7, 12)
    first = cached(Asked(), tmp_path).logprobs(wanted)
    with sqlite3.connect(tmp_path / FILE) as database:
        key, stored = database.execute(
            "SELECT key, value FROM entries WHERE length(value) = 48"
        ).fetchone()
        database.execute(
            "UPDATE entries SET value = ? WHERE key = ?",
            (bytes([stored[0] ^ 1]) + stored[1:], key),
        )
    for asked in ([wanted[1], wanted[1]], [wanted[1]]):  # the witness, and the damaged one
        teacher = Asked()
        assert same(cached(teacher, tmp_path).logprobs(wanted), first) and teacher.asked == asked


def test_a_file_that_is_no_database_is_refused_before_training(tmp_path):
    (tmp_path / FILE).write_bytes(b"no database" * 1000)
    with pytest.raises(
        UserError, match=r"\(file is not a database\); .*delete logprobs-v3\.sqlite"
    ):
        CacheStore(tmp_path, max_bytes=GIB)


@pytest.mark.parametrize("how", ["overwritten", "cut off"])
def test_a_file_that_is_damaged_in_mid_run(tmp_path, caplog, how):
    """The run continues, and every number is right."""
    store = CacheStore(tmp_path, max_bytes=GIB)
    fill(store, range(200), tokens=2000)
    store.close()
    wanted = requests(7, 12)
    teacher = Asked()
    both = cached(teacher, tmp_path)
    with (tmp_path / FILE).open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if how == "cut off":
            file.truncate(size // 2)
        else:
            file.seek(4096)
            file.write(os.urandom(size - 4096))
    for _ in range(2):
        assert same(both.logprobs(wanted), LocalTeacher.logprobs(teacher, wanted))
    (message,) = caplog.messages
    assert "stores nothing more in this run (" in message


# --- no space, no permission ----------------------------------------------------------------------


def test_a_full_disk_costs_what_would_have_been_stored(tmp_path, caplog):
    """The system refuses files of more than 64 kB: one warning, right numbers, and what is stored
    is still used."""
    old, new = requests(7, 12), requests(*[200] * 40, seed=5)
    teacher = Asked()
    both = cached(teacher, tmp_path)
    first = both.logprobs(old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, limits[1]))
        for _ in range(3):
            assert same(both.logprobs(new), LocalTeacher.logprobs(teacher, new))
        assert same(both.logprobs(old), first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (message,) = caplog.messages
    assert "stores nothing more in this run (" in message
    assert caplog.records[0].levelno == logging.WARNING
    assert teacher.asked == [*old, *new, *new, *new]
    again = Asked()
    assert same(cached(again, tmp_path).logprobs([*old, new[0]])[:2], first) and again.asked == [
        old[1],
        new[0],
    ]


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError,
        match=r"cache .*file/cache cannot be opened .*name another teacher\.directory\.$",
    ):
        CacheStore(tmp_path / "file" / "cache", max_bytes=GIB)


# --- whole runs -----------------------------------------------------------------------------------


def cached_section(world: Path, folder: Path, **inner: object) -> dict[str, object]:
    teacher = inner or {"model": str(world / "teacher")}
    return {"type": "cached", "directory": str(folder), "teacher": teacher}


def numbers(run_dir: Path) -> list[object]:
    """The metrics of a run but for what belongs to the cache, and its weights."""
    left = remains(run_dir)
    metrics = [
        {k: v for k, v in json.loads(row).items() if k != HITS} for row in left["metrics.jsonl"]
    ]
    return [*metrics, *(left[name] for name in left if name.endswith("model.safetensors"))]


def hits(run_dir: Path) -> list[float]:
    """Of each rollout batch whose completions were scored."""
    return [row[HITS] for row in RunDirectory(run_dir).read(METRICS) if HITS in row]


def test_a_run_again_scores_nothing_and_learns_the_same(world, tmp_path):
    """Cold and warm runs end in the weights of the run without a cache; the warm one finds every
    completion."""
    plain, folders = (
        rlad.train(run_config(world, tmp_path / "plain", task=OFTEN_CORRECT)).run_dir,
        [],
    )
    for name in ("cold", "warm"):
        config = run_config(world, tmp_path / name, task=OFTEN_CORRECT) | {
            "teacher": cached_section(world, tmp_path / "cache")
        }
        folders.append(rlad.train(config).run_dir)
        assert numbers(folders[-1]) == numbers(plain)
    assert max(hits(folders[0])) < 1 and set(hits(folders[1])) == {1.0}


def test_new_weights_in_the_same_folder_are_another_teacher(world, tmp_path):
    """Nothing of the old ones is used."""
    for seed in (5, 6):
        folder = write_model(tmp_path / "teacher", seed=seed)
        teacher = cached_section(world, tmp_path / "cache", model=str(folder))
        run_dir = rlad.train(
            run_config(world, tmp_path / f"run{seed}", task=OFTEN_CORRECT) | {"teacher": teacher}
        ).run_dir
        assert hits(run_dir)[0] == 0


@pytest.mark.parametrize(
    ("inner", "sentence"),
    [
        ({"type": "ema"}, "of type 'ema' cannot be cached; leave the cache out."),
        (
            {"type": "privileged", "teacher": {"model": "m"}},
            "of type 'privileged' cannot be cached; put the cache inside it.",
        ),
        (
            {"type": "several", "teachers": {"a": {"model": "m"}}},
            "of type 'several' cannot be cached; put the cache inside it.",
        ),
        (
            {"type": "cached", "teacher": {"model": "m"}},
            "of type 'cached' cannot be cached; remove one of the two.",
        ),
        ({"model": "{world}/nothing"}, "cannot be found or read"),
    ],
)
def test_what_cannot_be_cached_is_refused_before_training(world, tmp_path, inner, sentence):
    inner = {
        key: value.format(world=world) if isinstance(value, str) else value
        for key, value in inner.items()
    }
    config = run_config(world, tmp_path / "run") | {
        "teacher": cached_section(world, tmp_path / "cache", **inner)
    }
    toml = write_config(tmp_path / "run.toml", config)
    assert sentence in rlad_fails("train", toml)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_a_directory_that_cannot_be_made_is_found_before_training(world, tmp_path):
    (tmp_path / "file").write_text("")
    config = run_config(world, tmp_path / "run") | {
        "teacher": cached_section(world, tmp_path / "file" / "cache")
    }
    toml = write_config(tmp_path / "run.toml", config)
    sentence = f"{tmp_path}/file/cache cannot be written in {tmp_path}/file; name another teacher."
    assert sentence in rlad_fails("train", toml)
    checked = CliRunner().invoke(main, ["check", str(toml)])
    assert checked.exit_code == 2 and sentence in checked.stdout
    assert not (tmp_path / "run").exists()
