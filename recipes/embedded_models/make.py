"""Makes the embedded tiny teacher, student and tokenizer: `python recipes/embedded_models/make.py --out src/rlad/models`.

Both models are pretrained from scratch on knights-and-knaves puzzles of the *training* split, each followed by text that the
solver below writes. The teacher sees careful worked solutions only. The student sees a mixture of three habits, as a base
model that has read the web does: careful ones, sloppy ones (people are taken at their word without a check) and straight
guesses. Both see puzzles of every size. Reinforcement learning can then teach the student *which habit pays*.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlad.tasks.logic import ROLES, Puzzle, Statement, World, answer_text, prompt_text, random_puzzle, solutions, structure_key
from rlad.tasks.logic import NAMES
from rlad.tasks.base import split_of

END, PAD = "<|endoftext|>", "<|pad|>"


# --- what the models read ---------------------------------------------------------------------------------------------


def worked_solution(puzzle: Puzzle, names: list[str], check: Callable[[int], bool] = lambda person: True) -> str:
    """Try the worlds in order; in each, check the people in order until one does not fit; answer with the first that fits.

    `check(person)` says whether a person's statement is really looked at: a sloppy solver believes some without looking.
    """
    lines = []
    for world in itertools.product((True, False), repeat=len(puzzle)):
        line, fits = "Try " + " ".join(f"{n} {ROLES[r]}" for n, r in zip(names, world)) + ":", True
        for person, statement in enumerate(puzzle):
            if not check(person):
                continue
            holds = statement.holds(world)
            fits = holds == world[person]
            line += f" {names[person]}{_claims(statement, world, names)} {_truth(holds)} {'ok' if fits else 'bad'}."
            if not fits:
                break
        lines.append(line)
        if fits:
            return "\n".join([*lines, f"Answer: {answer_text(world, names)}."])
    raise AssertionError("a puzzle has a solution")


def _truth(holds: bool) -> str:
    return "true" if holds else "false"


def _claims(statement: Statement, world: World, names: list[str]) -> str:
    """Each claim with its truth, joined as in the statement, such as `: Ada knave no or Ben knight yes,`."""
    if not QUOTE:
        if statement.connective == "is":
            return ""
        first, second = (_truth(claim.holds(world)) for claim in statement.claims)
        return f" {first} {statement.connective} {second}:"
    claims = [f" {names[c.person]} {ROLES[c.is_knight]} {'yes' if c.holds(world) else 'no'}" for c in statement.claims]
    return ":" + f" {statement.connective}".join(claims) + ","


import os
QUOTE = os.environ.get("QUOTE") == "1"


def guess(puzzle: Puzzle, names: list[str]) -> str:
    return f"Answer: {answer_text(solutions(puzzle)[0], names)}."


def sloppy_solution(puzzle: Puzzle, names: list[str], rng: random.Random) -> str:
    """A worked solution in which each person's statement is looked at only with probability one half."""
    looked_at = [rng.random() < 0.5 for _ in puzzle]
    return worked_solution(puzzle, names, check=lambda person: looked_at[person])


@dataclass(frozen=True)
class Habits:
    careful: float
    sloppy: float
    guess: float


def examples(sizes: dict[int, float], habits: Habits, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs of the training split."""
    rng = random.Random(seed)
    while True:
        (size,) = rng.choices(list(sizes), weights=list(sizes.values()))
        puzzle = random_puzzle(size, rng)
        if split_of(structure_key(puzzle)) != "train":
            continue
        names = rng.sample(NAMES, size)
        (habit,) = rng.choices(("careful", "sloppy", "guess"), weights=(habits.careful, habits.sloppy, habits.guess))
        if habit == "careful":
            text = worked_solution(puzzle, names)
        elif habit == "sloppy":
            text = sloppy_solution(puzzle, names, rng)
        else:
            text = guess(puzzle, names)
        yield prompt_text(puzzle, names, instructions=False), text


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: whole words of the puzzles are single tokens, and any other text still round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    source = examples({2: 1, 3: 1, 4: 1}, Habits(0.4, 0.3, 0.3), seed=0)
    tokenizer.train_from_iterator(("".join(next(source)) for _ in range(4000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


# --- pretraining ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    sizes: dict[int, float]
    habits: Habits
    num_steps: int
    batch_size: int = 64
    learning_rate: float = 2e-3
    seed: int = 0


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.num_layers,
            num_attention_heads=recipe.num_heads,
            num_key_value_heads=recipe.num_heads,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, report: Callable[[str], None]) -> LlamaForCausalLM:
    model = build(recipe, tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    source = examples(recipe.sizes, recipe.habits, recipe.seed + 1)
    warmup, started = 100, time.monotonic()
    buffer: list[tuple[list[int], int]] = []
    for step in range(recipe.num_steps):
        if not buffer:  # batches of similar length: less padding
            pairs = [next(source) for _ in range(recipe.batch_size * 16)]
            heads = tokenizer([p for p, _ in pairs])["input_ids"]
            tails = tokenizer([c for _, c in pairs])["input_ids"]
            buffer = sorted(((h + t + [tokenizer.eos_token_id], len(h)) for h, t in zip(heads, tails)), key=lambda r: len(r[0]))
            chunks = [buffer[i : i + recipe.batch_size] for i in range(0, len(buffer), recipe.batch_size)]
            random.Random(step).shuffle(chunks)
            buffer = [row for chunk in chunks for row in chunk]
        rows, buffer = buffer[: recipe.batch_size], buffer[recipe.batch_size :]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for i, (row, prompt_length) in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            labels[i, prompt_length : len(row)] = torch.tensor(row[prompt_length:])
        scale = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps)) + 1e-3
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * scale
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            report(f"step {step + 1}/{recipe.num_steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s")
    return model
