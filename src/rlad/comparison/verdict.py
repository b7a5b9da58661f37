"""The verdict of a report: which method is ahead, whether that is established, what it cost, and
what to do next. It claims no more than the interval of the difference shows."""

import math
from collections.abc import Iterator, Sequence

from rlad.comparison.figures import Method
from rlad.comparison.report_columns import difference, estimate
from rlad.runs.power import Spread, pilot_spread, problems_needed, seeds_needed, smallest_difference
from rlad.runs.statistics import Comparison, Estimate, compare

FEWEST_SEEDS = 3
LEVEL = 0.05
_MOST_SEEDS = 50
_MOST_PROBLEMS = 20_000
_SAME = 0.005
"""Smaller differences of shares are negligible."""


def verdict(methods: Sequence[Method], baseline: Method) -> Iterator[tuple[str, str]]:
    """Yield (topic, sentences); the first is the result."""
    best = max(methods, key=lambda m: m.after.mean)
    if len(methods) == 1:
        text = (
            f"{best.name} starts at {best.before.mean:.1%} of the test problems (pass@1) and "
            f"reaches {estimate(best.after)}, {_over(len(best.runs))}: a gain of "
            f"{points(best.gain)}. Without another method to compare with, this is no verdict on "
            "the method."
        )
        yield "", text
        return
    compared = [m for m in methods if m.to_baseline]
    ahead = [m for m in compared if _difference(m).low > 0]
    yield "", _result(methods, baseline, ahead)
    if len(compared) > 1 and (others := _others(compared, baseline, ahead[:1])):
        yield "The others.", others
    yield "What it cost.", _cost(max(ahead or [best], key=lambda m: m.after.mean), baseline)
    yield from _sight_and_next(methods, baseline, ahead)


def points(found: Estimate) -> str:
    """Return a difference of shares with its interval as text."""
    cell = difference(found)
    return f"{cell.text} points {cell.small}"


def _lead(found: Estimate) -> str:
    """Return by how much a method is ahead, as text."""
    low, high = 100 * found.low, 100 * found.high
    return f"{100 * found.mean:.1f} points [{low:.1f}, {high:.1f}]"


def _over(num_seeds: int) -> str:
    return f"over {num_seeds} seeds" if num_seeds > 1 else "with one seed"


def _difference(method: Method) -> Estimate:
    assert method.to_baseline is not None
    return method.to_baseline.difference


def _stands_apart(method: Method) -> bool:
    """Return whether the interval excludes 0."""
    found = _difference(method)
    return found.low > 0 or found.high < 0


def _doubt(method: Method) -> str:
    """Return why a difference whose interval excludes 0 is not established; "" if it is."""
    assert method.to_baseline is not None
    num_seeds = method.to_baseline.num_seeds
    if num_seeds < FEWEST_SEEDS:
        return f"{num_seeds} seed{'s' * (num_seeds > 1)} cannot show what other seeds would give"
    if not method.corrected_p < LEVEL:
        return (
            f"on these problems it may be due to chance (permutation test, corrected p = "
            f"{method.corrected_p:.3f})"
        )
    return ""


def _result(methods: Sequence[Method], baseline: Method, ahead: Sequence[Method]) -> str:
    """Say which method is ahead of the baseline, by how much, and whether that is established."""
    if not ahead:
        return _nobody_ahead(methods, baseline)
    first = max(ahead, key=lambda m: m.after.mean)
    assert first.to_baseline is not None
    num_seeds = first.to_baseline.num_seeds
    text = (
        f"{first.name} is ahead of {baseline.name} by {_lead(_difference(first))}: it solves "
        f"{estimate(first.after)} of the test problems (pass@1), {baseline.name} "
        f"{estimate(baseline.after)}, {_over(num_seeds)}."
    )
    if doubt := _doubt(first):
        text += f" This is a hint, not established: {doubt}."
    else:
        text += (
            " This is established for this task and these models: the interval over seeds and "
            "problems excludes 0."
        )
    return text


def _nobody_ahead(methods: Sequence[Method], baseline: Method) -> str:
    highest = max(m.after.mean for m in methods)
    tied = [m for m in methods if math.isclose(m.after.mean, highest, abs_tol=1e-12)]
    behind = [m for m in methods if m.to_baseline and _difference(m).high < 0]
    others = [m for m in methods if m is not baseline]
    if len(tied) > 1:
        text = (
            f"{_list(tied)} end at the same {tied[0].after.mean:.1%} of the test problems (pass@1)"
        )
    else:
        text = (
            f"{tied[0].name} has the highest mean, {estimate(tied[0].after)} of the test problems "
            "(pass@1)"
        )
    num_seeds = min(len(m.runs) for m in methods)
    text += f", {_over(num_seeds)}. "
    if len(behind) == len(others):
        return text + f"{baseline.name} is ahead of {_list(others)}."
    text += f"These data show no method ahead of {baseline.name}"
    closest = max(others, key=lambda m: m.after.mean)
    found = _difference(closest)
    if found.low > 0 or found.high < 0:
        return f"{text}."
    return f"{text}: the difference of {closest.name} is {points(found)}; its interval includes 0."


def _others(compared: Sequence[Method], baseline: Method, said: Sequence[Method]) -> str:
    """Say for each other method whether it is ahead, behind or not distinguishable."""
    kinds: dict[str, list[Method]] = {
        "also ahead of": [],
        "behind": [],
        "not distinguishable from": [],
    }
    shown = max(compared, key=lambda m: m.after.mean) if said else None
    for m in compared:
        if m is shown:
            continue
        kind = "not distinguishable from"
        if _stands_apart(m):
            kind = "also ahead of" if _difference(m).low > 0 else "behind"
        kinds[kind].append(m)
    parts = [
        f"{kind} {baseline.name}: " + ", ".join(f"{m.name} ({_shown(m)})" for m in found)
        for kind, found in kinds.items()
        if found
    ]
    text = "; ".join(parts)
    text = f"{text[:1].upper()}{text[1:]}." if text else ""
    if shown is not None and kinds["also ahead of"]:
        runner_up = max(kinds["also ahead of"], key=lambda m: m.after.mean)
        text += _against_runner_up(shown, runner_up)
    return text


def _shown(method: Method) -> str:
    doubt = ", a hint" if _stands_apart(method) and _doubt(method) else ""
    return f"{points(_difference(method))}{doubt}"


def _against_runner_up(first: Method, second: Method) -> str:
    found = _compared(first, second).difference
    if found.low > 0:
        return f" {first.name} is also ahead of {second.name}, by {_lead(found)}."
    return f" {first.name} and {second.name} are not distinguishable ({points(found)})."


def _compared(first: Method, second: Method) -> Comparison:
    return compare(first.pass_by_seed, second.pass_by_seed, first.keys, limits=(-1, 1))


def _cost(method: Method, baseline: Method) -> str:
    """Say what a run of a method costs, compared with a run of the baseline."""
    seconds = method.total_seconds
    text = f"A run of {method.name} trained for {seconds:,.0f} s"
    if method is not baseline and baseline.total_seconds:
        ratio = seconds / baseline.total_seconds
        times = "as long as" if round(ratio, 2) == 1 else f"{ratio:.2f} times as long as"
        text += f", {times} a run of {baseline.name}"
    tokens = sum(run.teacher_tokens for run in method.runs) / len(method.runs)
    if tokens > 0:
        text += f"; its teacher scored or wrote {tokens:,.0f} tokens"
    return f"{text} (without evaluation)."


# --- what the comparison could detect, and what to do ---------------------------------------------


def _sight_and_next(
    methods: Sequence[Method], baseline: Method, ahead: Sequence[Method]
) -> Iterator[tuple[str, str]]:
    others = [m for m in methods if m is not baseline]
    aim = max(ahead or others, key=lambda m: m.after.mean)
    assert aim.to_baseline is not None
    spread = spread_between(aim, baseline)
    num_problems = len(set(aim.keys))
    num_samples = aim.runs[0].after[0].num_samples
    if spread is None:
        yield (
            "Next.",
            "Train more seeds: with one seed the spread over seeds is unknown, and so is the "
            "difference that this comparison could have detected. `rlad compare --plan` shows how "
            "many seeds are needed.",
        )
        return
    num_seeds = aim.to_baseline.num_seeds
    least = smallest_difference(spread, num_seeds, num_problems, num_samples)
    problems = f"{len(aim.keys)} test problems"
    if num_problems < len(aim.keys):
        problems += f" of {num_problems} structures"
    yield (
        "What it could have detected.",
        f"With {num_seeds} seeds and {problems}, a true difference of "
        f"{100 * least:.1f} points between {aim.name} and {baseline.name} is detected in 4 of 5 "
        "such comparisons; smaller ones are missed more often.",
    )
    yield "Next.", _next(aim, baseline, spread, num_seeds, num_problems, num_samples)


def spread_between(method: Method, other: Method) -> Spread | None:
    """Estimate how much the difference of two methods varies over seeds and problems; None with
    fewer than two shared seeds or problems."""
    tables = [{run.seed: run for run in each.runs} for each in (method, other)]
    seeds = sorted(set(tables[0]) & set(tables[1]))
    if len(seeds) < 2 or len(method.keys) < 2:
        return None
    correct = [[[r.num_correct for r in table[s].after] for s in seeds] for table in tables]
    return pilot_spread(correct[0], correct[1], method.runs[0].after[0].num_samples)


def _next(
    aim: Method,
    baseline: Method,
    spread: Spread,
    num_seeds: int,
    num_problems: int,
    num_samples: int,
) -> str:
    """Recommend more seeds, more problems, or another method."""
    found = _difference(aim)
    if found.low > 0 and not _doubt(aim):
        return (
            f"Use {aim.name} for this task and these models. For another task or pair of models, "
            "compare again."
        )
    if abs(found.mean) < _SAME:
        return (
            "The two are practically equal here: a larger comparison would look for a negligible "
            "difference. Try another method, teacher or learning rate, or use the cheaper one."
        )
    seeds = seeds_needed(found.mean, spread, num_problems, num_samples)
    problems = problems_needed(found.mean, spread, num_seeds, num_samples)
    ways = []
    if seeds is not None and num_seeds < seeds <= _MOST_SEEDS:
        ways.append(f"{seeds} seeds instead of {num_seeds}")
    if problems is not None and num_problems < problems <= _MOST_PROBLEMS:
        # Several problems may have one structure, and only structures count.
        number = round(problems * len(aim.keys) / num_problems)
        ways.append(f"{number:,} test problems instead of {len(aim.keys)}")
    if num_seeds < FEWEST_SEEDS and not ways:
        ways.append(f"at least {FEWEST_SEEDS} seeds")
    if ways:
        return (
            f"If the true difference is the measured one ({difference(found).text} points), "
            f"{' or '.join(ways)} would establish it in 4 of 5 cases. The measured one may be due "
            "to chance: plan for the smallest that matters to you (`rlad compare --plan`)."
        )
    return (
        "Another method, teacher or learning rate is more promising than a larger comparison of "
        "these two."
    )


def _list(methods: Sequence[Method]) -> str:
    names = [m.name for m in methods]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
