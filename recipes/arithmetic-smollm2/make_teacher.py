"""Make what run.toml and run-lora.toml need: the problems, and a teacher that is the student after
a warm-up and GRPO.

    python recipes/arithmetic-smollm2/make_teacher.py [--student MODEL] [--out FOLDER]

Writes OUT/problems.jsonl, OUT/warm (after the supervised warm-up on right answers), the GRPO run
OUT/teacher-grpo, and OUT/teacher. Warm-up and GRPO see problems of the training split alone.
OUT/larger_problems.jsonl has these problems and others with larger numbers (search.toml).
A second start uses OUT/warm if it is there, and makes the rest anew.
"""

import argparse
import json
import random
import shutil
import time
from pathlib import Path

import torch
from transformers import get_cosine_schedule_with_warmup

import rlad
from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel, load_language_model, save_model
from rlad.rollouts.prompts import prompt_token_ids
from rlad.runs.checkpoints import write_folder
from rlad.runs.directory import RunDirectory
from rlad.scoring.scorer import Scorer
from rlad.tasks import Problem, Task, make_task

LARGEST = (30, 20)
"""the first and the second number of a problem are at most these"""
LARGEST_OF_SEARCH = (60, 40)
QUESTION = "State the final answer to the following arithmetic problem: {problem} ="
RIGHT_ANSWER = "The final answer to this arithmetic problem is {answer}."
NUM_STEPS = 40
BATCH_SIZE = 24
LEARNING_RATE = 5e-5
GRPO = Path(__file__).with_name("grpo.toml")


def write_problems(path: Path, largest: tuple[int, int]) -> None:
    """Write every sum, and every difference that is not negative, one JSON object a line."""
    problems = {}
    for a in range(1, largest[0] + 1):
        for b in range(1, largest[1] + 1):
            problems[f"{a} + {b}"] = a + b
            if a >= b:
                problems[f"{a} - {b}"] = a - b
    rows = [
        {"prompt": QUESTION.format(problem=problem), "answer": str(answer)}
        for problem, answer in problems.items()
    ]
    random.Random(0).shuffle(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def right_answer(student: LanguageModel, problem: Problem) -> tuple[list[int], list[int]]:
    """Return token ids of a problem's prompt and of the completion that the warm-up teaches."""
    prompt = prompt_token_ids(
        student.tokenizer, problem.prompt, RolloutConfig(prompt_format="chat")
    )
    completion = student.tokenizer(RIGHT_ANSWER.format(answer=problem.answer))["input_ids"]
    return prompt, [*completion, student.eos_token_ids[0]]


def warm_up(student: LanguageModel, task: Task) -> None:
    """Train by AdamW on the mean negative log-prob of right answers."""
    scorer = Scorer(student, temperature=1.0, tokens_per_batch=16_384)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=5, num_training_steps=NUM_STEPS
    )
    started = time.process_time()
    for step in range(NUM_STEPS):
        examples = [
            right_answer(student, task.problem("train", step * BATCH_SIZE + i, seed=1))
            for i in range(BATCH_SIZE)
        ]
        scores = scorer(
            [prompt for prompt, _ in examples],
            [completion for _, completion in examples],
            with_entropy=False,
        )
        loss = -scores.logprobs[scores.mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(
            f"warm-up {step + 1}/{NUM_STEPS}  loss {loss.item():.4f}  "
            f"{time.process_time() - started:.0f} CPU s",
            flush=True,
        )


def write_warm_student(student: str, problems: Path, folder: Path) -> None:
    """Warm the model up and write it, unless it is there already."""
    if folder.is_dir():
        return
    warmed = load_language_model(student, dtype="bfloat16", trainable=True)
    warm_up(warmed, make_task("jsonl", path=str(problems), verifier="number"))
    write_folder(folder, lambda aside: save_model(warmed, aside))


def write_teacher(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint without what resuming needs; an older teacher is replaced."""

    def copy(aside: Path) -> None:
        shutil.copytree(
            checkpoint,
            aside,
            ignore=shutil.ignore_patterns("trainer", "manifest.json"),
            dirs_exist_ok=True,
        )

    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, copy)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--student", default="smollm2-135m", help="model that teacher and student both start from"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/arithmetic-smollm2"))
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problems = arguments.out / "problems.jsonl"
    warm = arguments.out / "warm"
    write_problems(problems, LARGEST)
    write_problems(arguments.out / "larger_problems.jsonl", LARGEST_OF_SEARCH)
    write_warm_student(arguments.student, problems, warm)
    run_dir = arguments.out / "teacher-grpo"
    settings = [f"student.model={warm}", f"task.path={problems}", f"run_dir={run_dir}"]
    result = rlad.train(rlad.load_config(GRPO, settings), overwrite=True)
    print(f"test pass@1 after the warm-up {result.before}, after GRPO {result.after}")
    write_teacher(RunDirectory(run_dir).newest_checkpoint()[1], arguments.out / "teacher")


if __name__ == "__main__":
    main()
