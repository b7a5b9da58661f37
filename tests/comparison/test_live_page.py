"""`rlad watch`: the terminal's screen and the local page of a run, read from its files."""

import http.client
import threading

import pytest
from rich.console import Console

from report_runs import sample_row, write_run
from rlad.cli.watch import render, sparkline
from rlad.comparison.live_page import LivePageServer, render_live_page
from rlad.errors import RunFailedError, UserError
from rlad.runs.directory import RunDirectory
from rlad.runs.snapshot import duration, take_snapshot

EVIL = "<script>alert(1)</script>\x1b[31m"


@pytest.fixture
def run(tmp_path):
    row = sample_row(2, ["Yes", EVIL, "no"], "+h+", text=f"Yes {EVIL} no")
    row["rollouts"].append(
        {"tokens": ["bad"], "verdict": "wrong", "text": "bad", "imitation": None}
    )
    path = write_run(tmp_path / "run", correct=[1, 2], finished=False, samples=[row])
    return RunDirectory(path)


def screen(snapshot, width=90):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(snapshot, width, 40))
    return console.export_text()


def test_a_snapshot_knows_where_the_run_is(run):
    now = take_snapshot(run)
    assert (now.step, now.num_steps, now.state) == (2, 4, "stopped")
    assert now.seconds_per_step == pytest.approx(5.0)  # 2 + 0.5 + 1 + 1.5, of either step
    assert now.seconds_left == pytest.approx(10.0)
    with run.locked():
        assert take_snapshot(run).state == "training"


def test_the_screen_shows_curves_and_completions_and_nothing_steers_the_terminal(run):
    text = screen(take_snapshot(run))
    assert "step 2 of 4" in text and "stopped" in text and "reward" in text
    assert "1 correct, 1 wrong" in text and "\x1b[31m" not in text


def test_the_page_shows_the_map_and_escapes_what_the_model_wrote(run):
    page = render_live_page(take_snapshot(run))
    assert "held back" in page and 'http-equiv="refresh"' in page
    assert "<script>alert" not in page and "Step 2 of 4" in page


def test_a_finished_run_is_not_refreshed(tmp_path):
    run = RunDirectory(write_run(tmp_path / "run", correct=[1, 2]))
    page = render_live_page(take_snapshot(run))
    assert 'http-equiv="refresh"' not in page and "This run is finished." in page


def test_a_row_that_is_being_written_is_no_damage(run):
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    assert take_snapshot(run).step == 2 and not take_snapshot(run).history.damage


def test_the_server_gives_the_page_to_this_machine_and_nothing_else(run):
    with LivePageServer(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"

        def get(path, host=f"127.0.0.1:{port}"):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", path, headers={"Host": host})
            return connection.getresponse()

        assert get("/").status == 200
        for path in ("/config.toml", "/../run/config.toml", "//etc/passwd", "/?a"):
            assert get(path).status == 404
        assert get("/", host=f"evil.example:{port}").status == 404
        with pytest.raises(RunFailedError, match="give another --port"):
            LivePageServer(run, port)
        server.shutdown()


def test_no_run_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no run in"):
        take_snapshot(RunDirectory(tmp_path))


def test_sparklines_and_durations():
    assert sparkline([0, 1], 10) == "▁█"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([2, 2, 2], 3) == "▄▄▄"
    assert [duration(s) for s in (5, 65, 7260)] == ["5 s", "1 min 05 s", "2 h 01 min"]
