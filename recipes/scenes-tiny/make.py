"""Make a tiny student and a stronger teacher that see, of the kind Idefics3 (SmolVLM):

    python recipes/scenes-tiny/make.py --out models/scenes

Both begin as one model that is trained from scratch on drawn scenes of the *training* split, each
with the completion that names the shapes, thinks and answers rightly. The teacher continues with
those. The student continues with a mixture: some completions are about its picture, the others
about another one, as of a model that has learned to talk before it has learned to look.
Reinforcement learning can then teach it to look.
"""

import argparse
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor

from rlad.models.pictures import MARKER
from rlad.tasks import make_task
from rlad.tasks.scenes import model_answer

SPECIAL = ("<|pad|>", "<|end|>", "<image>", "<fake_token_around_image>", "<global-img>",
           "<end_of_utterance>")  # fmt: skip
PAD, END, IMAGE = range(3)
PICTURE_SIZE = 64
PATCH = 8
SCALE = 2
TOKENS = (PICTURE_SIZE // PATCH // SCALE) ** 2
_PIECES = r"</?[a-z]+>| ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9 ]| "


@dataclass(frozen=True)
class Phase:
    """A number of steps with a schedule of its own; a share of the completions looks."""

    num_steps: int
    looking_share: float
    learning_rate: float = 2e-3
    batch_size: int = 32


BASE = Phase(600, 1.0)
TEACHER = Phase(1000, 1.0, learning_rate=1.5e-3)
STUDENT = Phase(60, 0.4, learning_rate=1e-3)
SMOKE = 3
"""steps of each phase with --smoke, which only shows that it runs"""


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Every word with its blank, every digit and every tag is a token; decoding joins them."""
    pieces = sorted({piece for text in texts for piece in re.findall(_PIECES, text)})
    words = [*SPECIAL, "<|unknown|>", *pieces]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|unknown|>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[END],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=list(SPECIAL[2:]),
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Idefics3Processor:
    edge = {"longest_edge": PICTURE_SIZE}
    images = Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    return Idefics3Processor(images, tokenizer, image_seq_len=TOKENS)


def make_model(vocabulary: int) -> Idefics3ForConditionalGeneration:
    """About 1.3 million parameters."""
    text = {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": END,
        "tie_word_embeddings": False,
    }
    eyes = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": PICTURE_SIZE,
        "patch_size": PATCH,
    }
    config = Idefics3Config(
        text_config=text,
        vision_config=eyes,
        scale_factor=SCALE,
        image_token_id=IMAGE,
        pad_token_id=PAD,
        eos_token_id=END,
        tie_word_embeddings=False,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = PAD
    return model


@dataclass
class Example:
    """A problem in tensors, and the completions of it and of another scene."""

    prompt: list[int]
    pixels: torch.Tensor
    looking: list[int]


def make_examples(number: int, processor: Any) -> list[Example]:
    task = make_task("scenes", instructions=False, picture_size=PICTURE_SIZE)
    examples = []
    for index in range(number):
        problem = task.problem("train", index, seed=1_000_003)
        text = problem.prompt.replace(MARKER, processor.image_token)
        (picture,) = problem.images
        made = processor(text=[text], images=[[picture.image()]], return_tensors="pt")
        completion = processor.tokenizer(model_answer(problem), add_special_tokens=False)
        examples.append(
            Example(
                made["input_ids"][0].tolist(),
                made["pixel_values"][0],
                [*completion["input_ids"], END],
            )
        )
    return examples


def train(model: Any, examples: list[Example], phase: Phase, seed: int) -> None:
    """Train by cross-entropy on completions alone."""
    draw = random.Random(seed)
    kinds: dict[tuple[int, ...], list[Example]] = {}
    for one in examples:
        kinds.setdefault(tuple(one.prompt), []).append(one)
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.num_steps + 1, pct_start=0.1
    )
    started = time.monotonic()
    for step in range(phase.num_steps):
        batch = draw.sample(examples, min(phase.batch_size, len(examples)))
        rows = []
        for one in batch:
            looks = draw.random() < phase.looking_share
            # The same question about another scene.
            other = one if looks else draw.choice(kinds[tuple(one.prompt)])
            rows.append((one.prompt, other.looking))
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.tensor([[*p, *c] + [PAD] * (width - len(p) - len(c)) for p, c in rows])
        labels = torch.tensor(
            [[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in rows]
        )
        pixels = torch.stack([one.pixels for one in batch])
        logits = model(input_ids=ids, pixel_values=pixels).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            seconds = time.monotonic() - started
            print(f"  step {step}: loss {loss.item():.4f}, {seconds:.0f} s", flush=True)


def save(model: Any, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for student and teacher")
    parser.add_argument("--num-examples", type=int, default=6000)
    parser.add_argument("--smoke", action="store_true", help=f"{SMOKE} steps of each phase")
    arguments = parser.parse_args(words)
    phases = [BASE, TEACHER, STUDENT]
    if arguments.smoke:
        arguments.num_examples = 64
        phases = [Phase(SMOKE, one.looking_share) for one in phases]
    base, of_teacher, of_student = phases

    torch.manual_seed(0)
    task = make_task("scenes", instructions=False, picture_size=PICTURE_SIZE)
    problems = [task.problem("train", index) for index in range(600)]
    texts = [problem.prompt.replace(MARKER, "") + model_answer(problem) for problem in problems]
    tokenizer = make_tokenizer(texts)
    processor = make_processor(tokenizer)
    model = make_model(len(tokenizer))
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters, {len(tokenizer)} tokens")
    print(f"drawing {arguments.num_examples} scenes", flush=True)
    examples = make_examples(arguments.num_examples, processor)
    print("base", flush=True)
    train(model, examples, base, seed=0)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print("student", flush=True)
    train(model, examples, of_student, seed=1)
    save(model, processor, arguments.out / "student")
    model.load_state_dict(weights)
    print("teacher", flush=True)
    train(model, examples, of_teacher, seed=2)
    save(model, processor, arguments.out / "teacher")


if __name__ == "__main__":
    main()
