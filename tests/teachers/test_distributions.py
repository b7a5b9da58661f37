"""What teachers in this process say of the whole vocabulary: against full logits of each model, and
against the one number a token that they give otherwise. Tables of the gradients' errors."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rlad
import rlad.training.run
from parity_cases import by_engine, by_reference, difference, make_case, nearby, rollouts_of
from rlad.config.run import LoraConfig
from rlad.config.teacher import EMATeacherConfig
from rlad.engines.metrics import TokenStats
from rlad.errors import UserError
from rlad.models.loading import LanguageModel, load_language_model
from rlad.runs.directory import METRICS, RunDirectory
from rlad.scoring.scorer import Scorer
from rlad.stopping import StopRequested
from rlad.tasks import Problem
from rlad.teachers.base import Teacher, TeacherRequest
from rlad.teachers.ema import EMATeacher, TrustRegionTeacher
from rlad.teachers.local import LocalTeacher
from rlad.teachers.privileged import PrivilegedTeacher
from rlad.teachers.several import TeacherByTask, TeacherMixture
from tiny_models import random_tokens, tiny_language_model
from tiny_runs import StopAt, remains, run_config

SHOWN = [7, 8, 9]
"""What a privileged teacher's prompt begins with."""
CONTEXT = 16
"""of it; one request of these is too long"""
SUPPORTS = ["full", "student_top_k", "teacher_top_k", "sampled"]
Requests = Sequence[TeacherRequest]


def requests_for(*lengths: tuple[int, int]) -> list[TeacherRequest]:
    prompts = random_tokens(*(prompt for prompt, _ in lengths), seed=1)
    completions = random_tokens(*(length for _, length in lengths), seed=2)
    return [
        TeacherRequest(p, c, Problem("", "", "", task="ab"[i % 2]))
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]


REQUESTS = requests_for((3, 4), (5, 1), (14, 9), (2, 7))


@dataclass
class Kind:
    """A teacher, and what its log-probs of the vocabulary are by a formula on plain models."""

    teacher: Teacher
    rows: Callable[[TeacherRequest, float], Tensor]


def plain(model: LanguageModel, prompt: Sequence[int], completion: Sequence[int], t: float):
    """Log-probs from the full logits of one sequence, float64 [token, vocabulary]."""
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *completion]], device=model.model.device)
        logits = model.model(input_ids=ids).logits[0].double() / t
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def of_model(model: LanguageModel) -> Callable[[TeacherRequest, float], Tensor]:
    return lambda request, t: plain(model, request.prompt, request.completion, t)


def shown(request: TeacherRequest) -> TeacherRequest:
    return replace(request, prompt=[*SHOWN, *request.prompt])


def privileged_by(teacher: Teacher) -> PrivilegedTeacher:
    class Shows(PrivilegedTeacher):
        def _show(self, request: TeacherRequest) -> TeacherRequest | None:
            other = shown(request)
            return other if len(other.prompt) + len(other.completion) <= CONTEXT else None

    return Shows(teacher, "{prompt}", encode=lambda prompt: [], context=CONTEXT)


def make_kinds(student: LanguageModel, temperature: float) -> dict[str, Kind]:
    """Of a student that has moved since the averages began; every model is another one."""
    scoring: dict[str, Any] = {"temperature": temperature, "tokens_per_batch": 60}
    initial = nearby(student, seed=5, distance=0.0)
    others = [nearby(student, seed=seed, distance=0.1) for seed in (6, 7)]
    locals_ = [LocalTeacher(other, **scoring) for other in others]
    average = EMATeacher(student, name="s", update_rate=0.3, **scoring)
    itself = EMATeacher(student, name="s", update_rate=1.0, **scoring)
    region = TrustRegionTeacher(itself, Scorer(initial, **scoring), share=0.1)
    with torch.no_grad():
        for parameter in student.model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    average.after_step()
    follower = nearby(student, seed=8, distance=0.0)
    with torch.no_grad():
        pairs = zip(follower.model.parameters(), initial.model.parameters(), strict=True)
        for mine, first in pairs:
            mine.copy_(first + 0.3 * (mine - first))

    def by_task(request: TeacherRequest, t: float) -> Tensor:
        assert request.problem is not None
        return of_model(others["ab".index(request.problem.task)])(request, t)

    def mixed(request: TeacherRequest, t: float) -> Tensor:
        parts = [of_model(other)(request, t) for other in others]
        return (0.25 * parts[0].exp() + 0.75 * parts[1].exp()).log()

    def near(request: TeacherRequest, t: float) -> Tensor:
        parts = [of_model(one)(request, t) for one in (initial, student)]
        return (0.9 * parts[0] + 0.1 * parts[1]).log_softmax(-1)

    def privileged(request: TeacherRequest, t: float) -> Tensor:
        other = shown(request)
        rows = near(other, t)
        is_missing = len(other.prompt) + len(other.completion) > CONTEXT
        return rows * math.nan if is_missing else rows

    several = {"a": locals_[0], "b": locals_[1]}
    return {
        "local": Kind(locals_[0], of_model(others[0])),
        "itself": Kind(itself, of_model(student)),
        "average": Kind(average, of_model(follower)),
        "trust region": Kind(region, near),
        "privileged": Kind(privileged_by(region), privileged),
        "by task": Kind(TeacherByTask(several), by_task),
        "mixture": Kind(TeacherMixture(several, {"a": 1, "b": 3}), mixed),
    }


KINDS = ["local", "itself", "average", "trust region", "privileged", "by task", "mixture"]


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_are_those_of_full_logits_and_of_the_one_number(kind: str) -> None:
    torch.manual_seed(0)
    case = make_kinds(tiny_language_model("gpt2", dtype=torch.float64), 0.7)[kind]
    with case.teacher.at_work():
        found = case.teacher.distributions(REQUESTS)
        logprobs = torch.cat(
            [found.logits(slice(i, i + 5), slice(0, 64)) for i in range(0, found.num_tokens, 5)]
        ).log_softmax(-1)
    wanted = torch.cat([case.rows(request, 0.7) for request in REQUESTS])
    torch.testing.assert_close(logprobs, wanted, atol=1e-12, rtol=0, equal_nan=True)
    assert int(wanted.isnan().any(dim=1).sum()) == (9 if kind == "privileged" else 0)
    tokens = torch.tensor([token for request in REQUESTS for token in request.completion])
    numbers = torch.cat(case.teacher.logprobs(REQUESTS)).double()
    of_tokens = logprobs.gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(numbers, of_tokens, atol=1e-12, rtol=0, equal_nan=True)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_divergence_support_and_teacher(
    kind: str, support: str, beta: float
) -> None:
    """Loss and gradient of a batch in micro-batches against full logits, one token at a time."""
    knobs = {"support": support, "top_k": 4, "beta": beta}
    rollout = {"prompts_per_batch": 2, "group_size": 2, "temperature": 0.7}
    missing_are_few = {"max_missing_teacher_share": 0.9}
    case = make_case("gkd", knobs=knobs, rollout=rollout, optimization=missing_are_few)
    torch.manual_seed(0)
    found = make_kinds(case.engine.student, 0.7)[kind]
    batch = case.engine.make_rollout_batch(0)
    for i, group in enumerate(batch.groups):
        object.__setattr__(group, "problem", replace(group.problem, task="ab"[i % 2]))
    case.engine.teacher = found.teacher
    if support == "sampled":
        answers = found.teacher.logprobs(batch.teacher_requests())
        batch.teacher_logprobs = [values.double() for values in answers]
    wanted = rollouts_of(case)
    requests = batch.teacher_requests(wanted)
    rows = {i: found.rows(request, 0.7) for i, request in enumerate(requests)}
    case = replace(case, teacher_rows=lambda batch, i, t: rows[i].tolist())
    missing = {
        (i, position)
        for i, found in rows.items()
        for position in range(len(found))
        if found.isnan().any()
    }
    assert bool(missing) == (kind == "privileged")
    stats = TokenStats()
    ours = by_engine(case, batch, wanted, stats)
    assert stats.num_dropped == len(missing)
    if kind == "itself":
        # Exactly nothing; the one number comes from another batch, and is rounded otherwise.
        largest = max(float(gradient.abs().max()) for gradient in ours[1].values())
        assert max(abs(ours[0]), largest) <= (1e-14 if support == "sampled" else 0)
        return
    theirs = by_reference(case, batch, wanted, dropped=missing)
    loss, gradient = difference(ours, theirs)
    print(f"{kind} {support} {beta}: loss {loss:.1e} gradient {gradient:.1e}")
    assert loss < 1e-12 and gradient < 1e-11


def test_perturbing_the_teacher_changes_the_gradient() -> None:
    """Also the part of it that the student hardly sees: an entry outside of its likeliest."""
    for support in SUPPORTS:
        results = []
        for change in (0.0, 0.1):
            case = make_case("gkd", knobs={"support": support, "top_k": 4})
            embeddings: Any = case.teacher.model.get_input_embeddings()
            with torch.no_grad():
                embeddings.weight[:, 0].add_(change)
            batch = case.engine.make_rollout_batch(0)
            results.append(by_engine(case, batch, rollouts_of(case)))
        assert difference(*results)[1] > 1e-3, support


def test_no_forward_pass_exceeds_tokens_per_batch() -> None:
    """What a teacher is shown is longer than what the student's micro-batches were made for; the
    result does not depend on it."""
    model = tiny_language_model(dtype=torch.float64)
    scorers = [Scorer(model, temperature=1.0, tokens_per_batch=size) for size in (999, 24)]
    sizes: list[int] = []
    model.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompts = [one.prompt for one in REQUESTS]
    completions = [one.completion for one in REQUESTS]
    whole, parts = (scorer.distributions(prompts, completions) for scorer in scorers)
    assert sizes == [4 * 23, 23, 2 * 9, 6]
    torch.testing.assert_close(parts.hidden, whole.hidden)


# --- the student's average ------------------------------------------------------------------------


def test_an_average_that_moves_once_a_rollout_batch() -> None:
    """By hand: rate 1/2 every 2nd batch, whatever steps are made: only batches 1 and 3 count."""
    student = tiny_language_model(dtype=torch.float64)
    settings: dict[str, Any] = {"temperature": 1.0, "tokens_per_batch": 60}
    teacher = EMATeacher(student, name="s", update_rate=0.5, every_batches=2, **settings)
    synced = EMATeacher(student, name="s", update_rate=1.0, every_batches=1, **settings)
    name, weight = next(iter(student.model.named_parameters()))
    first = weight.detach().clone()
    expected = [0.0, 1.0, 1.0, 2.5]  # the student moves by 1 in each of two steps a batch
    for index, moved in enumerate(expected):
        for _ in range(2):
            with torch.no_grad():
                weight.add_(1)
            teacher.after_step()
            synced.after_step()
        torch.testing.assert_close(synced.state()[name], first + 2 * index)
        teacher.after_batch(index)
        synced.after_batch(index)
        torch.testing.assert_close(teacher.state()[name], first + 2 * moved)
        torch.testing.assert_close(synced.state()[name], weight.detach())
    assert "every 2 rollout batches" in teacher.identity


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("every", [1, 2])
def test_an_average_stays_where_a_skipped_step_leaves_the_student(
    every: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is skipped; it is the only one of its batch, and the batch alone decides, or not."""
    optimization = {"num_steps": 2, "steps_per_rollout_batch": steps, "learning_rate": 1e-2}
    case = make_case("gkd", optimization=optimization)
    engine = case.engine
    student = engine.student
    average = EMATeacher(
        student,
        name="s",
        update_rate=0.5,
        every_batches=every,
        temperature=1.0,
        tokens_per_batch=60,
    )
    engine.teacher = average
    first = {name: weight.clone() for name, weight in average.state().items()}
    made = engine.accumulate_gradient

    def accumulate(*arguments: Any) -> float:
        loss = made(*arguments)
        return math.nan if engine.step == 1 else loss

    monkeypatch.setattr(engine, "accumulate_gradient", accumulate)
    (_, second) = engine.steps()
    assert second.metrics["optimization/skipped/count"] == 1
    num_follows = 1 if steps == 1 or every == 1 else 0
    trained = dict(student.model.named_parameters())
    for name, weight in average.state().items():
        wanted = first[name] + 0.5 * num_follows * (trained[name].detach() - first[name])
        torch.testing.assert_close(weight, wanted)


def averaged_run(world: Path, run_dir: Path, **teacher: Any) -> dict[str, Any]:
    optimization = {"num_steps": 6, "steps_per_rollout_batch": 2, "learning_rate": 3e-2}
    objective = {"type": "gkd", "support": "student_top_k", "top_k": 3}
    config = run_config(world, run_dir, optimization=optimization, objective=objective)
    privileged = {"type": "privileged", "template": "{answer} = {prompt}"}
    return config | {"teacher": privileged | {"teacher": {"type": "ema"} | teacher}}


@pytest.mark.parametrize(
    "teacher",
    [
        {"update_rate": 0.2, "every_batches": 2},
        {"update_rate": 1.0, "every_batches": 2},
        {"update_rate": 1.0, "trust_region": 0.3},
        {"update_rate": 0.2, "every_batches": 1, "trust_region": 0.3},
    ],
)
def test_an_interrupted_run_resumes_bit_for_bit(
    world: Path, tmp_path: Path, teacher: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the teacher is made of, between the steps of a rollout batch and between batches."""
    rlad.train(averaged_run(world, tmp_path / "whole" / "run", **teacher))
    wanted = remains(tmp_path / "whole" / "run")
    rows = list(RunDirectory(tmp_path / "whole" / "run").read(METRICS))
    assert all(row["teacher/privileged/frac"] == 1 for row in rows)
    assert rows[-1]["teacher/divergence/mean"] > 0
    monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(10**9))
    rlad.train(averaged_run(world, tmp_path / "counted" / "run", **teacher))
    num_checks = StopAt.num_checks
    for at in range(1, num_checks, num_checks // 5):
        config = averaged_run(world, tmp_path / str(at) / "run", **teacher)
        monkeypatch.setattr(rlad.training.run, "Stop", lambda at=at: StopAt(at))
        with pytest.raises(StopRequested):
            rlad.train(config)
        monkeypatch.setattr(rlad.training.run, "Stop", lambda: StopAt(10**9))
        rlad.train(config, resume=True)
        assert remains(Path(config["run_dir"])) == wanted, at


def test_a_trust_region_without_an_output_layer_is_refused() -> None:
    student = tiny_language_model()
    average = EMATeacher(student, name="s", update_rate=1.0, temperature=1.0, tokens_per_batch=9)
    average.scorer.head = None
    initial = Scorer(student, temperature=1.0, tokens_per_batch=9)
    with pytest.raises(UserError, match=r"teacher\.trust_region needs a model whose logits are"):
        TrustRegionTeacher(average, initial, share=0.1)


def test_titles_say_who_teaches() -> None:
    titles = {
        "the student's moving average": {},
        "the student itself": {"update_rate": 1.0},
        "the student, synced every 3 rollout batches": {"update_rate": 1.0, "every_batches": 3},
        "the initial student": {"update_rate": 0.0},
        "the student itself, mixed with the initial student": {
            "update_rate": 1.0,
            "trust_region": 0.01,
        },
    }
    assert [EMATeacherConfig(type="ema", **said).title for said in titles.values()] == list(titles)


@pytest.mark.peft
def test_a_lora_student_is_taught_by_its_own_base(world: Path, tmp_path: Path) -> None:
    """`adapter` and the initial student of a trust region are the base model: adapter off while
    they are asked, and on for the student."""
    pytest.importorskip("peft", reason="the optional package peft is not installed")
    from rlad.teachers.adapter import AdapterScorer, AdapterTeacher

    base = str(world / "student")
    student, initial = (
        load_language_model(base, device="cpu", trainable=is_student, lora=lora)
        for is_student, lora in ((True, LoraConfig(rank=2)), (False, None))
    )
    with torch.no_grad():
        for parameter in student.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    scoring: dict[str, Any] = {"temperature": 0.7, "tokens_per_batch": 60}
    off = AdapterTeacher(student, base=base, folder=None, **scoring)
    itself = EMATeacher(student, name="s", update_rate=1.0, **scoring)
    region = TrustRegionTeacher(itself, AdapterScorer(student, adapter=None, **scoring), share=0.4)
    request = TeacherRequest([2, 5, 3], [6, 3, 1])
    first, present = (
        plain(one, request.prompt, request.completion, 0.7) for one in (initial, student)
    )
    for teacher, wanted in (
        (off, first),
        (itself, present),
        (region, (0.6 * first + 0.4 * present).log_softmax(-1)),
    ):
        found = teacher.distributions([request]).logits().double().log_softmax(-1)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert float((first - present).abs().max()) > 0.1
    for teacher in ({"type": "adapter"}, {"type": "ema", "update_rate": 1.0, "trust_region": 0.5}):
        config = averaged_run(world, tmp_path / teacher["type"] / "run")
        config["student"] |= {"lora": {"rank": 2}}
        config["teacher"]["teacher"] = teacher
        rows = list(RunDirectory(rlad.train(config).run_dir).read(METRICS))
        assert all(row["optimization/gradient_norm"] > 0 for row in rows)
