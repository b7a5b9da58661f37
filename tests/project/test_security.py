"""What rlad trusts: no pickle, no code of a model's, no path out of a run directory, and a key that
is seen nowhere."""

import ast
import json
import os
import pickle
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import rlad
from rlad.cli.main import main
from rlad.config.run import RolloutConfig
from rlad.models.loading import load_language_model
from rlad.models.without_weights import load_model_config, load_tokenizer
from rlad.rollouts.prompts import prompt_token_ids
from rlad.runs.checkpoints import damage, find_checkpoints
from tiny_runs import rlad_fails, run_config, write_config, write_tokenizer

SOURCES = sorted(Path(rlad.__file__).parent.rglob("*.py"))
CANARY = "c4n4ry-5ing5-7h3-k3y"


# --- nothing of ours runs what it reads ----------------------------------------------------------

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "yaml",
    "xmlrpc",
    "telnetlib",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "yaml.load",
    "torch.hub.load",
    "input",
}


def wrongs(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            yield from (name for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in FORBIDDEN_CALLS or (
                name == "torch.load" and given.get("weights_only") != "True"
            ):
                yield name
            for setting in ("shell", "trust_remote_code", "allow_pickle"):
                if given.get(setting, "False") != "False":
                    yield f"{name}({setting}={given[setting]})"
            if given.get("verify", "True") != "True":
                yield f"{name}(verify={given['verify']})"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(SOURCES[0].parent)))
def test_no_file_of_ours_runs_or_unpickles_what_it_reads(path):
    assert list(wrongs(ast.parse(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        *(
            "import pickle",
            "from dill import loads",
            "eval(x)",
            "torch.load(p)",
            "torch.load(p, weights_only=False)",
        ),
        *(
            "subprocess.run(c, shell=True)",
            "f(trust_remote_code=ask)",
            "np.load(p, allow_pickle=True)",
            "Client(verify=False)",
        ),
    ],
)
def test_what_would_be_found(code):
    assert len(list(wrongs(ast.parse(code)))) == 1


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_model_that_is_a_pickle_is_refused(world, tmp_path, name):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(world / "student", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
    sentence = rlad_fails(
        "train",
        write_config(
            tmp_path / "run.toml",
            run_config(world, tmp_path / "run", teacher={"model": str(folder)}),
        ),
    )
    assert (
        "has no *.safetensors file, and no other weights are read (a pickle may run code); convert"
        in sentence
    )
    with pytest.raises(ValueError, match="no causal language model can be loaded"):
        load_language_model(str(folder))
    assert not sprung.exists()


@pytest.mark.peft
def test_an_adapter_that_is_a_pickle_is_refused(world, tmp_path):
    pytest.importorskip("peft", reason="needs the optional package peft")
    folder, sprung = tmp_path / "adapter", tmp_path / "sprung"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(world / "student"),
        "target_modules": ["q_proj"],
        "r": 2,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(ValueError, match=r"its adapter_model\.safetensors cannot be read"):
        load_language_model(str(folder))
    assert not sprung.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("answer", ["n\n", "y\n"])
def test_code_of_a_model_is_never_run_and_nobody_is_asked(
    world, tmp_path, monkeypatch, file, answer
):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(world / "student", folder)
    code = f"import os\nos.mkdir({str(sprung)!r})\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    classes = {
        "AutoConfig": "evil.Evil",
        "AutoModelForCausalLM": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", "evil.Evil"],
    }
    table = json.loads((folder / file).read_text())
    table |= {"auto_map": classes, "tokenizer_class": "Evil"} | (
        {"model_type": "evil"} if file == "config.json" else {}
    )
    (folder / file).write_text(json.dumps(table))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    load = load_model_config if file == "config.json" else load_tokenizer
    with pytest.raises(
        ValueError, match="comes with Python code of its own, which rlad does not run"
    ):
        load(str(folder))
    with pytest.raises(ValueError, match="comes with Python code of its own"):
        load_language_model(str(folder))
    assert not sprung.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('SPRUNG') }}",
        "{% for i in range(10**9) %}a{% endfor %}",
        "{{ messages.append(1) }}",
        "{% include 'SPRUNG' %}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('\x1b[31mno') }}",
        "{% if %}",
    ],
)
def test_a_chat_template_is_in_a_sandbox(world, tmp_path, template):
    folder, sprung = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(world / "student", folder)
    write_tokenizer(folder, chat_template=template.replace("SPRUNG", str(sprung)))
    try:
        prompt_token_ids(load_tokenizer(str(folder)), "1 + 1 =", RolloutConfig())
    except ValueError as error:
        assert "the chat template of the student's tokenizer fails" in str(error)
    else:
        assert "__" in template  # what the sandbox hides is empty
    assert not sprung.exists()


# --- paths ---------------------------------------------------------------------------------------


def test_a_link_is_no_checkpoint(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000001").mkdir()
    (tmp_path / "checkpoints" / "step-000002").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoints" / "step-..").mkdir()
    assert [step for step, _ in find_checkpoints(tmp_path / "checkpoints")] == [1]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link", "inner/../../secret"])
def test_a_manifest_that_names_files_elsewhere_is_damage(tmp_path, name):
    checkpoint = tmp_path / "step-000001"
    checkpoint.mkdir()
    (tmp_path / "secret").write_text("x")
    (checkpoint / "link").symlink_to(tmp_path / "secret")
    (checkpoint / "manifest.json").write_text(
        json.dumps({"files": {name: {"size": 1, "sha256": "0" * 64}}})
    )
    assert damage(checkpoint) == f"{name} is outside of it"


def test_a_run_directory_cannot_send_writes_elsewhere(world, tmp_path):
    """The config in a run directory says where it was made; what counts is where it lies."""
    write_config(tmp_path / "config.toml", run_config(world, tmp_path / "elsewhere"))
    assert rlad.load_config(tmp_path).directory == tmp_path


# --- secrets -------------------------------------------------------------------------------------


class Echo(BaseHTTPRequestHandler):
    """Answers with a status and all headers of the request; records who came with the key."""

    status, location = 500, ""
    visits: list[str]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.visits.append(self.headers.get("Authorization", ""))
        said = {"error": {"message": f"no \x1b[31m, but you sent {self.headers}"}}
        content = (
            json.dumps(said).encode()
            if self.path.endswith("models")
            else f"you sent {self.headers}".encode()
        )
        self.send_response(self.status)
        if self.location:
            self.send_header("Location", self.location)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def echo_server(status: int, location: str = "") -> Iterator[tuple[str, list[str]]]:
    visits: list[str] = []
    handler = type("Handler", (Echo,), {"status": status, "location": location, "visits": visits})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", visits
    finally:
        server.shutdown()
        server.server_close()


def require_unseen(folder: Path, *results: Result) -> None:
    """The canary stands in no output, no traceback, and in no file."""
    for result in results:
        assert CANARY not in result.output and CANARY not in repr(result.exc_info), result.output
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RLAD_TEACHER_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, CANARY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://user:{CANARY}@127.0.0.1:9")


@pytest.mark.parametrize("status", [401, 403, 404, 400, 500, 503, 200])
def test_a_server_that_repeats_the_key_does_not_spread_it(world, tmp_path, key, status):
    with echo_server(status) as (url, visits):
        teacher = {
            "type": "served",
            "urls": [f"{url}/v1"],
            "model": "m",
            "num_retries": 1,
            "retry_pause_seconds": 0.01,
        }
        config = run_config(world, tmp_path / "run") | {"teacher": teacher}
        toml = write_config(tmp_path / "run.toml", config)
        results = [CliRunner().invoke(main, [verb, str(toml)]) for verb in ("check", "train")]
    assert [result.exit_code for result in results] == [2, 2] and f"Bearer {CANARY}" in visits
    assert all("\x1b" not in result.output for result in results)
    require_unseen(tmp_path, *results)


def test_the_key_does_not_follow_a_redirect(world, tmp_path, key):
    with echo_server(200) as (other, visits_of_other):
        for status in (301, 302, 307, 308):
            with echo_server(status, location=f"{other}/v1/models?key={CANARY}") as (url, visits):
                teacher = {"type": "served", "urls": [f"{url}/v1"], "model": "m", "num_retries": 0}
                toml = write_config(
                    tmp_path / "run.toml",
                    run_config(world, tmp_path / "run") | {"teacher": teacher},
                )
                result = CliRunner().invoke(main, ["check", str(toml)])
            assert (
                result.exit_code == 2
                and "redirects, which is not followed" in result.output
                and visits
            )
            require_unseen(tmp_path, result)
        assert visits_of_other == []


@pytest.mark.serve
def test_a_run_with_a_key_leaves_no_trace_of_it(world, tmp_path, key):
    pytest.importorskip("fastapi", reason="needs the optional package fastapi")
    from running_servers import server_thread

    model = load_language_model(str(world / "teacher"))
    with server_thread(model, api_key=CANARY, max_context_tokens=256) as server:
        teacher = {"type": "served", "urls": [server.url], "model": "tiny"}
        cached = {"type": "cached", "directory": str(tmp_path / "cache"), "teacher": teacher}
        config = run_config(world, tmp_path / "run", optimization={"num_steps": 2}) | {
            "teacher": cached
        }
        toml = str(write_config(tmp_path / "run.toml", config))
        report = ["report", str(tmp_path / "run"), "--output", str(tmp_path / "report")]
        commands = [["check", toml], ["train", toml], ["sample", toml], report]
        if "doctor" in main.commands:
            commands.append(["doctor", str(tmp_path / "run")])
        results = [CliRunner().invoke(main, command) for command in commands]
    assert [result.exit_code for result in results[:4]] == [0] * 4, [
        (result.output, result.exception) for result in results
    ]
    require_unseen(tmp_path, *results)


@pytest.mark.parametrize(
    "urls",
    [
        f'["http://user:{CANARY}@127.0.0.1:9/v1"]',
        f"http://user:{CANARY}@127.0.0.1:9/v1",
        f'{{a="http://u:{CANARY}@h/v1"}}',
    ],
)
def test_a_password_in_an_address_is_refused_unseen(world, tmp_path, urls):
    config = run_config(world, tmp_path / "run") | {
        "teacher": {"type": "served", "urls": ["http://127.0.0.1:9/v1"], "model": "m"}
    }
    toml = write_config(tmp_path / "run.toml", config)
    results = [
        CliRunner().invoke(main, [verb, str(toml), f"teacher.urls={urls}"])
        for verb in ("check", "train")
    ]
    assert all(result.exit_code == 2 and "teacher.urls" in result.output for result in results)
    require_unseen(tmp_path, *results)


def test_a_key_in_the_place_of_its_variable_is_refused_unseen(world, tmp_path):
    config = run_config(world, tmp_path / "run") | {
        "teacher": {"type": "served", "urls": ["http://127.0.0.1:9/v1"], "model": "m"}
    }
    toml = write_config(tmp_path / "run.toml", config)
    for setting in ("api_key_variable", "api_key"):
        result = CliRunner().invoke(main, ["train", str(toml), f"teacher.{setting}={CANARY}"])
        assert result.exit_code == 2
        require_unseen(tmp_path, result)


def test_torch_loads_nothing_but_weights(tmp_path):
    """What TRL's checkpoints rest on."""
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not (tmp_path / "sprung").exists()


# --- dependencies --------------------------------------------------------------------------------


def pins(text: str) -> dict[str, str]:
    """Package, as the index names it -> version."""
    return {
        name.lower().replace("_", "-"): version
        for name, version in re.findall(r"^([\w.-]+)==([^\s\\]+)", text, re.MULTILINE)
    }


def test_the_lock_file_holds_the_versions_of_the_constraints_and_a_hash_for_each():
    root = Path(__file__).parents[2]
    lock, constraints = (
        (root / "requirements.lock").read_text(),
        pins((root / "constraints.txt").read_text()),
    )
    locked = pins(lock)
    assert {name: constraints[name] for name in locked.keys() & constraints} == {
        name: locked[name] for name in locked.keys() & constraints
    }
    assert (
        "torch" not in locked
        and {"transformers", "safetensors", "fastapi", "math-verify", "peft"} <= locked.keys()
    )
    entries = re.split(r"^(?=[\w.-]+==)", lock, flags=re.MULTILINE)[1:]
    assert len(entries) == len(locked) and all(
        re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries
    )
    assert "://" not in lock and "--index" not in lock and "--find" not in lock
