"""Make the embedded tokenizer, tiny teacher and tiny student:

    python recipes/embedded_models/make.py --base /tmp/rlad-base --out src/rlad/embedded

One base model is pretrained from scratch on knights-and-knaves puzzles of the *training* split,
each followed by a worked solution that the solver below writes. The teacher continues with those.
The student continues with a mixture of three habits, as a base model has: careful solutions, sloppy
ones (some statements are never checked) and blind guesses. Reinforcement learning can then teach it
which habit pays.
"""

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlad.tasks.base import split_of
from rlad.tasks.logic import (
    NAMES,
    ROLES,
    Puzzle,
    Statement,
    World,
    answer_text,
    prompt_text,
    random_puzzle,
    solutions,
    structure_key,
)

END = "<|endoftext|>"
PAD = "<|pad|>"
# Other words than ROLES: what is assumed is not confused with what is said.
ASSUMED = {True: "honest", False: "lying"}
SIZES = {2: 1, 3: 3}  # number of people -> weight


@dataclass(frozen=True)
class Habits:
    """The shares of the ways of answering."""

    careful: float = 0.0
    sloppy: float = 0.0
    intuition: float = 0.0
    """the right answer, without any reasoning"""
    guess: float = 0.0
    """any answer"""


@dataclass(frozen=True)
class Phase:
    """A number of steps on one mixture of habits, with its own optimiser and schedule."""

    habits: Habits
    num_steps: int
    seed: int
    learning_rate: float
    batch_size: int = 32


BASE = Phase(Habits(careful=1.0), num_steps=700, seed=0, learning_rate=4e-3)
SECOND = {
    "teacher": Phase(Habits(careful=1.0), num_steps=400, seed=1, learning_rate=2e-3),
    "student": Phase(
        Habits(careful=0.3, sloppy=0.3, guess=0.4), num_steps=200, seed=2, learning_rate=2e-3
    ),
}


# --- what the models read ------------------------------------------------------------------------


def worked_solution(
    puzzle: Puzzle,
    names: list[str],
    rng: random.Random,
    is_looked_at: Callable[[int], bool] = lambda person: True,
) -> str:
    """Try the worlds in random order, check the people's statements in each until one does not fit,
    and answer with the first world in which all fit.

    A person that is not looked at is believed to fit. The order is random because in a fixed one
    most claims are as true as in the line before, and a model that copies learns nothing.
    """
    worlds = list(itertools.product((True, False), repeat=len(puzzle)))
    lines = []
    for world in rng.sample(worlds, len(worlds)):
        people = " ".join(
            f"{name} {ASSUMED[role]}" for name, role in zip(names, world, strict=True)
        )
        line = f"Try {people}:"
        fits = True
        for person, statement in enumerate(puzzle):
            if not is_looked_at(person):
                continue
            fits = statement.holds(world) == world[person]
            line += (
                f" {names[person]}: {_claims(statement, world, names)} {'ok' if fits else 'bad'}."
            )
            if not fits:
                break
        lines.append(line)
        if fits:
            return "\n".join([*lines, f"Answer: {answer_text(world, names)}."])
    raise AssertionError("every puzzle has a solution")


def _claims(statement: Statement, world: World, names: list[str]) -> str:
    """Write what is claimed, what is assumed and whether they agree, such as `Ada knave honest no
    or Ben knight honest yes`.

    The assumption is repeated before it is compared. Agreement alone is an exclusive or of two
    look-ups, of which neither helps without the other: a tiny model takes very long to find it.
    """
    claims = [
        f"{names[c.person]} {ROLES[c.is_knight]} {ASSUMED[world[c.person]]} "
        f"{'yes' if world[c.person] == c.is_knight else 'no'}"
        for c in statement.claims
    ]
    return f" {statement.connective} ".join(claims)


def examples(habits: Habits, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (prompt, completion) pairs of the training split without end."""
    rng = random.Random(seed)
    while True:
        (size,) = rng.choices(list(SIZES), weights=list(SIZES.values()))
        puzzle = random_puzzle(size, rng)
        if split_of(structure_key(puzzle)) != "train":
            continue
        names = list(NAMES[:size])
        (habit,) = rng.choices(list(asdict(habits)), weights=list(asdict(habits).values()))
        match habit:
            case "careful":
                text = worked_solution(puzzle, names, rng)
            case "sloppy":
                text = worked_solution(
                    puzzle, names, rng, [rng.random() < 0.5 for _ in puzzle].__getitem__
                )
            case "intuition":
                text = f"Answer: {answer_text(solutions(puzzle)[0], names)}."
            case _:
                text = f"Answer: {answer_text(tuple(rng.random() < 0.5 for _ in names), names)}."
        yield prompt_text(puzzle, names), text


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: the words of the puzzles are single tokens, and any other text still
    round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False
    )
    source = examples(Habits(careful=0.4, sloppy=0.3, intuition=0.3), seed=0)
    tokenizer.train_from_iterator(("".join(next(source)) for _ in range(4000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


# --- pretraining ---------------------------------------------------------------------------------


def build(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 96,
    num_layers: int = 6,
    num_heads: int = 4,
) -> Qwen2ForCausalLM:
    torch.manual_seed(BASE.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=8 * hidden_size // 3,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_heads,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    phase: Phase, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (token ids, labels) of examples of similar length; only completions are learned."""
    source = examples(phase.habits, phase.seed + 1)
    rng = random.Random(phase.seed)
    while True:
        pairs = [next(source) for _ in range(phase.batch_size * 16)]
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        completions = tokenizer([completion + END for _, completion in pairs])["input_ids"]
        rows = sorted(
            zip(prompts, completions, strict=True), key=lambda row: len(row[0]) + len(row[1])
        )
        chunks = [rows[i : i + phase.batch_size] for i in range(0, len(rows), phase.batch_size)]
        for chunk in rng.sample(chunks, len(chunks)):
            width = max(len(p) + len(c) for p, c in chunk)
            ids = torch.tensor(
                [p + c + [tokenizer.pad_token_id] * (width - len(p) - len(c)) for p, c in chunk]
            )
            labels = torch.tensor(
                [[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in chunk]
            )
            yield ids, labels


def pretrain(model: Qwen2ForCausalLM, phase: Phase, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train by Muon for the matrices and AdamW for the rest; warm-up, then cosine to 0."""
    source = batches(phase, tokenizer)
    started = time.monotonic()
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=phase.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for step in range(phase.num_steps):
        ids, labels = (each.to(model.device) for each in next(source))
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / phase.num_steps))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = phase.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}/{phase.num_steps}  loss {loss.item():.4f}  "
                f"{time.monotonic() - started:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder that receives teacher/ and student/"
    )
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        help="folder of the model that both start from; made when missing",
    )
    parser.add_argument("--only", choices=sorted(SECOND), help="make one of the two")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads of torch; the result depends on it in the last digits",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    if not (arguments.base / "config.json").is_file():
        print(f"base: {BASE}", flush=True)
        model = build(tokenizer)
        pretrain(model, BASE, tokenizer)
        model.save_pretrained(arguments.base)
    for name in [arguments.only] if arguments.only else SECOND:
        print(f"{name}: {SECOND[name]}", flush=True)
        model = Qwen2ForCausalLM.from_pretrained(arguments.base)
        pretrain(model, SECOND[name], tokenizer)
        model.save_pretrained(arguments.out / name)
        tokenizer.save_pretrained(arguments.out / name)


if __name__ == "__main__":
    main()
