"""The blocks that a privileged teacher is shown after the question, fitted to its context.

    question | skill | reference | metadata | solutions | wrong attempts | feedback | request

If a prompt is too long, first the middle of its longest solutions is cut, then whole blocks are
dropped from the end. The question, the request and the chat template's text always stay.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlad.config.context import ContextConfig
from rlad.models.pictures import MARKER
from rlad.rollouts.prompts import Prompt, in_place_of_question
from rlad.rollouts.texts import text_without_thoughts
from rlad.rollouts.types import Rollout
from rlad.seeds import stream_seed
from rlad.tasks import Problem
from rlad.tasks.base import SOLUTION
from rlad.teachers.base import TeacherRequest

Encode = Callable[..., Sequence[int]]
"""Returns the token ids of a prompt with its `pictures`."""


def encoded(encode: Encode, prompt: Prompt, problem: Problem) -> Sequence[int]:
    """Return the token ids of a prompt with the pictures of its problem, if there are any."""
    return encode(prompt, pictures=problem.images) if problem.images else encode(prompt)


MIN_PEER_TOKENS = 32
"""A completion is not cut below this length; instead a whole block is dropped."""
_CUT = "\n[...]\n"


@dataclass(frozen=True, slots=True)
class Block:
    """A heading and a text. `is_peer`: the text is another completion, which may be cut."""

    heading: str
    text: str
    is_peer: bool = False
    is_success: bool = False

    def __str__(self) -> str:
        return f"{self.heading}\n{self.text}" if self.heading else self.text


@dataclass(frozen=True, slots=True)
class Fitted:
    """The blocks that fit, and the token ids of the prompt with them."""

    blocks: tuple[Block, ...]
    token_ids: Sequence[int]
    num_shortened: int = 0
    num_dropped: int = 0

    @property
    def num_successes(self) -> int:
        return sum(block.is_success for block in self.blocks)


class BlockContext:
    """The maker of a teacher's prompts for a `[teacher.context]` section."""

    def __init__(
        self,
        settings: ContextConfig,
        *,
        seed: int,
        tokenizer: PreTrainedTokenizerBase,
        encode: Encode,
    ):
        self.settings = settings
        self._seed = seed
        self._tokenizer = tokenizer
        self._encode = encode
        self._special_tokens = _pattern_of_special_tokens(tokenizer)

    def fitted(self, request: TeacherRequest, room: int | None) -> Fitted | None:
        """Make the prompt for a completion, of at most `room` tokens; None if nothing can be
        shown."""
        if request.problem is None:
            return None
        whole = self._blocks(request)
        fitted = self._fit(request.problem, whole, room)
        num_successes = sum(block.is_success for block in whole)
        if num_successes and not (fitted and fitted.num_successes):
            # A correct solution does not fit: show what would be shown without one.
            without = self._blocks(request, with_successes=False)
            fitted = self._fit(request.problem, without, room)
            if fitted is not None:
                fitted = replace(fitted, num_dropped=fitted.num_dropped + num_successes)
        return fitted

    def _blocks(self, request: TeacherRequest, **wanted: Any) -> list[Block]:
        blocks = blocks_of(self.settings, request, seed=self._seed, plain=self._plain, **wanted)
        return [replace(block, text=self._plain(block.text)) for block in blocks]

    def _fit(self, problem: Problem, blocks: Sequence[Block], room: int | None) -> Fitted | None:
        limits = [each for each in (room, self.settings.max_prompt_tokens) if each is not None]
        return fit(
            blocks,
            encode=partial(self.token_ids, problem),
            room=min(limits, default=None),
            tokenizer=self._tokenizer,
        )

    def num_tokens(self, problem: Problem, tokens_per_peer: int) -> int:
        """Count the tokens of a prompt with everything that it may show except feedback, if each
        completion shown has `tokens_per_peer` tokens."""
        settings = self.settings
        blocks = [
            *_about_the_problem(settings, problem),
            *_success_blocks(settings, [""] * settings.num_successes),
            *_failure_blocks(settings, [""] * settings.num_failures),
        ]
        return len(self.token_ids(problem, blocks)) + tokens_per_peer * settings.num_peers

    def token_ids(self, problem: Problem, blocks: Sequence[Block]) -> Sequence[int]:
        """Return the token ids of the prompt with these blocks."""
        parts = [problem.question.strip(), *map(str, blocks), self.settings.texts.request]
        shown = in_place_of_question(problem, "\n\n".join(filter(None, parts)))
        return encoded(self._encode, shown, problem)

    def _plain(self, text: str) -> str:
        """Remove from a text what the tokenizer would read as the end of a message."""
        # Removing one may create another.
        while (plain := self._special_tokens.sub("", text)) != text:
            text = plain
        return text


def _pattern_of_special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    names = {*map(str, tokenizer.all_special_tokens), *(str(one) for one in added if one.special)}
    # A placeholder for a picture in a completion has no picture.
    names.add(MARKER)
    return re.compile("|".join(map(re.escape, sorted(names))))


def metadata_texts(problem: Problem) -> dict[str, str]:
    """Return the entries of a problem's metadata that can be shown: texts and numbers."""
    return {k: str(v) for k, v in problem.metadata.items() if isinstance(v, str | int | float)}


# --- which blocks ---------------------------------------------------------------------------------


def blocks_of(
    settings: ContextConfig,
    request: TeacherRequest,
    *,
    seed: int,
    plain: Callable[[str], str] = str,
    with_successes: bool = True,
) -> list[Block]:
    """Return the blocks to show for a completion; empty if nothing may be shown.

    The completion itself is never shown, nor another one with the same shown text. `plain` returns
    a completion's text as it is shown. Without `with_successes` the result is as if no other
    completion were correct.
    """
    problem = request.problem
    assert problem is not None, "a context is about a problem"
    own = request.rollout
    own_text = None if own is None else _shown_text(own, settings, plain)
    texts = [(peer, _shown_text(peer, settings, plain)) for peer in request.peers]
    candidates = [(peer, text) for peer, text in texts if text != own_text]
    if settings.choice == "random":
        stream = stream_seed(seed, "peers", *request.prompt, "/", *request.completion)
        random.Random(stream).shuffle(candidates)
    successes: list[str] = []
    if with_successes:
        successes = list(_different_texts(candidates, settings, is_success=True))
    failures = list(_different_texts(candidates, settings, is_success=False))

    blocks = [Block(settings.texts.skill, request.skill)] if settings.skill else []
    blocks += _about_the_problem(settings, problem)
    blocks += _success_blocks(settings, successes[: settings.num_successes])
    # Wrong attempts alone teach worst of all, so they are shown only together with something
    # correct, unless the settings ask for them.
    if (
        any(block.text for block in blocks)
        or not settings.num_successes
        or settings.without_success == "failures"
    ):
        blocks += _failure_blocks(settings, failures[: settings.num_failures])
    # Show what was wrong with the completion, but not its text: the teacher would repeat it.
    has_success = any(block.is_success for block in blocks)
    if settings.feedback and not has_success and own is not None and is_failure(own, settings):
        blocks.append(Block(settings.texts.feedback, own.feedback))
    return [block for block in blocks if block.text]


def _about_the_problem(settings: ContextConfig, problem: Problem) -> Iterator[Block]:
    if block := reference_block(settings, problem):
        yield block
    for name in settings.fields:
        if text := metadata_texts(problem).get(name):
            yield Block(f"{name.replace('_', ' ').capitalize()}:", text)


def reference_block(settings: ContextConfig, problem: Problem) -> Block | None:
    """Return the block of the reference solution or answer; None if not wanted or missing."""
    if settings.solution and (solution := metadata_texts(problem).get(SOLUTION)):
        return Block(settings.texts.solution, solution)
    if settings.answer and problem.answer:
        return Block(settings.texts.answer, problem.answer)
    return None


def _success_blocks(settings: ContextConfig, texts: Sequence[str]) -> Iterator[Block]:
    for number, text in enumerate(texts):
        heading = settings.texts.next_success if number else settings.texts.first_success
        yield Block(heading, text, is_peer=True, is_success=True)


def _failure_blocks(settings: ContextConfig, texts: Sequence[str]) -> Iterator[Block]:
    for text in texts:
        yield Block(settings.texts.failure, text, is_peer=True)


def _shown_text(rollout: Rollout, settings: ContextConfig, plain: Callable[[str], str]) -> str:
    """Return the part of a completion that may be shown; "" if none (an unfinished thought)."""
    text = rollout.text if settings.show_thoughts else text_without_thoughts(rollout)
    return plain(text).strip()


def _different_texts(
    peers: Sequence[tuple[Rollout, str]], settings: ContextConfig, *, is_success: bool
) -> Iterator[str]:
    """Yield the texts to show of successes or failures, each once."""
    belongs = is_successful if is_success else is_failure
    seen = {""}
    for peer, text in peers:
        if text not in seen and belongs(peer, settings):
            seen.add(text)
            yield text


def is_successful(rollout: Rollout, settings: ContextConfig) -> bool:
    return rollout.reward >= settings.success_reward


def is_failure(rollout: Rollout, settings: ContextConfig) -> bool:
    """Return whether a completion is wrong. One that could not be judged (NaN) is neither correct
    nor wrong."""
    if settings.failure_reward is not None:
        return rollout.reward <= settings.failure_reward
    return rollout.reward < settings.success_reward


# --- making them fit ------------------------------------------------------------------------------


def fit(
    blocks: Sequence[Block],
    *,
    encode: Callable[[Sequence[Block]], Sequence[int]],
    room: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Fitted | None:
    """Keep as much of `blocks` as fits into a prompt of `room` tokens; None if nothing fits."""
    for num_kept in range(len(blocks), 0, -1):
        fitted = _shorten(blocks[:num_kept], encode=encode, room=room, tokenizer=tokenizer)
        if fitted is not None:
            return replace(fitted, num_dropped=len(blocks) - num_kept)
    return None


def _shorten(
    blocks: Sequence[Block],
    *,
    encode: Callable[[Sequence[Block]], Sequence[int]],
    room: int | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Fitted | None:
    """Keep all blocks, with the longest completions cut in the middle if necessary; None if that is
    not enough."""
    ids = encode(blocks)
    if room is None or len(ids) <= room:
        return Fitted(tuple(blocks), ids)
    lengths = [_num_tokens(block.text, tokenizer) for block in blocks if block.is_peer]
    # A cut text is tokenized again and may have more tokens than were kept; then it is cut further.
    left = sum(lengths)
    cut = list(blocks)
    while len(ids) > room:
        left -= len(ids) - room
        cap = even_cap(lengths, left)
        if cap is None or cap < MIN_PEER_TOKENS:
            return None
        cut = [
            replace(block, text=cut_middle(block.text, cap, tokenizer)) if block.is_peer else block
            for block in blocks
        ]
        ids = encode(cut)
    changed = sum(one != other for one, other in zip(blocks, cut, strict=True))
    return Fitted(tuple(cut), ids, num_shortened=changed)


def even_cap(lengths: Sequence[int], total: int) -> int | None:
    """Return the largest cap with sum_i min(length_i, cap) <= total < sum_i length_i. None if the
    lengths sum to at most `total` already, or if `total` is too small for any cap.

    By hand: lengths 10, 50, 90 and total 100 give 45, as 10 + 45 + 45 = 100.
    """
    left = total
    # Start with the shortest: what it does not use of its even share goes to the others.
    for i, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - i)
        if length > share:
            return max(share, 0) or None
        left -= length
    return None


def cut_middle(text: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Keep the beginning and the end of a text, with about `num_tokens` tokens at most."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= num_tokens:
        return text
    kept = num_tokens - _num_tokens(_CUT, tokenizer)
    head = kept // 2
    begin = str(tokenizer.decode(ids[:head]))
    end = str(tokenizer.decode(ids[len(ids) - (kept - head) :]))
    return f"{begin.strip()}{_CUT}{end.strip()}"


def _num_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
