"""The Slurm and the Kubernetes example: their syntax, and what they call."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from rlad.cli.main import main
from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.config.teacher import ServedTeacherConfig

CLUSTER = Path(__file__).parents[2] / "recipes" / "cluster"
SLURM, RAY_JOB = CLUSTER / "slurm.sbatch", CLUSTER / "rayjob.yaml"
RUN = """
[student]
model = "Qwen/Qwen3-8B"
[task]
type = "knights_and_knaves"
[teacher]
model = "Qwen/Qwen3-32B"
"""
SBATCH_OPTIONS = {
    "job-name": r"\S+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "exclusive": None,
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "signal": r"(B:)?[A-Z]+@\d+",
    "requeue": None,
    "open-mode": r"append|truncate",
    "output": r"\S+",
}
"""Of sbatch's long options those that the example uses, and what their values look like."""


def parsed(words: list[str]) -> tuple[click.Context, RunConfig]:
    """What our command line makes of `rlad WORDS...`, and the config that it would load; nothing is
    run."""
    command: Any = main
    while isinstance(command, click.Group):
        command = command.commands[words[0]]
        words = words[1:]
    context = command.make_context("rlad", words)
    arguments = context.params["arguments"]
    overrides = [argument for argument in arguments if "=" in argument]
    (path,) = [argument for argument in arguments if argument not in overrides]
    return context, load_config(path, overrides)


# --- Slurm ---------------------------------------------------------------------------------------


def test_bash_and_shellcheck_find_nothing():
    subprocess.run(["bash", "-n", SLURM], check=True)
    beside_python = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside_python) if beside_python.exists() else shutil.which("shellcheck")
    if shellcheck is not None:
        done = subprocess.run([shellcheck, SLURM], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_sbatch_knows_each_option():
    lines = SLURM.read_text().splitlines()
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    given = {}
    for i, line in enumerate(lines):
        if line.startswith("#SBATCH"):
            assert i < first_command, "sbatch reads no option behind the first command"
            match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line)
            assert match, line
            given[match[1]] = match[2]
    assert set(given) == set(SBATCH_OPTIONS)
    for name, value in given.items():
        form = SBATCH_OPTIONS[name]
        assert value is None if form is None else re.fullmatch(form, value or ""), name
    notice = int(given["signal"].partition("@")[2])
    text = SLURM.read_text()
    assert (
        int(re.findall(r"--shutdown-timeout (\d+)", text)[0])
        < notice
        < int(re.findall(r"-lt (\d+)", text)[0])
    )


STUB = """#!{python}
import json, os, sys, time
name = os.path.basename(sys.argv[0])
with open({log!r}, "a") as log:
    log.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "scontrol" and sys.argv[1] == "show":
    print("alpha\\nbeta\\ngamma")
if name == "curl":
    sys.exit(0 if "serve" in open({log!r}).read() else 22)
if name == "srun":
    if "serve" in sys.argv:
        time.sleep(30)
    sys.exit({code})
"""


def submit(
    folder: Path, *, seconds_left: int = 10_000, code: int = 0
) -> tuple[int, dict[str, list[str]]]:
    """The job's exit code and the last call of each program, on three hosts that only take note of
    what they are told."""
    bin_folder, log = folder / "bin", folder / "log"
    bin_folder.mkdir(exist_ok=True)
    for name in ("srun", "scontrol", "curl", "sleep"):
        (bin_folder / name).write_text(STUB.format(python=sys.executable, log=str(log), code=code))
        (bin_folder / name).chmod(0o755)
    (folder / "my_run.toml").write_text(RUN)
    variables = {
        "PATH": f"{bin_folder}:/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "rlad",
        "SLURM_CPUS_PER_TASK": "64",
        "SLURM_JOB_NODELIST": "alpha,beta,gamma",
        "SLURM_JOB_END_TIME": str(int(time.time()) + seconds_left),
        "RLAD_TEACHER_API_KEY": "secret",
    }
    done = subprocess.run(
        ["bash", SLURM, "my_run.toml"],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls: dict[str, list[str]] = {}
    for name, *words in map(json.loads, log.read_text().splitlines()):
        is_launcher = any(word.endswith("/torchrun") for word in words)
        key = "torchrun" if is_launcher else "vllm" if "serve" in words else name
        calls[key] = words
    return done.returncode, calls


def test_the_hosts_train_and_the_last_one_serves(tmp_path, monkeypatch):
    code, calls = submit(tmp_path)
    assert code == 0 and calls["scontrol"][0] == "show", "a run that has ended is not queued again"
    assert "--nodelist=gamma" in calls["vllm"]
    assert "--exclude=gamma" in calls["torchrun"] and "--nodes=2" in calls["torchrun"]
    start = calls["torchrun"].index("-m")
    launcher = calls["torchrun"][:start]
    assert launcher[launcher.index("--rdzv-endpoint") + 1] == "alpha:29500"
    module, *words = calls["torchrun"][start + 1 :]
    monkeypatch.chdir(tmp_path)
    context, config = parsed(words)
    assert (module, context.command.name) == ("rlad", "train") and not context.params["resume"]
    assert (config.run_dir, config.engine.type) == ("runs/slurm-rlad-7", "trl")
    assert isinstance(config.teacher, ServedTeacherConfig)
    assert config.teacher.urls == ("http://gamma:8000/v1",)
    served = calls["vllm"]
    assert config.teacher.model == served[served.index("--served-model-name") + 1]
    assert "secret" not in json.dumps(calls), "the key travels by the environment alone"


def test_a_job_that_was_stopped_is_queued_again_and_writes_into_the_same_folder(tmp_path):
    code, calls = submit(tmp_path, seconds_left=200, code=1)
    assert code == 1 and calls["scontrol"] == ["requeue", "7"]
    (tmp_path / "runs" / "slurm-rlad-7").mkdir(parents=True)
    (tmp_path / "runs" / "slurm-rlad-7" / "config.toml").write_text(RUN)
    _, again = submit(tmp_path)
    assert [word for word in again["torchrun"] if word != "--resume"] == calls["torchrun"]
    assert "--resume" in again["torchrun"]


def test_a_run_that_fails_is_not_queued_again(tmp_path):
    code, calls = submit(tmp_path, code=2)
    assert code == 2 and calls["scontrol"][0] == "show"


def test_torchrun_has_the_options():
    run: Any = pytest.importorskip("torch.distributed.run")
    known = {
        option for action in run.get_args_parser()._actions for option in action.option_strings
    }
    docs = SLURM.parents[2] / "docs"
    for file in (SLURM, docs / "trl.md", docs / "scaling.md"):
        text = file.read_text()
        launchers = re.findall(r"torchrun\"? (--.*?)-m rlad", text, flags=re.DOTALL)
        used = set(re.findall(r"--[a-z_-]+", " ".join(launchers)))
        assert used <= known and "--shutdown-timeout" in used


# --- Kubernetes ----------------------------------------------------------------------------------

JOB_FIELDS = {
    "entrypoint",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "backoffLimit",
    "rayClusterSpec",
}
GROUP_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
CONTAINER_FIELDS = {"name", "image", "env", "ports", "resources", "volumeMounts"}
"""Of RayJob v1 and of Kubernetes' containers those that the example uses."""


def test_the_ray_job_has_the_fields_of_ray_io_v1():
    job = yaml.safe_load(RAY_JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    assert set(job) == {"apiVersion", "kind", "metadata", "spec"} and set(job["spec"]) == JOB_FIELDS
    cluster = job["spec"]["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    (workers,) = cluster["workerGroupSpecs"]
    assert (
        set(workers) == GROUP_FIELDS
        and workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    )
    for group in (cluster["headGroupSpec"], workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), (
            "they are strings, also numbers"
        )
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert set(container) <= CONTAINER_FIELDS and {"name", "image"} <= set(container)
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }


def test_the_cluster_is_what_the_export_asks_for(tmp_path, monkeypatch):
    text = RAY_JOB.read_text()
    (command,) = re.findall(r"^# +rlad (.+)$", text, flags=re.MULTILINE)
    (tmp_path / "my_run.toml").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    context, _ = parsed(shlex.split(command))
    asked, job = context.params, yaml.safe_load(text)["spec"]
    (workers,) = job["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(
        workers["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    )
    assert asked["nodes"] + asked["teacher_nodes"] == workers["replicas"]
    assert asked["gpus_per_node"] == asked["teacher_gpus_per_node"] == gpus
    assert job["entrypoint"] == f"bash {asked['output']}/run.sh"
    mounts = {
        mount["mountPath"] for mount in workers["template"]["spec"]["containers"][0]["volumeMounts"]
    }
    assert os.path.dirname(asked["output"]) in mounts
    pinned = re.findall(
        r"^ray==(.+)$",
        (CLUSTER.parents[1] / "constraints-verl.txt").read_text(),
        flags=re.MULTILINE,
    )
    assert job["rayClusterSpec"]["rayVersion"] == pinned[0], (
        "Ray's own version is that of verl's environment"
    )
