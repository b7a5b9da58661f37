"""What the real vLLM samples for tiny students, on the CPU, in this process. A program for vLLM's
environment, which prints what it found as JSON:

PYTHON tests/vllm_samples.py CASE [FOLDER]
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rlad.config.run import LoraConfig, RolloutConfig, RunConfig
from rlad.engines.native import make_engine
from rlad.errors import RladError
from rlad.models.adapters import add_frozen_adapter, add_lora, save_adapter
from rlad.models.loading import LanguageModel
from rlad.models.student import load_student
from rlad.rollouts import vllm_sampler
from rlad.rollouts.grading import graded_groups
from rlad.rollouts.samplers import make_sampler, obstacle_to_vllm
from rlad.scoring.scorer import Scorer
from rlad.tasks import make_task
from rlad.training.run import train
from tiny_models import EOS, SECOND_EOS, tiny_language_model
from tiny_vision import picture, tiny_seeing_model

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
TEMPERATURE = 0.7
NUM_UPDATES = 20


def student(dtype: torch.dtype = torch.float32, **settings: Any) -> LanguageModel:
    """Its heads have 32 numbers, which vLLM's attention on the CPU can do."""
    shape = {"hidden_size": 128, "head_dim": 32, **settings}
    return tiny_language_model(dtype=dtype, eos_token_ids=(EOS, SECOND_EOS), **shape)


def sampler_of(model: LanguageModel, **settings: Any) -> Any:
    limits = {"max_prompt_tokens": 16, "max_completion_tokens": 24, "max_batch_rows": 64}
    rollout = {"engine": "vllm", "temperature": TEMPERATURE, **limits, **settings}
    return make_sampler(model, RolloutConfig.model_validate(rollout))


def move(model: LanguageModel, scale: float = 0.05) -> None:
    """An update of the trainable weights."""
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=scale)


def written(sampler: Any, *, seed: int = 1, group_size: int = 8, num_tokens: int = 24) -> list[Any]:
    return sampler.sample(
        PROMPTS,
        group_size=group_size,
        max_completion_tokens=num_tokens,
        temperature=TEMPERATURE,
        seed=seed,
    )


def distances(model: LanguageModel, groups: list[Any]) -> list[float]:
    """|log-prob of vLLM - log-prob of the trainer| of each token."""
    pairs = [(prompt, one) for prompt, group in zip(PROMPTS, groups, strict=True) for one in group]
    prompts, completions = zip(*pairs, strict=True)
    return distances_of(model, prompts, completions, TEMPERATURE)


def distances_of(
    model: LanguageModel, prompts: Any, completions: Any, temperature: float
) -> list[float]:
    scorer = Scorer(model, temperature=temperature, tokens_per_batch=4096)
    scores = scorer.score(prompts, [one.token_ids for one in completions])
    return [
        abs(ours - theirs)
        for row, one in zip(scores, completions, strict=True)
        for ours, theirs in zip(row.tolist(), one.logprobs, strict=True)
    ]


def after_updates(model: LanguageModel) -> dict[str, Any]:
    """Log-probs after each of many updates; then what the seed decides."""
    sampler = sampler_of(model)
    found: list[float] = []
    for _ in range(NUM_UPDATES):
        move(model)
        sampler.weights_changed()
        found += distances(model, written(sampler))
    same = written(sampler) == written(sampler)
    other = written(sampler) != written(sampler, seed=2)
    order: list[int] = []
    groups = sampler.sample(
        PROMPTS,
        group_size=3,
        max_completion_tokens=6,
        temperature=1.0,
        seed=0,
        after_group=lambda number, group: order.append(number),
    )
    sampler.close()
    return {
        "num_tokens": len(found),
        "mean": sum(found) / len(found),
        "max": max(found),
        "same_seed_same_tokens": same,
        "other_seed_other_tokens": other,
        "handed_on": sorted(order),
        "groups": [[asdict(one) for one in group] for group in groups],
    }


def tied() -> dict[str, Any]:
    return after_updates(student(tie_word_embeddings=True))


def pictures(family: str = "idefics3") -> dict[str, Any]:
    """Prompts with one, two and no pictures, of a tower that moves too and a student that often
    wants to write a placeholder."""
    # Its heads have a size that vLLM's attention on the CPU can do.
    model = tiny_seeing_model(family, head_dim=32)
    vision: Any = model.vision
    vision.keeps_features = False
    never = vision.placeholder_ids[0]
    here = vision.wrapped_token
    two = [picture(1), picture(2, (48, 32))]
    words = model.tokenizer("w23 w24", add_special_tokens=False)["input_ids"]
    prompts = [
        vision.prompt(f"{here} w20 w21", [picture(0)], add_special_tokens=False),
        vision.prompt(f"{here} w22 {here}", two, add_special_tokens=False),
        tuple(words),
    ]
    sampler = sampler_of(model, max_prompt_tokens=64)
    found: list[float] = []
    shares: list[float] = []
    drawn: set[int] = set()
    for _ in range(3):
        move(model)
        with torch.no_grad():
            # As likely as the likeliest token.
            logits = model.model(torch.tensor([words])).logits[0, -1]
            output: Any = model.model.get_output_embeddings()
            output.weight[never] = output.weight[logits.argmax()]
            logits = model.model(torch.tensor([words])).logits[0, -1]
            shares.append(float((logits / TEMPERATURE).softmax(dim=-1)[never]))
        sampler.weights_changed()
        groups = sampler.sample(
            prompts, group_size=8, max_completion_tokens=24, temperature=TEMPERATURE, seed=1
        )
        pairs = [(p, one) for p, group in zip(prompts, groups, strict=True) for one in group]
        written_ones = [one for _, one in pairs]
        found += distances_of(model, [p for p, _ in pairs], written_ones, TEMPERATURE)
        drawn |= {token for _, one in pairs for token in one.token_ids}
    sampler.close()
    try:  # its tower is trained
        sampler_of(model, vllm={"urls": ["http://127.0.0.1:1"]})
        servers = ""
    except RladError as error:
        servers = str(error)
    config: Any = model.model.config
    config.model_type = "mistral3"
    return {
        "num_tokens": len(found),
        "mean": sum(found) / len(found),
        "max": max(found),
        "share_of_placeholder": max(shares),
        "drawn": sorted(drawn & set(vision.placeholder_ids)),
        "servers": servers,
        "unknown": obstacle_to_vllm(model),
    }


def untied() -> dict[str, Any]:
    return after_updates(student())


def bfloat16() -> dict[str, Any]:
    return after_updates(student(torch.bfloat16))


def lora() -> dict[str, Any]:
    model = student()
    add_lora(model.model, LoraConfig(rank=4), base="tiny", seed=0)
    return after_updates(model)


def episodes() -> dict[str, Any]:
    """Several turns, of which each has a seed and a limit of its own; twice."""
    model = student()
    settings = {"prompts_per_batch": 6, "group_size": 3, "vllm": {"max_model_len": 128}}
    sampler = sampler_of(model, **settings)
    config = RolloutConfig.model_validate(
        {"temperature": TEMPERATURE, "max_completion_tokens": 24, **settings}
    )
    task = make_task("environment", path="tiny_environments:Adding", max_turns=4, max_turn_tokens=6)

    def play() -> list[Any]:
        return graded_groups(
            model, task, "train", range(6), rollout=config, seed=5, sampler=sampler
        )

    groups = play()
    again = play()
    sampler.close()
    rollouts = [one for group in groups for one in group.rollouts]
    prompts = [group.prompt_token_ids for group in groups for _ in group.rollouts]
    scorer = Scorer(model, temperature=TEMPERATURE, tokens_per_batch=4096)
    scores = scorer.score(prompts, [one.completion.token_ids for one in rollouts])
    return {
        "num_turns": [len(one.turns) for one in rollouts],
        "distances": [
            abs(ours - theirs)
            for row, one in zip(scores, rollouts, strict=True)
            for ours, theirs, is_action in zip(
                row.tolist(), one.completion.logprobs, one.completion.actions or (), strict=True
            )
            if is_action
        ],
        "same_again": [one.turns for one in rollouts]
        == [one.turns for group in again for one in group.rollouts],
    }


def asleep() -> dict[str, Any]:
    """When a sampler that sleeps does so: after a call, and after the last turn of a batch. Memory
    itself is given back on a GPU alone, so here the two calls of vLLM that do it are counted."""
    model = student()
    settings = {"prompts_per_batch": 2, "group_size": 2, "vllm": {"max_model_len": 128}}
    sampler = sampler_of(model, **settings)
    calls: list[str] = []
    sampler._sleeps = True
    sampler._llm.sleep = lambda level: calls.append("sleep")
    sampler._llm.wake_up = lambda tags=("all",): calls.extend(tags)
    config = RolloutConfig.model_validate(
        {"temperature": TEMPERATURE, "max_completion_tokens": 24, **settings}
    )
    task = make_task("environment", path="tiny_environments:Adding", max_turns=4, max_turn_tokens=6)
    played = []
    for _ in range(2):
        played += graded_groups(
            model, task, "train", range(2), rollout=config, seed=5, sampler=sampler
        )
        calls.append("played")
    found = distances(model, written(sampler))
    sampler.close()
    num_turns = [len(one.turns) for group in played for one in group.rollouts]
    return {"calls": calls, "num_turns": num_turns, "max": max(found)}


def without_remedy() -> dict[str, Any]:
    """The packed output layer stays as it was."""
    vllm_sampler.repack_tied_output_layer = lambda worker: None
    model = student(tie_word_embeddings=True)
    sampler = sampler_of(model)
    error = ""
    try:
        for _ in range(3):
            move(model)
            sampler.weights_changed()
            written(sampler)
    except RladError as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {"error": error}


def frequencies() -> dict[str, Any]:
    """How often each first token is sampled, and its probability under the trainer."""
    model = student()
    sampler = sampler_of(model)
    groups = written(sampler, group_size=4000, num_tokens=1)
    counts = torch.zeros(len(PROMPTS), 64)
    for row, group in enumerate(groups):
        for one in group:
            counts[row, one.token_ids[0]] += 1
    with torch.no_grad():
        logits = [model.model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS]
    probabilities = (torch.stack(logits) / TEMPERATURE).softmax(dim=-1)
    return {"counts": counts.tolist(), "probabilities": probabilities.tolist()}


def long_prompts() -> dict[str, Any]:
    """More tokens of prompts than vLLM takes at once."""
    model = student()
    sampler = sampler_of(model, max_prompt_tokens=200)
    prompts = [[3 + (i * j) % 60 for j in range(150)] for i in range(1, 9)]
    settings: dict[str, Any] = {"max_completion_tokens": 8, "temperature": 1.0, "seed": 0}
    groups = sampler.sample(prompts, group_size=8, **settings)
    return {"sizes": [len(group) for group in groups]}


def limits() -> dict[str, Any]:
    """What a call may ask for, and that a failed one leaves nothing behind."""
    sampler = sampler_of(student())
    ask: dict[str, Any] = {"max_completion_tokens": 4, "seed": 0, "group_size": 3}
    likeliest = sampler.sample(PROMPTS, temperature=0.0, **ask)
    try:
        sampler.sample([*PROMPTS, [5] * 60], temperature=1.0, **ask)
        too_long = ""
    except RladError as error:
        too_long = str(error)

    def stop(number: int, group: list[Any]) -> None:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        sampler.sample(PROMPTS, temperature=1.0, after_group=stop, **ask)
    left = sampler._llm.llm_engine.get_num_unfinished_requests()
    again = sampler.sample(PROMPTS, temperature=1.0, **ask)
    sampler.close()
    sampler.close()
    return {
        "different": [len({one.token_ids for one in group}) for group in likeliest],
        "too_long": too_long,
        "left": left,
        "sizes": [len(group) for group in again],
    }


def frozen_adapter() -> dict[str, Any]:
    """A student with an adapter of its own, and a teacher's on other layers."""
    model = student()
    own = LoraConfig(rank=4, target_modules=("q_proj",))
    add_lora(model.model, own, base="tiny", seed=0)
    with tempfile.TemporaryDirectory() as folder:
        other = student()
        add_lora(other.model, LoraConfig(rank=4), base="tiny", seed=1)
        save_adapter(other.model, Path(folder))
        add_frozen_adapter(model.model, folder)
    return after_updates(model)


def obstacles() -> dict[str, Any]:
    """Of students that vLLM cannot sample for, and what each setting makes of that."""
    small_heads = tiny_language_model()
    try:
        sampler_of(small_heads)
        refused = ""
    except RladError as error:
        refused = str(error)
    auto = sampler_of(small_heads, engine="auto")
    try:
        sampler_of(student(), vllm={"max_model_len": 100_000})
        too_long = ""
    except RladError as error:
        too_long = str(error)
    adapted = student(torch.bfloat16)
    add_lora(adapted.model, LoraConfig(rank=4), base="tiny", seed=0)
    # The keys and values of one such row take 128 GiB.
    length = 2**20
    wide: dict[str, Any] = {
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "num_hidden_layers": 8,
    }
    try:
        long = student(max_position_embeddings=length, **wide)
        sampler_of(long, vllm={"max_model_len": length})
        no_memory = ""
    except RladError as error:
        no_memory = str(error)
    return {
        "bfloat16_lora": obstacle_to_vllm(adapted),
        "experts": obstacle_to_vllm(tiny_language_model("mixtral", num_local_experts=2)),
        "heads": obstacle_to_vllm(small_heads),
        "fits": obstacle_to_vllm(student()),
        "refused": refused,
        "auto": [auto.name, auto.description],
        "too_long": too_long,
        "no_memory": no_memory,
    }


def run(folder: str) -> dict[str, Any]:
    """A whole run, and one that ends between two steps on a rollout batch and is resumed."""
    config = config_in(folder)
    samplers: list[str] = []
    metrics: list[list[dict[str, Any]]] = []
    for name, parts in (("whole", (4,)), ("resumed", (3, 4))):
        config["run_dir"] = f"{folder}/{name}"
        for num_steps in parts:
            config["optimization"]["num_steps"] = num_steps
            train(config, resume=num_steps != parts[0])
        rows_of = Path(folder, name, "metrics.jsonl").read_text().splitlines()
        metrics.append([json.loads(line) for line in rows_of])
        samplers.append(json.loads(Path(folder, name, "run.json").read_text())["sampler"])
    return {"metrics": metrics, "sampler": samplers}


def teacher_written(folder: str) -> dict[str, Any]:
    """The teacher writes what is trained on, the student what is evaluated."""
    table = config_in(folder) | {"objective": {"type": "sft", "rejection": False}}
    config = RunConfig.model_validate(table)
    task = make_task(**config.task.model_dump())
    engine = make_engine(config, load_student(config), task, before_work=lambda: None)
    with closing(engine):
        results = list(engine.steps())
        groups = [group for result in results for group in result.groups]
        prompts = [group.prompt_token_ids for group in groups for _ in group.rollouts]
        completions = [one.completion for group in groups for one in group.rollouts]
        own = engine.sampler.sample(
            PROMPTS, group_size=8, max_completion_tokens=12, temperature=1.0, seed=0
        )
        return {
            "writer": distances_of(engine.local_teacher.language_model, prompts, completions, 1.0),
            "student": distances_of(engine.student, PROMPTS, [group[0] for group in own], 1.0),
            "losses": [result.metrics["optimization/loss"] for result in results],
        }


def config_in(folder: str) -> dict[str, Any]:
    """A run with a student, a teacher and problems that are written into a folder."""
    for name, seed in (("student", 0), ("teacher", 1)):
        model = student(seed=seed)
        model.model.save_pretrained(f"{folder}/{name}")
        model.tokenizer.save_pretrained(f"{folder}/{name}")
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}", "answer": "w3"} for i in range(3, 40)]
    Path(folder, "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": {"model": f"{folder}/student"},
        "teacher": {"model": f"{folder}/teacher"},
        "task": {"type": "jsonl", "path": f"{folder}/problems.jsonl", "verifier": "exact"},
        "rollout": {
            "engine": "vllm",
            "prompts_per_batch": 4,
            "group_size": 4,
            "max_prompt_tokens": 16,
            "max_completion_tokens": 12,
            "max_batch_rows": 16,
        },
        "optimization": {
            "num_steps": 4,
            "steps_per_rollout_batch": 2,
            "learning_rate": 1e-3,
        },
        "objective": {"type": "opd"},
        "evaluation": {"every_steps": 4, "num_validation_problems": 4, "num_test_problems": 4},
    }


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    case.__name__: case
    for case in (
        tied,
        untied,
        bfloat16,
        lora,
        frozen_adapter,
        without_remedy,
        frequencies,
        long_prompts,
        episodes,
        asleep,
        limits,
        obstacles,
        pictures,
        run,
        teacher_written,
    )
}

if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    print(json.dumps(CASES[name](*arguments)))
