"""An answer in which the token limit cuts a completion off is none, in training, evaluation and
preview alike."""

from pathlib import Path
from typing import Any

import pytest

from rlad.cli.sample import preview
from rlad.config.file import parse_config
from rlad.config.run import RunConfig
from rlad.models.loading import load_language_model
from rlad.rollouts.evaluation import evaluate
from rlad.rollouts.grading import graded_groups
from rlad.tasks.answers import without_note
from rlad.tasks.base import Judgement
from rlad.tasks.jsonl import JsonlTask
from tiny_runs import WORDS, run_config, write_model

LIMIT = 3
NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def config(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a random student of 8 words, one of them `Answer:`."""
    folder = tmp_path_factory.mktemp("cut")
    write_model(folder / "student", seed=1, words=(*WORDS, "Answer:"))
    rollout = {"max_completion_tokens": LIMIT, "group_size": NUM_SAMPLES}
    student = {"model": str(folder / "student")}
    return parse_config(
        run_config(
            world, folder / "run", student=student, rollout=rollout, objective={"type": "grpo"}
        )
    )


class Listening(JsonlTask):
    """The task of the run; it keeps what it was given to judge."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.heard: list[str] = []

    def judge(self, problem: Any, completion: str) -> Judgement:
        self.heard.append(completion)
        return super().judge(problem, completion)


def require_no_cut_answer(heard: list[str]) -> None:
    """A completion of as many words as the limit has was cut off, as its end is a token too."""
    texts = [text.split() for text in heard]
    assert not [
        text for text in texts if len(text) == LIMIT and "Answer:" in text and text[-1] != "Answer:"
    ]
    assert [text for text in texts if text[0:1] == ["Answer:"] and len(text) == 2], (
        "none has ended behind its answer"
    )
    assert [text for text in texts if text == ["Answer:"]] and [
        text for text in texts if len(text) == LIMIT
    ]


@pytest.mark.parametrize("route", ["training", "evaluation"])
def test_what_is_judged(config, route):
    task = Listening(**config.task.model_dump(exclude={"type"}))
    student = load_language_model(config.student.model)
    if route == "evaluation":
        more = {"num_problems": 2, "num_samples": NUM_SAMPLES, "temperature": 1.0}
        evaluate(student, task, "test", rollout=config.rollout, **more)
    else:
        groups = graded_groups(student, task, "train", [0, 1], rollout=config.rollout, seed=0)
        written = [rollout for group in groups for rollout in group.rollouts]
        pairs = [(rollout.text, heard) for rollout, heard in zip(written, task.heard, strict=True)]
        kept = [(text, without_note(heard)) for text, heard in pairs]
        assert all(text.startswith(heard) for text, heard in kept) and any(
            text != heard for text, heard in pairs
        )
    require_no_cut_answer(task.heard)


def test_a_preview_shows_the_whole_text_and_its_grade(config):
    rows = preview(config, num_prompts=2)
    cut = [
        row for row in rows if row["is_truncated"] and "Answer:" in row["completion"].split()[:-1]
    ]
    assert len(cut) > 10 and {row["verdict"] for row in cut} == {"wrong"}
    assert "correct" in {row["verdict"] for row in rows}
