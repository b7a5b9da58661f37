"""`rlad check --ranking`: whether a teacher, under several contexts, ranks completions as the
verifier does; and the warning about a teacher that thinks where the student does not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from transformers import AutoTokenizer

from rlad.checks.check import check_run
from rlad.checks.ranking import CONTEXTS, describe_ranking, rank_contexts, rank_groups
from rlad.cli.main import main
from rlad.config.file import parse_config
from rlad.engines.metrics import ranking_metrics
from rlad.engines.rollout_batch import teacher_request
from rlad.errors import UserError
from rlad.models.loading import load_language_model, save_model
from rlad.models.student import load_student
from rlad.rollouts.grading import graded_groups
from rlad.seeds import stream_seed
from rlad.tasks import make_task
from rlad.teachers import prepare_teacher
from rlad.teachers.base import Answer, TeacherRequest, TeacherWrapper
from tiny_environments import Adding, InThisProcess
from tiny_runs import run_config, write_config, write_model, write_unreachable_answers

NUM_PROBLEMS = 5
GROUP_SIZE = 8


def config_of(world: Path, teacher: dict[str, Any] | None, **sections: Any) -> dict[str, Any]:
    config = run_config(world, Path("unused"), rollout={"group_size": GROUP_SIZE}, **sections)
    config["task"]["verifier"] = "user_verifiers:last_digit"
    return config | {"teacher": teacher or {"model": str(world / "teacher")}}


def test_a_teacher_without_context_against_scipy(world: Path) -> None:
    """The same completions, sampled again, scored by the teacher itself."""
    config = parse_config(config_of(world, None))
    by_context = {one.context: one for one in rank_contexts(config, NUM_PROBLEMS)}
    assert list(by_context) == [*CONTEXTS, "as configured"]

    student = load_student(config)
    task = make_task(**config.task.model_dump())
    seed = stream_seed(config.seed, "ranking")
    groups = graded_groups(
        student, task, "train", range(NUM_PROBLEMS), rollout=config.rollout, seed=seed
    )
    teacher = prepare_teacher(config, student)
    assert teacher is not None
    right, wrong, wins, num_pairs, num_mixed = [], [], 0.0, 0, 0
    for group in groups:
        requests = [
            TeacherRequest(group.prompt_token_ids, one.completion.token_ids)
            for one in group.rollouts
        ]
        means = [float(values.mean()) for values in teacher.logprobs(requests)]
        verdicts = [one.verdict == "correct" for one in group.rollouts]
        own = [m for m, v in zip(means, verdicts, strict=True) if v]
        others = [m for m, v in zip(means, verdicts, strict=True) if not v]
        right += own
        wrong += others
        if own and others:
            wins += stats.mannwhitneyu(own, others).statistic
            num_pairs += len(own) * len(others)
            num_mixed += 1
    found = by_context["no context"].ranking
    assert found == by_context["as configured"].ranking
    assert found.auc is not None and found.pairwise is not None and num_pairs > 10
    area = stats.mannwhitneyu(right, wrong).statistic / (len(right) * len(wrong))
    assert found.auc.mean == pytest.approx(area, abs=1e-4)
    assert found.pairwise.mean == pytest.approx(wins / num_pairs, abs=1e-4)
    assert (found.num_pairs, found.num_problems) == (num_pairs, num_mixed)

    # Of a context only those count for which all is there: with s successes and f failures of eight
    # those with as many others that differ in their text.
    assert by_context["reference answer"].num_completions == NUM_PROBLEMS * GROUP_SIZE
    for name, one in by_context.items():
        wanted = CONTEXTS.get(name, {})
        num_whole = 0
        for group in groups:
            for own in group.rollouts:
                texts = [
                    {o.text for o in group.rollouts if o.text != own.text and o.reward == reward}
                    for reward in (1.0, 0.0)
                ]
                num_whole += len(texts[0] - {""}) >= wanted.get("num_successes", 0) and (
                    len(texts[1] - {""}) >= wanted.get("num_failures", 0)
                )
        assert one.num_completions == num_whole, name
    assert by_context["2S1F"].num_completions < by_context["1S"].num_completions


def test_a_context_that_does_not_fit_does_not_count(world: Path, tmp_path: Path) -> None:
    """The teacher's own context is 26: question and request are 12, a completion is 1 to 4, a
    heading 3 and of a wrong attempt 7. One correct solution always fits (23), 2S1F never (29)."""
    write_model(tmp_path / "short", seed=2, max_position_embeddings=26)
    numbers = [
        {one.context: one.num_completions for one in rank_contexts(config, NUM_PROBLEMS)}
        for teacher in (None, {"model": str(tmp_path / "short")})
        for config in [parse_config(config_of(world, teacher))]
    ]
    long, short = numbers
    assert short["1S"] == long["1S"] > 0
    assert long["2S1F"] > 0 and short["2S1F"] == 0


def test_what_an_environment_wrote_is_not_ranked(world: Path) -> None:
    """A teacher without a log-prob for the environment's tokens ranks as one with them: the mean is
    that of the metric in training, over what the student wrote."""
    table = config_of(world, None)
    table["rollout"]["max_completion_tokens"] = 12
    config = parse_config(table)
    student = load_student(config)
    groups = graded_groups(
        student,
        InThisProcess(Adding, max_turn_tokens=3),
        "train",
        range(NUM_PROBLEMS),
        rollout=config.rollout,
        seed=1,
    )
    teacher = prepare_teacher(config, student)
    assert teacher is not None
    found = rank_groups("", teacher, None, groups)
    blind = rank_groups("", WithoutEnvironment(teacher), None, groups)
    assert found == blind and found.num_completions == NUM_PROBLEMS * GROUP_SIZE
    requests = [teacher_request(group, i) for group in groups for i in range(GROUP_SIZE)]
    metrics = ranking_metrics(groups, teacher.logprobs(requests))
    assert found.ranking.auc is not None
    assert found.ranking.auc.mean == pytest.approx(metrics["teacher/ranking/auc"], abs=1e-4)


class WithoutEnvironment(TeacherWrapper):
    """Has nothing to say about what the student did not write."""

    def submit(self, requests: Sequence[TeacherRequest]) -> list[Answer]:
        answers = []
        for request, values in zip(requests, self.teacher.logprobs(requests), strict=True):
            assert request.actions is not None and not all(request.actions)
            own = torch.tensor(request.actions)
            answers.append(Answer.finished(torch.where(own, values, torch.nan)))
        return answers


def test_a_configured_context_keeps_its_form(world: Path) -> None:
    shows = {"num_successes": 2, "num_failures": 1, "texts": {"request": "= ="}}
    teacher = {"type": "privileged", "context": shows, "teacher": {"model": str(world / "teacher")}}
    ranked = rank_contexts(parse_config(config_of(world, teacher)), NUM_PROBLEMS)
    plain = rank_contexts(parse_config(config_of(world, None)), NUM_PROBLEMS)
    by_context = {one.context: one for one in ranked}
    assert by_context["no context"] == plain[0]
    # Up to two successes and a failure: where there are fewer it speaks nevertheless.
    assert by_context["as configured"].num_completions >= by_context["2S1F"].num_completions
    assert by_context["1S"].ranking != plain[2].ranking  # another request at its end


def test_a_context_shows_nothing_else_that_the_config_does(world: Path, tmp_path: Path) -> None:
    """Not the reference solution, which "as configured" has."""
    config = config_of(world, None)
    rows = [json.loads(line) for line in (world / "path.jsonl").read_text().splitlines()]
    path = tmp_path / "solved.jsonl"
    path.write_text("".join(json.dumps(row | {"solution": "1 + 1"}) + "\n" for row in rows))
    config["task"] |= {"path": str(path)}
    shows = {"type": "privileged", "context": {"solution": True}, "teacher": config["teacher"]}
    found = [
        {one.context: one for one in rank_contexts(parse_config(table), NUM_PROBLEMS)}
        for table in (config, config | {"teacher": shows})
    ]
    assert found[0].pop("as configured") != found[1].pop("as configured")
    assert found[0] == found[1]


def test_what_the_command_says(world: Path, tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.toml", config_of(world, None))
    result = CliRunner().invoke(main, ["check", str(path), "--ranking", "3", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [one["context"] for one in report["ranking"]] == [*CONTEXTS, "as configured"]
    (line,) = [f for f in report["findings"] if f["subject"] == "ranking, no context"]
    assert line["level"] == "warning" and "too few problems to say much" in line["message"]
    assert not (tmp_path / "unused").exists()


def test_a_ranking_without_a_pair_says_so(world: Path, tmp_path: Path) -> None:
    """The student has no words for the answers."""
    config = config_of(world, None)
    config["task"] |= {"path": write_unreachable_answers(tmp_path), "verifier": "exact"}
    ranked = rank_contexts(parse_config(config), 2)
    by_context = {one.context: describe_ranking(one) for one in ranked}
    for name, number in (("2S1F", 0), ("no context", 2 * GROUP_SIZE)):
        assert by_context[name].level == "warning"
        assert by_context[name].message.startswith(f"none: among the {number} completions")


def test_a_ranking_needs_a_teacher(world: Path) -> None:
    config = config_of(world, None) | {"objective": {"type": "grpo"}}
    del config["teacher"]
    with pytest.raises(UserError, match=r"a ranking needs a \[teacher\] section"):
        rank_contexts(parse_config(config), 1)


# --- thoughts -------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}="
    "{% if enable_thinking is defined and enable_thinking is false %} <think> </think>{% endif %}"
    "{% endif %}"
)


@pytest.mark.parametrize(
    ("student_thinks", "teacher_thinks", "warns"),
    [(False, True, True), (True, True, False), (False, False, False), (True, False, False)],
)
def test_a_thinking_teacher_of_a_bare_student(
    world: Path, tmp_path: Path, student_thinks: bool, teacher_thinks: bool, warns: bool
) -> None:
    student = tmp_path / "student"
    tokenizer = AutoTokenizer.from_pretrained(world / "student")
    tokenizer.chat_template = CHAT
    tokenizer.add_tokens(["<think>", "</think>"])

    model = load_language_model(str(world / "student"), trainable=True)
    model.model.resize_token_embeddings(len(tokenizer))
    save_model(model, student)
    tokenizer.save_pretrained(student)
    config = config_of(
        world,
        {
            "type": "privileged",
            "context": {"answer": True},
            "chat_template_kwargs": {"enable_thinking": teacher_thinks},
            "teacher": {"type": "ema"},
        },
        student={"model": str(student)},
        optimization={"num_steps": 1},
    )
    config["rollout"]["chat_template_kwargs"] = {"enable_thinking": student_thinks}
    report = check_run(parse_config(config))
    assert not report.errors, report.errors
    found = [finding for finding in report.findings if finding.subject == "thoughts"]
    assert len(found) == warns
    if warns:
        assert report.trial is not None
        measured = report.trial.metrics["teacher/log_ratio/mean"]
        assert f"is {measured:+.2f} nats on average" in found[0].message
