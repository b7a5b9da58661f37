"""What the benchmarks share: random models of a given shape, and completions that every engine
"samples" alike.

The work of decoding stays that of the engine. Before it picks its token from the logits of a step,
the scripted token's logit is set to a number that leaves the others no probability (one element per
row is written); the engine's own softmax, sampling, cache, padding and stopping follow. Prompts,
lengths, tokens and rewards of a step depend on the case and its number alone.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlad.models.loading import LanguageModel, remove_dropout
from rlad.rollouts import decoders
from rlad.tasks import Problem, Split
from rlad.tasks.base import Judgement, judged

PAD = 0
EOS = 1
FIRST_WORD = 2
CERTAIN = 1e9
MEDIAN_SHARE = 0.25
SIGMA = 0.8


@dataclass(frozen=True, slots=True)
class Case:
    """One setting of a benchmark. `long_tail` lengths are log-normal: median 1/4 of the cap, sigma
    0.8, cut at the cap."""

    vocabulary: int = 1000
    max_tokens: int = 256
    lengths: str = "long_tail"
    zero_variance: float = 0.0
    """share of the groups whose rewards are all equal"""
    num_prompts: int = 10
    group_size: int = 8
    prompt_tokens: int = 32
    hidden: int = 192
    layers: int = 4
    teacher_hidden: int = 192
    teacher_layers: int = 4
    family: str = "qwen3"
    tokens_per_batch: int = 4096
    threads: int = 2

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def title(self) -> str:
        return (
            f"{self.lengths} lengths up to {self.max_tokens}, zero variance "
            f"{self.zero_variance:.0%}, "
            f"vocabulary {self.vocabulary}, {self.num_prompts} x {self.group_size} completions"
        )


def random_model(case: Case, *, seed: int, is_teacher: bool = False) -> PreTrainedModel:
    """Student or teacher of a case on the CPU: tied embeddings, heads of 32, MLP three times as
    wide."""
    hidden, layers = (
        (case.teacher_hidden, case.teacher_layers) if is_teacher else (case.hidden, case.layers)
    )
    config_of: Any = CONFIG_MAPPING[case.family]
    config = config_of(
        vocab_size=case.vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=max(1, hidden // 64),
        head_dim=32,
        max_position_embeddings=case.prompt_tokens + case.max_tokens,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    remove_dropout(model)
    return model.eval()


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word for each token id: `w2` is token 2."""
    words = {"<pad>": PAD, "<eos>": EOS} | {f"w{i}": i for i in range(FIRST_WORD, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def language_model(case: Case, *, seed: int, is_teacher: bool = False) -> LanguageModel:
    model = random_model(case, seed=seed, is_teacher=is_teacher)
    return LanguageModel(
        "random", model, word_tokenizer(case.vocabulary), (EOS,), PAD, torch.float32
    )


def prompt_text(case: Case, index: int) -> str:
    numbers = np.random.default_rng([7, index]).integers(
        FIRST_WORD, case.vocabulary, case.prompt_tokens
    )
    return " ".join(f"w{i}" for i in numbers)


def completion_lengths(case: Case, step: int) -> list[int]:
    """End token included."""
    if case.lengths == "equal":
        return [case.max_tokens] * case.num_rows
    draws = np.random.default_rng([11, step]).lognormal(
        np.log(MEDIAN_SHARE * case.max_tokens), SIGMA, case.num_rows
    )
    return np.clip(np.rint(draws), 2, case.max_tokens).astype(int).tolist()


def scripted_completions(case: Case, step: int) -> list[list[int]]:
    """The completions of a step, group after group. The first token is even where the answer is
    right (`reward`)."""
    generator = np.random.default_rng([13, step])
    num_equal = round(case.zero_variance * case.num_prompts)
    is_equal = generator.permutation(np.arange(case.num_prompts) < num_equal)
    completions = []
    for row, length in enumerate(completion_lengths(case, step)):
        tokens = generator.integers(FIRST_WORD, case.vocabulary, length).tolist()
        is_right = is_equal[row // case.group_size] or row % 2
        tokens[0] = FIRST_WORD + (tokens[0] % 100) // 2 * 2 + (not is_right)
        if length < case.max_tokens or case.lengths == "equal":
            tokens[-1] = EOS
        completions.append(tokens)
    return completions


def reward(text: str) -> float:
    """1 for a completion whose first word has an even number, 0 for another."""
    return float(int(text.split(maxsplit=1)[0][1:]) % 2 == 0)


class ReplayTask:
    """The prompts of a case, judged by `reward`."""

    name = "replay"

    def __init__(self, case: Case):
        self.case = case

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        return Problem(prompt=prompt_text(self.case, index), answer="", key=str(index))

    def num_problems(self, split: Split) -> int | None:
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return judged(reward(completion) == 1)

    def close(self) -> None:
        pass


class Script:
    """The tokens of a step as `[row, token]`, end tokens behind each row's end."""

    def __init__(self, case: Case):
        self.case = case

    def start(self, step: int) -> None:
        self.completions = scripted_completions(self.case, step)
        self.tokens = torch.full((self.case.num_rows, self.case.max_tokens), EOS)
        for row, completion in enumerate(self.completions):
            self.tokens[row, : len(completion)] = torch.tensor(completion)
        self.lengths = torch.tensor([len(completion) for completion in self.completions])
        self.rows = torch.arange(self.case.num_rows)
        self.position = 0

    def replay_in_our_sampler(self) -> None:
        """From now on rlad's sampler samples the script. All rows must be decoded at once."""
        pick_tokens = decoders.pick_tokens

        @functools.wraps(pick_tokens)
        def pick_scripted(
            logits: Tensor, uniforms: Tensor, temperature: float
        ) -> tuple[Tensor, Tensor]:
            if len(logits) < len(self.rows):  # the sampler has dropped the rows that had finished
                self.rows = self.rows[self.lengths[self.rows] > self.position]
            logits.scatter_(1, self.tokens[self.rows, self.position, None], CERTAIN)
            self.position += 1
            return pick_tokens(logits, uniforms, temperature)

        decoders.pick_tokens = pick_scripted

    def replay_in_generate(self, model: Any) -> None:
        """From now on `model.generate` samples the script."""
        model.generate = functools.partial(
            model.generate, logits_processor=LogitsProcessorList([_Scripted(self)])
        )

    def require_replayed(self, completions: list[list[int]]) -> None:
        assert completions == self.completions, "the engine did not sample the scripted completions"


class _Scripted(LogitsProcessor):
    def __init__(self, script: Script):
        self.script = script

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # `scores` is generate's own copy of the logits.
        scores.scatter_(1, self.script.tokens[:, self.script.position, None], CERTAIN)
        self.script.position += 1
        return scores
