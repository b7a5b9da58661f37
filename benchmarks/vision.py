"""Students that see: how exact a batch is, and what pictures cost in time and memory.

    python benchmarks/vision.py exact      each family beside one row at a time of transformers
    python benchmarks/vision.py cost       tokens a second and memory, a fresh process for each row

`exact` compares the log-probs of completions of prompts with one, two and no pictures, and the
gradient of their sum, with the model's own forward pass of each row alone, pixels and all.

`cost` makes GRPO's rollout batches and updates on `scenes` with the student of
`recipes/scenes-tiny` and a larger one, both with random weights, of which every completion has an
advantage. `texts` are the same questions with a word for each token of the picture. Processor time,
one thread; bytes are resident memory beyond weights, gradient and Adam. Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "scenes-tiny"))

import make
import torch
from memory import resident, status_bytes
from step_engines import environment
from torch import Tensor
from transformers import Idefics3ForConditionalGeneration
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from rlad.config.file import parse_config
from rlad.engines.making import make_engine
from rlad.models.pictures import MARKER
from rlad.models.student import load_student
from rlad.scoring.scorer import Scorer
from rlad.tasks import Problem, make_task
from rlad.tasks.scenes import Scenes, model_answer
from tiny_vision import FAMILIES, picture, tiny_seeing_model

TEMPERATURE = 0.7
WAYS: dict[str, dict[str, Any]] = {
    "texts": {},
    "pictures": {},
    "pictures, gradient checkpointing": {"gradient_checkpointing": True},
    "pictures, tower trained too": {"train_vision": True},
}
LARGER = {
    "text": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
    "vision": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6},
}
PIXELS = {"scenes-tiny": make.PICTURE_SIZE, "larger": 128}
ROUNDS = {"scenes-tiny": 7, "larger": 2}
PROMPTS = {"scenes-tiny": 8, "larger": 4}

# --- exact ----------------------------------------------------------------------------------------


def rows_of(model: Any) -> list[tuple[Any, list[int]]]:
    """Prompts of one, two and no pictures of several sizes, and completions of several lengths."""
    sizes = ((32, 32), (48, 32), (16, 48))
    prompts: list[Any] = [[20, 21, 22, 23]]
    for seeds in ((0,), (1, 2), (4,), (5, 6), (7,)):
        text = "w12 w20 " + " w13 ".join([model.vision.wrapped_token] * len(seeds)) + " w14"
        seen = [picture(seed, sizes[seed % 3]) for seed in seeds]
        prompts.append(model.vision.prompt(text, seen, add_special_tokens=True))
    return [(p, [12 + (7 * i + 3 * n) % 40 for n in range(3 + i)]) for i, p in enumerate(prompts)]


def alone(model: Any, prompt: Any, completion: list[int]) -> Tensor:
    """The log-probs of a row by transformers' own forward pass."""
    ids = torch.tensor([[*prompt, *completion]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pictures := getattr(prompt, "pictures", ()):
        inputs |= model.vision.pixels(pictures)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.model.config.image_token_id).int()
    logits = model.model(**inputs, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)
    return logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0]


def gradient(model: Any, logprobs: list[Tensor]) -> Tensor:
    model.model.zero_grad()
    sum(one.sum() for one in logprobs).backward()
    return torch.cat(
        [
            (torch.zeros_like(one) if one.grad is None else one.grad).flatten().double()
            for one in model.model.parameters()
        ]
    )


def exact() -> None:
    print(
        "| family | log-probs, most nats | gradient, share of its length |\n| --- | ---: | ---: |"
    )
    for family in FAMILIES:
        model = tiny_seeing_model(family)
        assert model.vision is not None
        model.vision.keeps_features = False
        rows = rows_of(model)
        theirs = [alone(model, *row) for row in rows]
        expected = gradient(model, theirs)
        scores = Scorer(model, temperature=TEMPERATURE, tokens_per_batch=10_000)(
            *map(list, zip(*rows, strict=True))
        )
        ours = [v[m] for v, m in zip(scores.logprobs, scores.mask, strict=True)]
        found = gradient(model, ours)
        most = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
        share = float((found - expected).norm() / expected.norm())
        print(f"| {family} | {most:.1e} | {share:.1e} |", flush=True)


# --- cost -----------------------------------------------------------------------------------------


class Worded(Scenes):
    """The questions of `scenes` with words in place of the picture."""

    def __init__(self, num_words: int, **settings: Any):
        super().__init__(**settings)
        self._words = " circle" * num_words

    def problem(self, *where: Any, **seed: Any) -> Problem:
        problem = super().problem(*where, **seed)
        return replace(problem, prompt=problem.prompt.replace(MARKER, self._words), images=())


def save_student(kind: str, folder: Path) -> None:
    task = make_task("scenes", instructions=False)
    problems = [task.problem("train", i) for i in range(300)]
    texts = [one.prompt.replace(MARKER, "") + model_answer(one) for one in problems]
    tokenizer = make.make_tokenizer(texts)
    model, processor = make.make_model(len(tokenizer)), make.make_processor(tokenizer)
    if kind == "larger":
        config = model.config
        for part, sizes in LARGER.items():
            getattr(config, f"{part}_config").update(sizes)
        config.text_config.update({"head_dim": 96, "vocab_size": 8192})
        config.vision_config.update({"image_size": PIXELS[kind]})
        edge = {"longest_edge": PIXELS[kind]}
        images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
        num_tokens = (PIXELS[kind] // make.PATCH // make.SCALE) ** 2
        model = Idefics3ForConditionalGeneration(config)
        processor = Idefics3Processor(images, tokenizer, image_seq_len=num_tokens)
    make.save(model, processor, folder)


def measure_here(kind: str, way: str) -> dict[str, float]:
    """Tokens a second of processor time and bytes, the median of some rounds after a warm-up."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = {"instructions": False, "picture_size": PIXELS[kind]}
    with TemporaryDirectory() as folder, ExitStack() as held:
        save_student(kind, Path(folder))
        config = parse_config(
            {
                "student": {"model": folder, "device": "cpu", **WAYS[way]},
                "task": {"type": "scenes", **settings},
                "objective": {"type": "grpo"},
                "rollout": {
                    "prompts_per_batch": PROMPTS[kind],
                    "group_size": 4,
                    "max_completion_tokens": 48,
                },
                "optimization": {"num_steps": ROUNDS[kind] + 1, "tokens_per_batch": 1024},
            }
        )
        # No completion ends before its limit.
        student = replace(load_student(config), eos_token_ids=())
        task: Any = Scenes(**settings)
        assert student.vision is not None
        if way == "texts":
            words = student.vision.num_tokens(task.problem("train", 0).images[0])
            task = Worded(words, **settings)
        engine = make_engine(config, student, task, before_work=lambda: None)
        held.enter_context(closing(engine))
        rounds = [one_round(engine, index) for index in range(ROUNDS[kind] + 1)][1:]
    found = {name: median(one[name] for one in rounds) for name in rounds[0]}
    return found | {
        "parameters": sum(one.numel() for one in student.model.parameters()),
        "trained": sum(one.numel() for one in engine.parameters),
    }


def one_round(engine: Any, index: int) -> dict[str, float]:
    started = time.process_time()
    batch = engine.make_rollout_batch(index)
    sampling = time.process_time() - started
    batch.advantages = torch.tensor([1.0, -1.0]).repeat(len(batch.rollouts) // 2)
    engine.choose_what_trains(batch)
    num_tokens = sum(map(len, batch.completions))
    before = resident()
    started = time.process_time()
    engine.update(batch, range(len(batch.groups)))
    return {
        "update": num_tokens / (time.process_time() - started),
        "sampling": num_tokens / sampling,
        "bytes": status_bytes("VmHWM") - before,
    }


def cost(kinds: list[str]) -> None:
    columns = "student | way | million parameters (trained) | sampling | update | update MB"
    print(f"| {columns} |\n| --- | --- | ---: | ---: | ---: | ---: |")
    for kind in kinds:
        for way in WAYS:
            command = [sys.executable, __file__, "cost", "--child", json.dumps([kind, way])]
            done = subprocess.run(
                command,
                env={
                    **os.environ,
                    **dict(environment()),
                    "OMP_NUM_THREADS": "1",
                    "MALLOC_MMAP_THRESHOLD_": "65536",
                    "MALLOC_TRIM_THRESHOLD_": "65536",
                },
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            one = json.loads(done.stdout.splitlines()[-1])
            size = f"{one['parameters'] / 1e6:.1f} ({one['trained'] / 1e6:.1f})"
            speed = f"{one['sampling']:.0f} | {one['update']:.0f} | {one['bytes'] / 1e6:.0f}"
            print(f"| {kind} | {way} | {size} | {speed} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["exact", "cost"])
    parser.add_argument("--students", nargs="+", choices=list(PIXELS), default=list(PIXELS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure_here(*json.loads(options.child))))
    elif options.what == "exact":
        exact()
    else:
        cost(options.students)


if __name__ == "__main__":
    main()
