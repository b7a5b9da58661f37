"""How fast episodes of several turns are written, beside single answers of as many tokens.

    python benchmarks/turns.py --model embedded/student --engines native
    python benchmarks/turns.py --model smollm2-135m --engines native vllm     # needs vLLM

Each engine writes the same batch of episodes in an environment that replies with a line of text,
and the same number of single answers; they take turns, round by round, so what else the machine
does meets both. The first round is a warm-up and not counted. Turns are cut off at their limit, so
that both write the same number of tokens for certain models; the figures are tokens that the model
wrote a second, and the ratio of the two.
"""

import argparse
import os
import time
from contextlib import closing
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from rlad.config.run import RolloutConfig
from rlad.models.loading import LanguageModel, load_language_model
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.samplers import make_sampler
from rlad.rollouts.types import Sampler
from rlad.tasks import Problem, Split
from rlad.tasks.base import Judgement, judged
from rlad.tasks.episodes import Environment, EpisodeRules, Step

REPLY = "The door is still closed. You may look, push, pull or wait. What do you do now?\n"


class Door(Environment):
    """Never opens."""

    def reset(self, problem: Problem, *, seed: int) -> str:
        return problem.prompt

    def step(self, text: str) -> Step:
        return Step(REPLY)


class DoorTask:
    """A prompt of some sentences, as an episode or as a single question."""

    name = "door"

    def __init__(self, num_turns: int, max_turn_tokens: int):
        self.episode_rules = EpisodeRules(Door, num_turns, max_turn_tokens) if num_turns else None

    def problem(self, split: Split, index: int, *, seed: int = 0) -> Problem:
        return Problem(f"Room {index}. " + 4 * REPLY, "", str(index))

    def num_problems(self, split: Split) -> int | None:
        return None

    def judge(self, problem: Problem, completion: str) -> Judgement:
        return judged(False)

    def close(self) -> None:
        pass


def tokens_per_second(
    model: LanguageModel, sampler: Sampler, task: DoorTask, rollout: RolloutConfig, seed: int
) -> float:
    started = time.monotonic()
    groups = graded_groups(
        model,
        task,
        "train",
        range(rollout.prompts_per_batch),
        rollout=rollout,
        seed=seed,
        sampler=sampler,
    )
    seconds = time.monotonic() - started
    written = sum(one.completion.num_actions for group in groups for one in group.rollouts)
    return written / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="embedded/student")
    parser.add_argument("--engines", nargs="+", default=["native"], choices=("native", "vllm"))
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--num-turns", type=int, default=8)
    parser.add_argument("--max-turn-tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model = load_language_model(options.model)
    tasks = {
        "episodes": DoorTask(options.num_turns, options.max_turn_tokens),
        "single answers": DoorTask(0, 0),
    }
    print("| engine | episodes | single answers | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for engine in options.engines:
        rollout = RolloutConfig(
            engine=engine,
            prompts_per_batch=options.num_prompts,
            group_size=options.group_size,
            max_completion_tokens=options.num_turns * options.max_turn_tokens,
        )
        found: dict[str, list[float]] = {name: [] for name in tasks}
        with closing(make_sampler(model, rollout)) as sampler:
            for number in range(options.rounds + 1):
                for name, task in tasks.items():
                    speed = tokens_per_second(model, sampler, task, rollout, number)
                    if number:
                        found[name].append(speed)
        figures = [
            f"{median(speeds):.0f} ({min(speeds):.0f}-{max(speeds):.0f})"
            for speeds in found.values()
        ]
        ratio = median(a / b for a, b in zip(*found.values(), strict=True))
        print(f"| {engine} | {' | '.join(figures)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
