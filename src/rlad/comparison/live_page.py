"""The live page of a run: curves, guards, imitation map and completions, from the run directory
only. A small server from Python's standard library shows it on this machine."""

from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from rlad.comparison.imitation_map import FATES, MappedCompletion, latest_map
from rlad.comparison.report import Block, render_html
from rlad.comparison.report_columns import Cell, Table, number, share
from rlad.comparison.report_plots import Plot
from rlad.errors import RunFailedError
from rlad.runs.curve import draw_curve
from rlad.runs.directory import RunDirectory
from rlad.runs.rows import SampleRow
from rlad.runs.snapshot import Snapshot, duration, take_snapshot, version_of

REFRESH_SECONDS = 5
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")
_MOST_COMPLETIONS = 4
_MOST_WARNINGS = 10
_HEADLINES = {
    "training": "This run is training.",
    "finished": "This run is finished.",
    "stopped": "No process trains this run now.",
}


def render_live_page(snapshot: Snapshot) -> str:
    """Render the page of a snapshot. While the run trains, browsers reload it automatically."""
    refresh = REFRESH_SECONDS if snapshot.state != "finished" else 0
    return render_html(list(_blocks(snapshot)), refresh_seconds=refresh)


def _blocks(now: Snapshot) -> Iterator[Block]:
    yield Block("h1", now.run.path.resolve().name)
    yield Block("text", headline(now), "headline", lead=_HEADLINES[now.state])
    for text in now.history.damage:
        yield Block("text", f"{text}.", "warning", lead="A damaged row is left out.")
    for text in now.warnings[:_MOST_WARNINGS]:
        yield Block("text", text, "warning", lead="Guard.")
    if not now.warnings and now.step:
        yield Block("text", "No guard has warned.", "fine")
    if now.history.steps or now.history.evaluations:
        picture = draw_curve(now.run, form="svg")
        caption = (
            "pass@1 on held-out and training problems; shares of gated and clamped tokens; length."
        )
        yield Block("plots", [Plot("Curves", caption, "", picture, is_wide=True)])
        yield Block("table", _table(now))
    yield Block("h2", f"What the student wrote in step {now.step}")
    completions = _completions(now.samples)
    if completions:
        yield Block("table", _fates_table(now))
        yield Block("completions", completions)
    for text in _texts(now.samples) if not completions else ():
        yield Block("text", text)


def headline(now: Snapshot) -> str:
    """Describe the run's progress, its results and its remaining time in a sentence or two."""
    text = f"Step {now.step} of {now.num_steps}"
    if now.state == "training" and now.seconds_left is not None and now.step < now.num_steps:
        text += f", about {duration(now.seconds_left)} left (evaluations come on top)"
    text += f". {now.config.objective.type} on {now.config.task.type}"
    if now.validation:
        (first, *_), last = now.validation.items(), list(now.validation.items())[-1]
        text += f"; held-out pass@1 {first[1]:.1%} at step {first[0]}"
        text += f", {last[1]:.1%} at step {last[0]}" if last != first else ""
    return f"{text}."


def _table(now: Snapshot) -> Table:
    """Make the table of the most important figures, now and at the first step."""
    wanted = {
        "reward/mean": "mean reward",
        "rollout/completion_tokens/mean": "tokens of a completion",
        "rollout/truncated/frac": "share that was cut off",
        "student/entropy/mean": "entropy, nats",
        "optimization/gradient_norm": "length of the gradient",
        "teacher/log_ratio/mean": "log student - log teacher",
    }
    rows = []
    for key, name in wanted.items():
        values = list(now.values(key).values())
        if values:
            rows.append([Cell(name), number(values[0], ",.3g"), number(values[-1], ",.3g")])
    if now.seconds_per_step is not None:
        first = sum(v for k, v in now.history.steps[0].items() if k.startswith("time/"))
        cells = [number(first, ",.1f"), number(now.seconds_per_step, ",.1f")]
        rows.append([Cell("seconds of a step", "now: mean of the last steps"), *cells])
    return Table("Figures of a step", [("figure", ""), ("first step", ""), ("now", "")], rows)


def _completions(rows: Sequence[SampleRow]) -> list[MappedCompletion]:
    """Return the completions with a map, those with most tokens held back or protected first."""
    found = latest_map(rows)
    return sorted(found, key=lambda each: -each.gated_share)[:_MOST_COMPLETIONS]


def _fates_table(now: Snapshot) -> Table:
    fates = "".join(each.imitation.fates for each in latest_map(now.samples))
    columns = [("tokens", ""), *((fate.name, fate.meaning) for fate in FATES)]
    cells = [share(fates.count(fate.letter) / max(len(fates), 1)) for fate in FATES]
    return Table("All recorded tokens of the step", columns, [[Cell(f"{len(fates):,}"), *cells]])


def _texts(rows: Sequence[SampleRow]) -> Iterator[str]:
    for row in rows:
        yield row.prompt
        for rollout in row.rollouts[:_MOST_COMPLETIONS]:
            yield f"{rollout.verdict.replace('_', ' ')}: {rollout.text or ''}"


# --- server ---------------------------------------------------------------------------------------


class LivePageServer(ThreadingHTTPServer):
    """The server of one run's page, on this machine only. It serves nothing else."""

    daemon_threads = True

    def __init__(self, run: RunDirectory, port: int):
        self.run = run
        self._lock = Lock()
        self._version: tuple[object, ...] = ()
        self._page = b""
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise RunFailedError(
                f"port {port} of 127.0.0.1 cannot be used ({error.strerror}); give another --port, "
                "or 0 for a free one."
            ) from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def page(self) -> bytes:
        """Return the page, rendered again only if the run's files have changed."""
        with self._lock:
            version = version_of(self.run)
            if version != self._version:
                self._page = render_live_page(take_snapshot(self.run)).encode()
                self._version = version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: LivePageServer

    def do_GET(self) -> None:
        # A foreign page could reach this one through a host name that resolves to this machine.
        name = (self.headers.get("Host") or "").rpartition(":")[0]
        if name not in _LOCAL_NAMES or self.path != "/":
            self.send_error(404)
            return
        page = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal belongs to the run."""
