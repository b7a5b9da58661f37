"""Make a tiny student and a tiny teacher that play small boards of Sokoban:

    python recipes/sokoban-tiny/make.py --out runs/sokoban-tiny/models

The teacher is trained on games of the *training* boards in which a solver that knows the fewest
moves from every position plays. The student is the teacher after more training, on games of a
player in a hurry, who mostly walks to the box and pushes it whichever way that is, and now and
then plays as the solver does. Reinforcement learning can teach it which of the two wins.
"""

import argparse
import copy
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlad.tasks.base import Problem, split_of
from rlad.tasks.games.sokoban import SokobanGame
from rlad.tasks.games.sokoban_boards import (
    MOVES,
    Layout,
    Position,
    random_layout,
    random_position,
)

END = "<|endoftext|>"
PAD = "<|pad|>"
SIZE = 4
WALL_SHARE = 0.1
DEPTH = (2, 8)
MAX_DISTANCE = 20
"""a position that needs more moves counts as lost"""
MAX_TURNS = 12
SLIPS = 0.25
"""share of random moves in the games, from which the solver recovers"""
WORDS = (*MOVES, "You", "Ġcannot", "Ġmove")
"""one token each; Ġ is a space"""
IGNORED = -100
"""label of a token that is not learned"""


@dataclass(frozen=True)
class Training:
    """A number of steps of so many games each, with its own schedule."""

    num_steps: int
    seed: int
    hurry: float = 0.0
    """share of the moves to learn that the player in a hurry makes instead of the solver"""
    learning_rate: float = 6e-3
    batch_size: int = 64


TEACHER = Training(num_steps=800, seed=2)
STUDENT = Training(num_steps=100, seed=1, hurry=0.8, learning_rate=2e-3)
WEAKER_TEACHERS = {
    "teacher-hurry-0.2": replace(STUDENT, hurry=0.2),
    "teacher-hurry-0.4": replace(STUDENT, hurry=0.4),
}


# --- what the models read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What the game writes, the move that is made, and the move that is learned."""

    text: str
    move: str
    learned: str


def games(training: Training) -> Iterator[list[Turn]]:
    """Yield games of training boards without end."""
    rng = random.Random(training.seed)
    while True:
        layout = random_layout(SIZE, 1, WALL_SHARE, rng)
        start = random_position(layout, *DEPTH, rng)
        if start is not None and split_of(layout.key()) == "train":
            yield play(layout, start[0], training.hurry, rng)


def play(layout: Layout, position: Position, hurry: float, rng: random.Random) -> list[Turn]:
    """Play a game in which some moves slip, until it is solved, lost or long."""
    distance = layout.distances(MAX_DISTANCE)
    game = SokobanGame()
    board = layout.text(position)
    text = game.reset(Problem(board + "\n", "", "", metadata={"board": board}), seed=0)
    turns = []
    while distance.get(position) and len(turns) < MAX_TURNS:
        learned = rng.choice(layout.best_moves(position, distance))
        if hurry and rng.random() < hurry:
            learned = rng.choice(hasty_moves(layout, position))
        move = rng.choice(list(MOVES)) if rng.random() < SLIPS else learned
        turns.append(Turn(text, move, learned))
        text = game.step(move).text
        position = layout.moved(position, move) or position
    return turns


def hasty_moves(layout: Layout, position: Position) -> list[str]:
    """List the moves that push the box or, where none does, bring the player nearest to it."""
    (box,) = position.boxes
    after = {move: layout.moved(position, move) for move in MOVES}
    possible = {move: one for move, one in after.items() if one}
    pushes = [move for move, one in possible.items() if one.boxes != position.boxes]
    if pushes:
        return pushes
    far = {
        move: abs(one.player[0] - box[0]) + abs(one.player[1] - box[1])
        for move, one in possible.items()
    }
    return [move for move in far if far[move] == min(far.values())]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE in which each symbol of a board and each of a few words is one token.
    Any other text is read byte by byte."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([END, PAD, *bytes_])}
    merges = []
    for word in WORDS:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def encode(turns: list[Turn], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Return the tokens of a game, and what is learned at each: a move and the end of the turn,
    also where the move that was made is another, a slip."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        text = tokenizer(turn.text)["input_ids"]
        ids += [*text, *tokenizer(turn.move + END)["input_ids"]]
        labels += [IGNORED] * len(text) + tokenizer(turn.learned + END)["input_ids"]
    return ids, labels


# --- training ------------------------------------------------------------------------------------


def build(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=168,
            num_hidden_layers=4,
            num_attention_heads=2,  # of 32: vLLM has no smaller heads on the CPU
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(
    training: Training, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (token ids, labels) of games of similar length."""
    source = games(training)
    rng = random.Random(training.seed)
    size = training.batch_size
    while True:
        rows = sorted((encode(next(source), tokenizer) for _ in range(size * 8)), key=by_length)
        chunks = [rows[start : start + size] for start in range(0, len(rows), size)]
        for chunk in rng.sample(chunks, len(chunks)):
            width = len(chunk[-1][0])
            pad = tokenizer.pad_token_id
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in chunk]),
                torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in chunk]),
            )


def by_length(row: tuple[list[int], list[int]]) -> int:
    return len(row[0])


def train(model: Qwen2ForCausalLM, training: Training, tokenizer: PreTrainedTokenizerFast) -> None:
    """Train by Muon for the matrices and AdamW for the rest; warm-up, then cosine to 0."""
    source = batches(training, tokenizer)
    started = time.monotonic()
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    rate = training.learning_rate
    optimizers = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for step in range(training.num_steps):
        ids, labels = next(source)
        progress = step / training.num_steps
        scale = min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{training.num_steps}  loss {loss.item():.4f}  {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for teacher/ and student/")
    parser.add_argument(
        "--weaker-teachers", action="store_true", help=f"also {', '.join(WEAKER_TEACHERS)}"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()

    def trained(name: str, training: Training, model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
        print(f"{name}: {training}", flush=True)
        train(model, training, tokenizer)
        model.save_pretrained(arguments.out / name)
        tokenizer.save_pretrained(arguments.out / name)
        return model

    teacher = trained("teacher", TEACHER, build(tokenizer))
    trained("student", STUDENT, copy.deepcopy(teacher))
    if arguments.weaker_teachers:
        for name, training in WEAKER_TEACHERS.items():
            trained(name, training, copy.deepcopy(teacher))


if __name__ == "__main__":
    main()
