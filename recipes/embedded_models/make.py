"""Makes the embedded tokenizer, tiny teacher and tiny student: `python recipes/embedded_models/make.py --out src/rlad/models`.

Both models are pretrained from scratch on knights-and-knaves puzzles of the *training* split, each followed by text that the
solver below writes. The teacher reads careful worked solutions only. The student reads a mixture of three habits, as a base
model that has read the web does: careful solutions, sloppy ones (some statements are never looked at) and blind guesses.
Reinforcement learning can then teach it which habit pays.
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

END, PAD = "<|endoftext|>", "<|pad|>"
SIZES = {2: 1, 3: 3}  # number of people -> weight


@dataclass(frozen=True)
class Habits:
    """Shares of the ways of answering."""

    careful: float = 0.0
    sloppy: float = 0.0
    intuition: float = 0.0
    """the right answer, without any reasoning"""
    guess: float = 0.0
    """any answer"""


@dataclass(frozen=True)
class Recipe:
    """One model: its shape, what it reads and for how long."""

    num_layers: int
    habits: Habits
    num_steps: int
    seed: int
    hidden_size: int = 96
    num_heads: int = 4
    intermediate_size: int = 256
    batch_size: int = 32
    learning_rate: float = 4e-3


RECIPES = {
    "teacher": Recipe(num_layers=6, habits=Habits(careful=1.0), num_steps=1000, seed=0),
    "student": Recipe(num_layers=6, habits=Habits(careful=0.35, sloppy=0.25, guess=0.4), num_steps=1000, seed=100),
}


# --- what the models read ---------------------------------------------------------------------------------------------


def worked_solution(
    puzzle: Puzzle, names: list[str], rng: random.Random, is_looked_at: Callable[[int], bool] = lambda person: True
) -> str:
    """Try the worlds in random order; in each, hold the people's statements against it until one does not fit; answer with the
    first world in which all fit. A person that is not looked at is believed to fit.

    Random, because in a fixed order most claims are as true as in the line before: a model that copies learns nothing.
    """
    worlds = list(itertools.product((True, False), repeat=len(puzzle)))
    lines = []
    for world in rng.sample(worlds, len(worlds)):
        # Other words than in the claims, so that a tiny model does not confuse what is assumed with what is said.
        people = " ".join(f"{name} {'honest' if role else 'lying'}" for name, role in zip(names, world, strict=True))
        line, fits = f"Try {people}:", True
        for person, statement in enumerate(puzzle):
            if not is_looked_at(person):
                continue
            fits = statement.holds(world) == world[person]
            line += f" {names[person]}: {_claims(statement, world, names)} {'ok' if fits else 'bad'}."
            if not fits:
                break
        lines.append(line)
        if fits:
            return "\n".join([*lines, f"Answer: {answer_text(world, names)}."])
    raise AssertionError("every puzzle has a solution")


def _claims(statement: Statement, world: World, names: list[str]) -> str:
    """What is claimed and whether it is so in this world, such as `Ada knave no or Ben knight yes`."""
    claims = [f"{names[c.person]} {ROLES[c.is_knight]} {'yes' if c.holds(world) else 'no'}" for c in statement.claims]
    return f" {statement.connective} ".join(claims)


def examples(habits: Habits, seed: int) -> Iterator[tuple[str, str]]:
    """Endless (prompt, completion) pairs of the training split."""
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
                text = worked_solution(puzzle, names, rng, [rng.random() < 0.5 for _ in puzzle].__getitem__)
            case "intuition":
                text = f"Answer: {answer_text(solutions(puzzle)[0], names)}."
            case _:
                text = f"Answer: {answer_text(tuple(rng.random() < 0.5 for _ in names), names)}."
        yield prompt_text(puzzle, names, instructions=False), text


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: the words of the puzzles are single tokens, and any other text still round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    source = examples(Habits(careful=0.4, sloppy=0.3, intuition=0.3), seed=0)
    tokenizer.train_from_iterator(("".join(next(source)) for _ in range(4000)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


# --- pretraining ------------------------------------------------------------------------------------------------------


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(recipe.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
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


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids, labels) of examples of similar length; only completions are learned."""
    source, rng = examples(recipe.habits, recipe.seed + 1), random.Random(recipe.seed)
    while True:
        pairs = [next(source) for _ in range(recipe.batch_size * 16)]
        prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
        completions = tokenizer([completion + END for _, completion in pairs])["input_ids"]
        rows = sorted(zip(prompts, completions, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + recipe.batch_size] for i in range(0, len(rows), recipe.batch_size)]
        for chunk in rng.sample(chunks, len(chunks)):
            width = max(len(p) + len(c) for p, c in chunk)
            ids = torch.tensor([p + c + [tokenizer.pad_token_id] * (width - len(p) - len(c)) for p, c in chunk])
            labels = torch.tensor([[-100] * len(p) + c + [-100] * (width - len(p) - len(c)) for p, c in chunk])
            yield ids, labels


def pretrain(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Muon for the matrices, AdamW for embeddings and norms; warm-up, then cosine to 0. The model is saved every 100 steps."""
    model, source, started = build(recipe, tokenizer), batches(recipe, tokenizer), time.monotonic()
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=recipe.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for step in range(recipe.num_steps):
        ids, labels = next(source)
        scale = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / recipe.num_steps))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * scale
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{recipe.num_steps}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
            model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives teacher/ and student/")
    parser.add_argument("--only", choices=sorted(RECIPES), help="make one of the two")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; the result depends on it in the last digits")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    for name in [arguments.only] if arguments.only else RECIPES:
        print(f"{name}: {RECIPES[name]}", flush=True)
        tokenizer.save_pretrained(arguments.out / name)
        pretrain(RECIPES[name], tokenizer, arguments.out / name)


if __name__ == "__main__":
    main()
