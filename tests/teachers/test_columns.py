"""The columns of teachers whose model is not in this process: served and cached ones against the
local teacher of the same model."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad
import rlad.training.run
from conformance_server import ConformanceServer
from parity_cases import Case, by_engine, difference, make_case, rollouts_of
from rlad.config.file import parse_config
from rlad.config.run import RunConfig
from rlad.engines.metrics import TokenStats
from rlad.errors import RunFailedError, UserError
from rlad.models.loading import LanguageModel
from rlad.runs.directory import METRICS, RunDirectory
from rlad.scoring.columns import TokenColumns
from rlad.stopping import StopRequested
from rlad.tasks import Problem
from rlad.teachers import check_teacher, make_teacher
from rlad.teachers.base import Setting, Teacher, TeacherRequest
from rlad.teachers.cache_store import CacheStore
from rlad.teachers.cached import CachedTeacher
from rlad.teachers.local import LocalTeacher
from rlad.teachers.privileged import PrivilegedTeacher
from rlad.teachers.several import TeacherByTask
from tiny_models import VOCABULARY, random_tokens, tiny_language_model
from tiny_runs import StopAt, remains, run_config

TOP_K = 5
TOP_KS = ["student_top_k", "teacher_top_k"]
GIB = 2**30
ALL_WAYS = ("prompt_logprob_token_ids", "prompt_logprobs", "echo")
REQUESTS = [
    TeacherRequest(p, c, Problem("", "", "", task="ab"[i % 2]))
    for i, (p, c) in enumerate(
        zip(random_tokens(3, 5, 9, 2, seed=1), random_tokens(4, 1, 9, 7, seed=2), strict=True)
    )
]
NUM_TOKENS = sum(len(one.completion) for one in REQUESTS)


def own_ids(top_k: int = TOP_K) -> Tensor:
    """Other entries at each token, as a student would name them."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack(
        [torch.randperm(VOCABULARY, generator=generator)[:top_k] for _ in range(NUM_TOKENS)]
    )


def served_config(
    *servers: str, support: str, temperature: float = 1.0, top_k: int = TOP_K, **teacher: Any
) -> RunConfig:
    served = {"type": "served", "urls": servers, "model": "tiny", "tolerance": 1e-3, **teacher}
    served |= {"retry_pause_seconds": 0.005, "num_retries": 1}
    limits = {"max_completion_tokens": 20, "max_prompt_tokens": 40, "temperature": temperature}
    return parse_config(
        {
            "student": {"model": "s"},
            "teacher": served,
            "task": {"type": "arithmetic"},
            "objective": {"type": "gkd", "support": support, "top_k": top_k},
            "rollout": limits,
        }
    )


def local_of(model: LanguageModel, temperature: float = 1.0) -> LocalTeacher:
    return LocalTeacher(model, temperature=temperature, tokens_per_batch=60)


@contextmanager
def served_teacher(model: LanguageModel, config: RunConfig) -> Iterator[Teacher]:
    setting = Setting(config, model.tokenizer, 100, model)
    with closing(make_teacher(config.teacher, setting)) as teacher:
        yield teacher


def assert_same(found: TokenColumns, wanted: TokenColumns, bound: float = 1e-4) -> None:
    """The same entries with the same log-probs; of a tail near 0 its probability is compared."""
    torch.testing.assert_close(found.ids, wanted.ids)
    ours = found.logprobs[:, :-1]
    torch.testing.assert_close(ours, wanted.logprobs[:, :-1], atol=bound, rtol=0, equal_nan=True)
    tails = [one.logprobs[:, -1].exp() for one in (found, wanted)]
    torch.testing.assert_close(*tails, atol=1e-5, rtol=0, equal_nan=True)


# --- served ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("support", TOP_KS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("way", ALL_WAYS)
def test_a_server_gives_the_columns_of_the_local_teacher(
    support: str, temperature: float, way: str
) -> None:
    model = tiny_language_model(seed=3)
    ids = own_ids() if support == "student_top_k" else None
    wanted = local_of(model, temperature).columns(REQUESTS, top_k=TOP_K, ids=ids)
    settings: dict[str, Any] = {"understands": ALL_WAYS, "tempers": True}
    with ConformanceServer(model, **settings) as server:
        about: dict[str, Any] = {"support": support, "temperature": temperature}
        config = served_config(server.url, scoring=way, **about)
        with served_teacher(model, config) as teacher:
            assert not teacher.gives_distributions
            assert_same(teacher.columns(REQUESTS, top_k=TOP_K, ids=ids), wanted)
            assert len(teacher.columns([], top_k=TOP_K).ids) == 0


def test_all_of_the_vocabulary_leaves_no_tail() -> None:
    model = tiny_language_model(seed=3)
    ids = own_ids(VOCABULARY)
    settings: dict[str, Any] = {"understands": ALL_WAYS, "max_logprobs": VOCABULARY}
    with ConformanceServer(model, **settings) as server:
        for support, named in (("teacher_top_k", None), ("student_top_k", ids)):
            config = served_config(server.url, support=support, top_k=VOCABULARY)
            with served_teacher(model, config) as teacher:
                found = teacher.columns(REQUESTS, top_k=VOCABULARY, ids=named)
            assert bool((found.logprobs[:, -1] == -math.inf).all())


@pytest.mark.parametrize(
    ("support", "settings", "sentence"),
    [
        (
            "teacher_top_k",
            {},
            r"does not give its 30 most likely tokens .*Requested 30, which",
        ),
        ("teacher_top_k", {}, r"lower objective\.top_k, or start vLLM with --max-logprobs 30\."),
        (
            "student_top_k",
            {},
            r"no log-probs of 30 tokens that the student names .* allowed: 20",
        ),
        ("student_top_k", {"understands": ALL_WAYS[1:]}, r"use the support 'teacher_top_k'"),
    ],
)
def test_what_a_server_cannot_give_is_refused_before_training(
    support: str, settings: dict[str, Any], sentence: str
) -> None:
    model = tiny_language_model(seed=3)
    with ConformanceServer(model, **{"understands": ALL_WAYS} | settings) as server:
        config = served_config(server.url, support=support, top_k=30)
        found = check_teacher(config.teacher, Setting(config, model.tokenizer, 100))
    errors = [one for one in found if one.level == "error"]
    assert [one.subject for one in errors] == ["columns"]
    assert re.search(sentence, errors[0].message), errors[0].message


def test_what_a_server_leaves_out_is_missing() -> None:
    """By hand: the second request has an id that no server knows, the third no answer."""
    model = tiny_language_model(seed=3)
    ids = own_ids()
    ids[4, 2] = VOCABULARY
    with ConformanceServer(model, understands=ALL_WAYS) as server:
        config = served_config(server.url, support="student_top_k")
        with served_teacher(model, config) as teacher:
            found = teacher.columns(REQUESTS, top_k=TOP_K, ids=ids)
            missing = found.logprobs.isnan().all(dim=1).nonzero().flatten()
            assert missing.tolist() == [4]
            server.lasting_fault = "not JSON"
            nothing = teacher.columns(REQUESTS[:1], top_k=TOP_K, ids=ids[:4])
            assert bool(nothing.logprobs.isnan().all())


def test_columns_of_our_own_server() -> None:
    pytest.importorskip("fastapi", reason="the optional package fastapi is not installed")
    from running_servers import server_thread

    model = tiny_language_model(seed=3)
    wanted = local_of(model, 0.7).columns(REQUESTS, top_k=TOP_K)
    with server_thread(model) as client:
        config = served_config(client.url, support="teacher_top_k", temperature=0.7)
        with served_teacher(model, config) as teacher:
            assert_same(teacher.columns(REQUESTS, top_k=TOP_K), wanted)


# --- cached ---------------------------------------------------------------------------------------


class Counted(LocalTeacher):
    """A local teacher that counts what it is asked for columns."""

    num_requests = 0

    def columns(self, requests: Sequence[TeacherRequest], **wanted: Any) -> TokenColumns:
        self.num_requests += len(requests)
        return super().columns(requests, **wanted)


def cached(teacher: Teacher, folder: Path, *, max_bytes: int = GIB) -> CachedTeacher:
    store = CacheStore(folder, max_bytes=max_bytes)
    return CachedTeacher(teacher, store, temperature=1.0, tolerance=0.1)


def test_a_stored_column_is_the_same_bit_for_bit_and_asks_nobody(tmp_path: Path) -> None:
    """K and the ids are part of the key; so is everything that it has for single numbers."""
    model = tiny_language_model(seed=3)
    ids = own_ids()
    first: list[TokenColumns] = []
    for session in range(2):
        inner = Counted(model, temperature=1.0, tokens_per_batch=60)
        with closing(cached(inner, tmp_path)) as teacher:
            found = [
                teacher.columns(REQUESTS, top_k=TOP_K),
                teacher.columns(REQUESTS, top_k=TOP_K, ids=ids),
                teacher.columns(REQUESTS, top_k=3),
                teacher.columns(REQUESTS, top_k=TOP_K, ids=ids.flip(1)),
            ]
            hits = teacher.pop_metrics()["teacher/cache_hits/frac"]
        assert (inner.num_requests, hits) == ((16, 0.0), (0, 1.0))[session]
        for ours, theirs in zip(found, first or found, strict=True):
            assert torch.equal(ours.ids, theirs.ids)
            assert torch.equal(ours.logprobs, theirs.logprobs)
        first = first or found
    assert_same(first[0], local_of(model).columns(REQUESTS, top_k=TOP_K), 1e-6)
    assert torch.equal(first[1].logprobs[:, :-1], first[3].logprobs[:, :-1].flip(1))


def test_a_cache_is_of_one_teacher_and_bounded(tmp_path: Path) -> None:
    model = tiny_language_model(seed=3)
    one = Counted(model, temperature=1.0, tokens_per_batch=60)
    with closing(cached(one, tmp_path / "full", max_bytes=2**16)) as teacher:
        for seed in range(40):  # 40 x 21 tokens x 44 bytes are more than 64 KiB
            ids = own_ids().roll(seed, dims=0)
            teacher.columns(REQUESTS, top_k=TOP_K, ids=ids)
    assert sum(path.stat().st_size for path in (tmp_path / "full").glob("*.sqlite")) <= 2**16
    with closing(cached(one, tmp_path / "own")) as teacher:
        teacher.columns(REQUESTS, top_k=TOP_K)

    class Renamed(Counted):
        """Another model under the same name, as a server may come to offer."""

        fingerprint = one.fingerprint  # type: ignore[assignment]

    other = Renamed(tiny_language_model(seed=4), temperature=1.0, tokens_per_batch=60)
    refused = pytest.raises(UserError, match="holds log-probs of another teacher")
    with closing(cached(other, tmp_path / "own")) as teacher, refused:
        teacher.columns(REQUESTS, top_k=TOP_K)


# --- wrappers -------------------------------------------------------------------------------------


def test_wrappers_put_columns_in_their_places(tmp_path: Path) -> None:
    """By task, and privileged, where one request is too long for the teacher's context."""
    models = [tiny_language_model(seed=seed) for seed in (3, 4)]
    locals_ = [local_of(model) for model in models]
    hidden: list[Teacher] = [
        cached(teacher, tmp_path / str(i)) for i, teacher in enumerate(locals_)
    ]

    class Shows(PrivilegedTeacher):
        def _show(self, request: TeacherRequest) -> TeacherRequest | None:
            longer = replace(request, prompt=[7, 8, *request.prompt])
            return longer if len(longer.prompt) + len(longer.completion) <= 12 else None

    for make in (
        lambda one, other: TeacherByTask({"a": one, "b": other}),
        lambda one, other: Shows(one, "{prompt}", encode=lambda prompt: [], context=12),
    ):
        ours, theirs = make(*hidden), make(*locals_)
        assert (ours.gives_distributions, theirs.gives_distributions) == (False, True)
        for ids in (None, own_ids()):
            found = ours.columns(REQUESTS, top_k=TOP_K, ids=ids)
            wanted = theirs.columns(REQUESTS, top_k=TOP_K, ids=ids)
            kept = ~wanted.logprobs.isnan().all(dim=1)
            assert int((~kept).sum()) in (0, 9)
            assert bool(found.logprobs[~kept].isnan().all())
            assert_same(
                TokenColumns(found.ids[kept], found.logprobs[kept]),
                TokenColumns(wanted.ids[kept], wanted.logprobs[kept]),
                1e-6,
            )


# --- gradients and runs ---------------------------------------------------------------------------


def gradient_of(case: Case, teacher: Teacher) -> Any:
    batch = case.engine.make_rollout_batch(0)
    case.engine.teacher = teacher
    return by_engine(case, batch, rollouts_of(case), TokenStats())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("support", TOP_KS)
def test_the_gradient_is_that_of_the_local_teacher(
    support: str, beta: float, tmp_path: Path
) -> None:
    """The same micro-batches, whoever says what the teacher thinks; columns come in float32."""
    knobs = {"support": support, "top_k": 4, "beta": beta}
    case = make_case("gkd", knobs=knobs, rollout={"prompts_per_batch": 2, "group_size": 2})
    local = case.engine.teacher
    assert isinstance(local, LocalTeacher)
    wanted = gradient_of(case, local)
    results = {"cached": gradient_of(case, cached(local, tmp_path))}
    with ConformanceServer(case.teacher, understands=ALL_WAYS) as server:
        config = served_config(server.url, support=support, top_k=4)
        with served_teacher(case.engine.student, config) as teacher:
            results["served"] = gradient_of(case, teacher)
    for name, found in results.items():
        loss, gradient = difference(found, wanted)
        print(f"{name} {support} {beta}: loss {loss:.1e} gradient {gradient:.1e}")
        assert loss < 1e-5 and gradient < 1e-5, name


def test_completions_on_which_the_teacher_is_silent_have_no_columns(tmp_path: Path) -> None:
    knobs = {"kd_estimator": "top_k", "top_k": 4, "teacher_on": "wrong", "kd_coef": 0.5}
    case = make_case("kdrl", knobs=knobs)
    local = case.engine.teacher
    assert isinstance(local, LocalTeacher)
    batch = case.engine.make_rollout_batch(0)
    assert 0 < len(batch.teacher_rows) < len(batch.training_rows)
    wanted = by_engine(case, batch, rollouts_of(case))
    counted = Counted(local.language_model, temperature=1.0, tokens_per_batch=60)
    case.engine.teacher = cached(counted, tmp_path)
    loss, gradient = difference(by_engine(case, batch, rollouts_of(case)), wanted)
    assert counted.num_requests == len(batch.teacher_rows)
    assert loss < 1e-5 and gradient < 1e-5


@pytest.mark.parametrize("support", TOP_KS)
def test_a_run_with_a_cache_resumes_bit_for_bit(
    support: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config_at(name: str) -> dict[str, Any]:
        folder = tmp_path / name
        inner = {"model": str(world / "teacher")}
        teacher = {"type": "cached", "directory": str(folder / "cache"), "teacher": inner}
        objective = {"type": "gkd", "support": support, "top_k": 3}
        return run_config(world, folder / "run", objective=objective) | {"teacher": teacher}

    monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(10**9))
    rlad.train(config_at("whole"))
    num_checks = StopAt.num_checks
    rows = list(RunDirectory(tmp_path / "whole" / "run").read(METRICS))
    assert all(row["teacher/cache_hits/frac"] == 0 for row in rows)
    for at in range(1, num_checks, num_checks // 2):
        config = config_at(str(at))
        monkeypatch.setattr(rlad.training.run, "Stop", lambda at=at: StopAt(at))
        with pytest.raises(StopRequested):
            rlad.train(config)
        monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(10**9))
        rlad.train(config, resume=True)
        found = remains(Path(config["run_dir"]))
        assert found == remains(tmp_path / "whole" / "run"), at


def test_a_server_that_falls_silent_stops_the_run(tmp_path: Path) -> None:
    case = make_case("gkd", knobs={"support": "teacher_top_k", "top_k": 4})
    with ConformanceServer(case.teacher, understands=ALL_WAYS) as server:
        config = served_config(server.url, support="teacher_top_k", top_k=4)
        with served_teacher(case.engine.student, config) as teacher:
            server.lasting_fault = "500"
            with pytest.raises(RunFailedError, match=r"the teacher gave no finite"):
                gradient_of(case, teacher)
