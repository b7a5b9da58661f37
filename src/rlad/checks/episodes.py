"""Check whether a run's environment can be played. The first problems are played twice with each
seed; the turns consist of words that the environment itself has written."""

import random
import re
import time
from dataclasses import dataclass, field

from rlad.findings import Finding
from rlad.tasks import Problem, Task
from rlad.tasks.episodes import Environment, EpisodeFailed, EpisodeRules, Step

NUM_PROBLEMS = 3
MAX_TURNS = 8
_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class Played:
    """An episode that was played, possibly not to its end."""

    texts: list[str]
    steps: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    failure: str = ""
    """what went wrong in the turn after the last step"""

    @property
    def outcome(self) -> list[tuple[str, float, bool]]:
        return [(step.text, step.reward, step.done) for step in self.steps]


def check_episodes(task: Task, rules: EpisodeRules, *, seed: int) -> list[Finding]:
    """Play the first training problems. A failure is an error; a difference between two plays is a
    warning."""
    episodes: list[Played] = []
    for index in range(NUM_PROBLEMS):
        problem = task.problem("train", index, seed=seed)
        first, second = (play(rules, problem, seed=seed) for _ in range(2))
        if first.failure or second.failure:
            failed = first if first.failure else second
            message = (
                f"{task.name} fails in turn {len(failed.steps) + 1} of training problem {index}: "
                f"{failed.failure}; in training this costs the rollout"
            )
            return [Finding("error", "environment", message)]
        if first.texts[0] != problem.question:
            message = (
                f"{task.name} begins training problem {index} differently each time, but all "
                "rollouts of a group must begin with the same text: make it depend only on the "
                "problem"
            )
            return [Finding("error", "environment", message)]
        if first.outcome != second.outcome:
            message = (
                f"{task.name} is not the same twice with one seed (training problem {index}): a "
                "resumed run will not continue exactly; draw what is random from the seed that "
                "`reset` is given"
            )
            return [Finding("warning", "environment", message)]
        episodes.append(first)
    return [Finding("ok", "environment", _summary(task, rules, episodes))]


def _summary(task: Task, rules: EpisodeRules, episodes: list[Played]) -> str:
    rewards = [rules.judge(episode.steps).reward for episode in episodes]
    num_turns = sum(len(episode.steps) for episode in episodes)
    num_done = sum(episode.steps[-1].done for episode in episodes)
    each = sum(episode.seconds for episode in episodes) / num_turns
    return (
        f"{task.name}: {len(episodes)} training problems played with words of its own texts, "
        f"{num_turns} turns of {1000 * each:.0f} ms; the same twice with one seed; {num_done} came "
        f"to an end; rewards {min(rewards):g} to {max(rewards):g}"
    )


def play(rules: EpisodeRules, problem: Problem, *, seed: int) -> Played:
    """Play an episode, at most `MAX_TURNS` turns of it."""
    environment = rules.make()
    try:
        played = Played([environment.reset(problem, seed=seed)])
        _play_turns(environment, played, min(rules.max_turns, MAX_TURNS), random.Random(seed))
        return played
    except EpisodeFailed as failure:
        return Played([""], failure=str(failure))
    finally:
        environment.close()


def _play_turns(
    environment: Environment, played: Played, num_turns: int, rng: random.Random
) -> None:
    for _ in range(num_turns):
        # Games list the words that they know, so such turns sometimes have an effect.
        words = _WORD.findall(" ".join(played.texts)) or ["yes"]
        started = time.perf_counter()
        try:
            step = environment.step(rng.choice(words))
        except EpisodeFailed as failure:
            played.failure = str(failure)
            return
        played.seconds += time.perf_counter() - started
        played.steps.append(step)
        played.texts.append(step.text)
        if step.done:
            return
