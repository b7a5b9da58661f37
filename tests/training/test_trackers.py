"""TensorBoard, trackio and Weights & Biases hold what the run directory holds, also of a run that
was stopped and resumed."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

import rlad
import rlad.training.run
from rlad.checks.check import check_run
from rlad.cli.main import main
from rlad.config.file import parse_config
from rlad.engines.base import StepResult
from rlad.errors import RunFailedError, UserError
from rlad.runs.directory import RunDirectory
from rlad.stopping import StopRequested
from rlad.training.trackers import TRACKERS
from running_servers import wait_for
from tiny_runs import rlad_fails, run_config, write_config, write_world

SECRET = "wandb-v1-0123456789abcdef"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


class StopAfter(rlad.training.reporter.Reporter):
    def __init__(self, step: int):
        self.at = step

    def step(self, result: StepResult, num_steps: int) -> None:
        if result.step == self.at:
            raise StopRequested(2)


def tracked_config(world: Path, run_dir: Path, tracker: str, **sections: Any) -> dict[str, Any]:
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"the optional package {tracker} is not installed")
    return run_config(world, run_dir, logging={"trackers": [tracker]}, **sections)


def train_with_a_stop(config: dict[str, Any]) -> Path:
    """Stopped behind step 3, then resumed to the end at 4."""
    with pytest.raises(StopRequested):
        rlad.train(config, reporter=StopAfter(3))
    time.sleep(1)  # W&B's folders on disk are named by the second
    return rlad.train(config, resume=True).run_dir


def recorded(run_dir: Path) -> dict[tuple[str, int], float]:
    """(name, step) -> figure, as the run directory has them and as trackers are to have them."""
    run = RunDirectory(run_dir)
    steps = {
        (k, row["step"]): v
        for row in run.read("metrics.jsonl")
        for k, v in row.items()
        if k != "step"
    }
    tests = {
        (f"{row['split']}/pass@1/{reduction}", row["step"]): row["pass@1"][reduction]
        for row in run.read("eval.jsonl")
        for reduction in ("mean", "low", "high")
    }
    return steps | tests


def completions_at(run_dir: Path, step: int) -> list[dict[str, Any]]:
    [row] = [row for row in RunDirectory(run_dir).read("samples.jsonl") if row["step"] == step]
    return [
        {"prompt": row["prompt"], "completion": r["text"], "verdict": r["verdict"]}
        for r in row["rollouts"]
    ]


@pytest.mark.trackers
def test_tensorboard_reads_what_the_run_directory_holds(world, tmp_path):
    run_dir = train_with_a_stop(tracked_config(world, tmp_path / "run", "tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    ).Reload()
    tags: Any = events.Tags()
    found = [
        (tag, event.step, event.value) for tag in tags["scalars"] for event in events.Scalars(tag)
    ]
    expected = recorded(run_dir)
    assert len(found) == len({(tag, step) for tag, step, _ in found}), "a figure stands there twice"
    assert {(tag, step): value for tag, step, value in found} == pytest.approx(expected, rel=1e-6)
    text = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("completions/text_summary")
    }
    assert sorted(text) == [2, 4]
    for sample in completions_at(run_dir, 4):
        assert (
            f"    {sample['prompt']}{sample['completion']}".rstrip() in text[4]
            and sample["verdict"] in text[4]
        )


@pytest.mark.trackers
def test_wandb_offline_holds_what_the_run_directory_holds(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    run_dir = train_with_a_stop(tracked_config(world, tmp_path / "run", "wandb"))
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))

    def is_whole(file: Path) -> bool:
        return "exit" in [record.WhichOneof("record_type") for record in scan(file)]

    wait_for(lambda: all(map(is_whole, files)), seconds=30)  # W&B's own process writes them
    records = [record for file in files for record in scan(file)]
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert len(runs) == 2 and len({run.run_id for run in runs}) == 1, (
        "the resumed run is another one"
    )
    assert {(run.project, run.display_name, run.host, run.git.remote_url) for run in runs} == {
        ("rlad", "run", "hidden", "")
    }
    found: dict[tuple[str, int], Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            found |= {
                (key, items["_step"]): value
                for key, value in items.items()
                if not key.startswith("_")
            }
    assert {step for key, step in found if key.startswith("completions/")} == {2, 4}
    assert {
        at: value for at, value in found.items() if not at[0].startswith("completions/")
    } == pytest.approx(recorded(run_dir))
    [table] = [
        json.loads(p.read_text()) for p in (run_dir / "wandb").rglob("completions_4_*.table.json")
    ]
    samples = completions_at(run_dir, 4)
    assert [row[:3] for row in table["data"]] == [list(sample.values()) for sample in samples]
    written = b"".join(
        path.read_bytes() for path in (run_dir / "wandb").rglob("*") if path.is_file()
    )
    for private in (SECRET, str(Path(sys.executable).parent), "safetensors==", Path(__file__).name):
        assert private.encode() not in written, private


def scan(file: Path) -> list[Any]:
    """The records of a W&B run: protocol buffers in a LevelDB log (blocks of 32 KiB; checksum 4,
    length 2, type 1 bytes)."""
    from wandb.proto import wandb_internal_pb2

    content, records, pieces, at = file.read_bytes(), [], b"", 7  # behind the file's own header
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length = int.from_bytes(content[at + 4 : at + 6], "little")
        kind = content[at + 6]
        pieces += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several pieces
            record: Any = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            records.append(record)
            pieces = b""
    return records


@pytest.mark.trackers
def test_trackio_holds_what_the_run_directory_holds(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_dir = train_with_a_stop(tracked_config(world, tmp_path / "run", "trackio"))
    import trackio  # pyright: ignore[reportMissingImports]
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    [run] = trackio.Api().runs("rlad")
    assert run.name.startswith("run-")
    rows = SQLiteStorage.get_logs("rlad", run.name)
    figures = {
        (key, row["step"]): value for row in rows for key, value in row.items() if "/" in key
    }
    assert figures == pytest.approx(recorded(run_dir))
    tables = {row["step"]: row["completions"]["_value"] for row in rows if "completions" in row}
    assert sorted(tables) == [2, 4]
    assert [
        {name: row[name] for name in ("prompt", "completion", "verdict")} for row in tables[4]
    ] == completions_at(run_dir, 4)


def test_a_package_that_is_missing_is_one_sentence(world, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *how: None if name == "wandb" else find_spec(name, *how),
    )
    config = write_config(
        tmp_path / "run.toml", run_config(world, tmp_path / "run", logging={"trackers": ["wandb"]})
    )
    sentence = (
        "logging.trackers = 'wandb' needs wandb, which is not installed; install it with: pip "
        "install 'rlad[wandb]'."
    )
    assert rlad_fails("train", config) == f"rlad: {sentence}"
    checked = CliRunner().invoke(main, ["check", "--without-models", str(config)])
    assert checked.exit_code == 2 and f"  ✗ trackers: {sentence}\n" in checked.stdout
    assert not (tmp_path / "run").exists()
    config = write_config(
        tmp_path / "run.toml",
        run_config(world, tmp_path / "run", logging={"trackers": ["tensorbord"]}),
    )
    assert "'tensorboard'" in rlad_fails("train", config)


def test_a_check_says_that_the_packages_are_there(world, tmp_path):
    report = check_run(
        parse_config(tracked_config(world, tmp_path / "run", "tensorboard")), with_models=False
    )
    (found,) = [finding for finding in report.findings if finding.subject == "trackers"]
    assert (found.level, found.message) == ("ok", "tensorboard: installed")
    report = check_run(parse_config(run_config(world, tmp_path / "run")), with_models=False)
    assert "trackers" not in [finding.subject for finding in report.findings]


class Breaks:
    """A tracker that fails at one step."""

    def __init__(self, config: Any, run: Any, identity: str, resumed_at: int | None):
        self.steps: list[int] = []

    def log(self, figures: Any, completions: Any, step: int) -> None:
        if step == 3:
            raise ConnectionError("no route\nto host")

    def close(self, *, failed: bool) -> None:
        assert failed


def test_a_tracker_that_fails_ends_the_run_with_a_checkpoint_and_it_goes_on_without(
    world, tmp_path, monkeypatch
):
    monkeypatch.setitem(TRACKERS, "tensorboard", Breaks)
    monkeypatch.setattr("rlad.training.run.require_trackers", lambda config: None)
    config = run_config(world, tmp_path / "run", logging={"trackers": ["tensorboard"]})
    with pytest.raises(
        RunFailedError, match=r"tracker 'tensorboard' failed at step 3 \(no route\); .* --resume"
    ):
        rlad.train(config)
    assert [row["step"] for row in RunDirectory(tmp_path / "run").read("metrics.jsonl")] == [
        1,
        2,
        3,
    ]
    rlad.train(config | {"logging": {"trackers": []}}, resume=True)
    assert [row["step"] for row in RunDirectory(tmp_path / "run").read("metrics.jsonl")] == [
        1,
        2,
        3,
        4,
    ]


class Unclosable(Breaks):
    """A tracker that cannot be closed."""

    def log(self, figures: Any, completions: Any, step: int) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        raise ConnectionError("no route")


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_tracker_that_cannot_be_closed_does_not_hide_how_the_run_ended(
    world, tmp_path, monkeypatch, is_stopped
):
    class Stops(rlad.training.reporter.Reporter):
        def step(self, result: StepResult, num_steps: int) -> None:
            if is_stopped:
                raise StopRequested(2)

    monkeypatch.setitem(TRACKERS, "tensorboard", Unclosable)
    monkeypatch.setattr("rlad.training.run.require_trackers", lambda config: None)
    config = run_config(world, tmp_path / "run", logging={"trackers": ["tensorboard"]})
    with pytest.raises(StopRequested if is_stopped else RunFailedError) as raised:
        rlad.train(config, reporter=Stops())
    if not is_stopped:
        assert str(raised.value).startswith("the run is finished and ")
        assert "tracker 'tensorboard' could not be closed (no route)" in str(raised.value)
        assert "--resume" not in str(raised.value)


class Closes(Breaks):
    """A tracker that counts how often it was closed."""

    closed: ClassVar[list[bool]] = []

    def log(self, figures: Any, completions: Any, step: int) -> None:
        pass

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


class CannotStart(Breaks):
    def __init__(self, *arguments: Any):
        raise ConnectionError("not logged in")


@pytest.mark.parametrize(
    ("first", "second", "error", "sentence", "closed"),
    [
        (Unclosable, Closes, RunFailedError, "could not be closed", [False]),
        (Closes, CannotStart, UserError, r"'wandb' cannot start \(not logged in\)", [True]),
    ],
)
def test_trackers_that_have_started_are_closed_whatever_another_does(
    world, tmp_path, monkeypatch, first, second, error, sentence, closed
):
    monkeypatch.setattr(Closes, "closed", [])
    monkeypatch.setitem(TRACKERS, "tensorboard", first)
    monkeypatch.setitem(TRACKERS, "wandb", second)
    monkeypatch.setattr("rlad.training.run.require_trackers", lambda config: None)
    trackers = {"trackers": ["tensorboard", "wandb"]}
    with pytest.raises(error, match=sentence):
        rlad.train(run_config(world, tmp_path / "run", logging=trackers))
    assert Closes.closed == closed
