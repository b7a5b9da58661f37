"""Make problems of easy-vqa (`rlad[easy-vqa]`, MIT) and a tiny student that has begun to see:

    python recipes/easy-vqa-tiny/make.py --out models/easy-vqa

Of its questions those about the colour and the shape of what is drawn; the others are answered by
yes or no, mostly rightly without looking. Its test pictures are for the test, a tenth of the others
for validation, and `blind.jsonl` asks the test questions about a black picture. The student is made
as that of `recipes/scenes-tiny`: trained to answer, then to answer partly about other pictures.
"""

import argparse
import base64
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import easy_vqa
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "scenes-tiny"))

from make import (
    END,
    SMOKE,
    Example,
    Phase,
    make_model,
    make_processor,
    make_tokenizer,
    save,
    train,
)

from rlad.tasks import Problem, Task, make_task

FILES = ("train", "validation", "test", "blind")
BASE = Phase(400, 1.0)
STUDENT = Phase(60, 0.4, learning_rate=1e-3)
Row = dict[str, str]


def rows_of(split: str) -> Iterator[tuple[int, Row]]:
    """The questions of a split about colour and shape, with the numbers of their pictures."""
    questions = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    for text, answer, number in zip(*questions, strict=True):
        if answer not in ("yes", "no"):
            picture = base64.b64encode(Path(paths[number]).read_bytes()).decode()
            image = f"data:image/png;base64,{picture}"
            yield number, {"prompt": f"<image>{text}\n", "answer": answer, "images": image}


def black_picture() -> str:
    buffer = BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_problems(folder: Path) -> None:
    rows: dict[str, list[Row]] = {name: [] for name in FILES}
    for number, row in rows_of("train"):
        rows["train" if number % 10 else "validation"].append(row)
    rows["test"] = [row for _, row in rows_of("test")]
    rows["blind"] = [row | {"images": black_picture()} for row in rows["test"]]
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def blind_majority(rows: list[Problem], asked: list[Problem]) -> float:
    """The share that the commonest answer to each question among `rows` has right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for one in rows:
        answers[one.prompt][one.answer] += 1
    right = [answers[one.prompt].most_common(1)[0][0] == one.answer for one in asked]
    return sum(right) / len(right)


def all_of(task: Task, split: str) -> list[Problem]:
    number = task.num_problems(split)
    return [task.problem(split, i) for i in range(number or 0)]


def completion_of(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def make_student(problems: list[Problem], folder: Path, base: Phase, mixed: Phase) -> None:
    torch.manual_seed(0)
    texts = [one.prompt.removeprefix("<image>") + completion_of(one.answer) for one in problems]
    tokenizer = make_tokenizer(texts)
    processor = make_processor(tokenizer)
    examples = []
    for one in problems:
        image = one.images[0].image()
        made = processor(text=[one.prompt], images=[[image]], return_tensors="pt")
        ids = tokenizer(completion_of(one.answer), add_special_tokens=False)["input_ids"]
        prompt = made["input_ids"][0].tolist()
        examples.append(Example(prompt, made["pixel_values"][0], [*ids, END]))
    model = make_model(len(tokenizer))
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters", flush=True)
    train(model, examples, base, seed=0)
    train(model, examples, mixed, seed=1)
    save(model, processor, folder)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for problems and student")
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE} steps of each phase")
    arguments = parser.parse_args(words)
    write_problems(arguments.out)
    paths = {name: str(arguments.out / f"{name}.jsonl") for name in FILES}
    task = make_task(
        "jsonl",
        path=paths["train"],
        validation_path=paths["validation"],
        test_path=paths["test"],
    )
    problems = all_of(task, "train")
    share = blind_majority(problems, all_of(task, "test"))
    print(f"{len(problems):,} problems; without its picture, {share:.1%} of the test is right")
    phases = [BASE, STUDENT]
    if arguments.smoke:
        problems = problems[:64]
        phases = [Phase(SMOKE, one.looking_share) for one in phases]
    make_student(problems, arguments.out / "student", *phases)


if __name__ == "__main__":
    main()
