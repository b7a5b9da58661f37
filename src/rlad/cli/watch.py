"""`rlad watch`: show a run while it trains, in the terminal or as a local web page."""

import itertools
import textwrap
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlad.cli.printing import print_line
from rlad.runs.directory import RunDirectory
from rlad.runs.snapshot import Snapshot, duration, take_snapshot, version_of
from rlad.text import printable

_BARS = "▁▂▃▄▅▆▇█"
_POLL_SECONDS = 1.0
_CURVES = {
    "reward": "reward/mean",
    "completion tokens": "rollout/completion_tokens/mean",
    "entropy": "student/entropy/mean",
    "gated, advantage > 0": "objective/gated_positive/frac",
    "gated, advantage < 0": "objective/gated_negative/frac",
}
_SHARES = ("held-out pass@1", "gated, advantage > 0", "gated, advantage < 0")
_LOOK = {
    "training": ("training", "green"),
    "finished": ("finished", "bold green"),
    "stopped": ("stopped: no process is training it", "yellow"),
}
_VERDICTS = {"correct": "green", "wrong": "red", "cannot_judge": "yellow"}


def watch_run(path: Path, *, once: bool, page: bool, port: int) -> None:
    """Show a run until it is finished or the user stops. In a pipe, or with `once`, show its
    present state and return."""
    run = RunDirectory(path)
    snapshot = take_snapshot(run)
    console = Console(highlight=False)
    if page:
        _serve_page(console, run, port)
    elif once or not console.is_terminal:
        # A pipe has no height, so nothing is cut.
        height = console.height if console.is_terminal else 10_000
        console.print(render(snapshot, console.width, height))
    else:
        _follow(console, run, snapshot)


def _follow(console: Console, run: RunDirectory, snapshot: Snapshot) -> None:
    version = None
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while True:
                if version != (version := version_of(run)):
                    snapshot = take_snapshot(run)
                live.update(render(snapshot, console.width, console.height), refresh=True)
                if snapshot.state == "finished":
                    break
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            pass  # ends the view only; the run continues
    if snapshot.state == "training":
        print_line(console, "The run continues; `rlad watch` shows it again.")


def _serve_page(console: Console, run: RunDirectory, port: int) -> None:
    from rlad.comparison.live_page import LivePageServer

    with LivePageServer(run, port) as server:
        print_line(console, f"{server.address}   (this machine only; Ctrl-C closes it)")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
        except KeyboardInterrupt:
            print_line(console, "\nThe page is closed; the run is not affected.")
        finally:
            server.shutdown()


# --- what is shown --------------------------------------------------------------------------------


def render(now: Snapshot, width: int, height: int) -> RenderableType:
    """Lay out one screen: progress, curves, guards, and the last completions."""
    curves = _curves(now, max(20, width - 46))
    guards = _guards(now, width)
    num_lines = max(6, height - 12 - curves.row_count - len(guards))
    return Group(
        _head(now),
        Panel(curves, title="curves", title_align="left", border_style="dim"),
        *guards,
        Panel(
            _samples(now, width - 4, num_lines),
            title=f"step {now.step}: the last completions",
            title_align="left",
            border_style="dim",
        ),
    )


def _head(now: Snapshot) -> RenderableType:
    state, colour = _LOOK[now.state]
    title = Text.assemble(
        (printable(str(now.run.path)), "bold"),
        f"   {now.config.objective.type} on {now.config.task.type}   ",
        (state, colour),
    )
    left = f"step {now.step} of {now.num_steps}"
    if now.seconds_per_step is not None:
        left += f"   {now.seconds_per_step:.1f} s per step"
    if now.state == "training" and now.seconds_left:
        left += f"   about {duration(now.seconds_left)} left"
    bar = ProgressBar(total=max(now.num_steps, 1), completed=now.step, width=16)
    line = Table.grid(padding=(0, 2))
    line.add_row(bar, left)
    return Group(title, line)


def _curves(now: Snapshot, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    series = {"held-out pass@1": now.validation}
    series |= {name: now.values(key) for name, key in _CURVES.items()}
    for name, values in series.items():
        if values:
            found = list(values.values())
            form = ".1%" if name in _SHARES else ".3g"
            first, last = (f"{value:{form}}" for value in (found[0], found[-1]))
            table.add_row(name, first, Text(sparkline(found, width)), last)
    if not table.row_count:
        table.add_row("no step yet")
    return table


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as bars of text. Each bar is the mean of neighbouring values."""
    num = min(len(values), width)
    edges = [round(i * len(values) / num) for i in range(num + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    if high == low:
        return _BARS[3] * num
    return "".join(_BARS[round((m - low) / (high - low) * (len(_BARS) - 1))] for m in means)


def _guards(now: Snapshot, width: int) -> list[RenderableType]:
    lines = [printable(text) for text in now.warnings[:3]]
    lines += [f"{text}; the row is ignored" for text in now.history.damage]
    return [Text(f"! {line}", style="yellow", no_wrap=False) for line in lines]


def _samples(now: Snapshot, width: int, num_lines: int) -> Text:
    text = Text()
    for line, style in _sample_lines(now, width):
        if num_lines <= 0:
            break
        text.append("\n" * bool(text) + line, style)
        num_lines -= 1
    return text


def _sample_lines(now: Snapshot, width: int) -> Iterator[tuple[str, str]]:
    """Yield the prompt of the last step, and one of its completions for each verdict."""
    if not now.samples:
        yield "nothing yet", "dim"
        return
    row = now.samples[-1]
    yield from _wrapped(row.prompt.strip(), width, "bold")
    by_verdict: dict[str, list[str]] = {}
    for rollout in row.rollouts:
        by_verdict.setdefault(rollout.verdict, []).append(rollout.text or "")
    counts = ", ".join(f"{len(texts)} {_say(verdict)}" for verdict, texts in by_verdict.items())
    yield counts, "dim"
    for verdict, texts in sorted(by_verdict.items()):
        yield f"{_say(verdict)}:", _VERDICTS.get(verdict, "")
        yield from _wrapped(texts[0].strip(), width, "")


def _say(verdict: str) -> str:
    return verdict.replace("_", " ")


def _wrapped(text: str, width: int, style: str) -> Iterator[tuple[str, str]]:
    for line in printable(text).splitlines():
        for part in textwrap.wrap(line, width) or [""]:
            yield part, style
