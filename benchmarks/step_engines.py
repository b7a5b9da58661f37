"""The engines that `benchmarks/step.py` compares, each in a process of its own that makes one step
whenever it is told to.

TRL is set up as well as it can be on a CPU: float32, no gradient checkpointing, no logging, saving,
progress bar or telemetry, the same tokens per micro-batch (padding included) and threads as ours,
its own default optimiser (fused AdamW), no dropout, one optimiser step per rollout batch (so it
scores no old log-probs). Its trainer's set-up for each step is not timed.
"""

import os
import resource
import time
import warnings
from collections.abc import Callable, Iterator
from functools import wraps
from itertools import chain
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
from replay import Case, ReplayTask, Script, language_model, prompt_text, reward
from transformers.utils.logging import disable_progress_bar

from rlad.config.run import RunConfig
from rlad.engines.native.loop import NativeEngine
from rlad.engines.rollout_batch import RolloutBatch
from rlad.rollouts import decoders, sampling
from rlad.scoring.scorer import Scorer
from rlad.teachers.local import LocalTeacher

Seconds = dict[str, float]
PARTS = ("generation", "teacher", "rewards", "update", "rest")


class Turns:
    """Waits for its turn before every step and reports the step's seconds: by part, in total and of
    the processor."""

    def __init__(self, connection: Connection, num_steps: int):
        self.connection = connection
        self.num_steps = num_steps
        self.step = 0

    def begin(self) -> int:
        """The number of the step to make; its time runs from here."""
        self.connection.send("ready")
        self.connection.recv()
        self.step += 1
        self.started = time.perf_counter()
        self.used = time.process_time()
        return self.step - 1

    def end(self, seconds: Seconds) -> None:
        total = time.perf_counter() - self.started
        processor = time.process_time() - self.used
        seconds = {**dict.fromkeys(PARTS, 0.0), **seconds, "rest": total - sum(seconds.values())}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.connection.send(
            {**seconds, "total": total, "processor": processor, "peak_bytes": peak}
        )


def work(engine: str, case: Case, num_steps: int, connection: Connection) -> None:
    """The life of one process."""
    torch.set_num_threads(case.threads)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    ENGINES[engine](case, Turns(connection, num_steps))


# --- rlad -----------------------------------------------------------------------------------------


def _rlad(objective: str, without: str = "") -> Callable[[Case, Turns], None]:
    def run(case: Case, turns: Turns) -> None:
        engine = make_engine(case, objective, num_steps=turns.num_steps, without=without)
        script = Script(case)
        steps = engine.steps()
        script.replay_in_our_sampler()
        for number in range(turns.num_steps):
            script.start(number)
            turns.begin()
            result = next(steps)
            turns.end({part: result.metrics.get(f"time/{part}/seconds", 0.0) for part in PARTS})
            script.require_replayed(
                [list(r.completion.token_ids) for group in result.groups for r in group.rollouts]
            )

    return run


def make_engine(
    case: Case, objective: str = "trrd", *, num_steps: int = 1, without: str = ""
) -> NativeEngine:
    """rlad's engine with random models, `without` one of its measures (`MEASURES`) if one is
    named."""
    config = RunConfig.model_validate(
        {
            "student": {"model": "random"},
            "teacher": {"model": "random"} if objective != "grpo" else None,
            "task": {"type": "knights_and_knaves"},  # of which `ReplayTask` takes the place
            "objective": {"type": objective},
            "rollout": {
                "prompts_per_batch": case.num_prompts,
                "group_size": case.group_size,
                "max_completion_tokens": case.max_tokens,
                "max_batch_rows": case.num_rows,
            },
            "optimization": {"num_steps": num_steps, "tokens_per_batch": case.tokens_per_batch},
        }
    )
    teacher = None
    if objective != "grpo":
        model = language_model(case, seed=1, is_teacher=True)
        teacher = LocalTeacher(model, temperature=1.0, tokens_per_batch=case.tokens_per_batch)
    engine = NativeEngine(
        config, student=language_model(case, seed=0), task=ReplayTask(case), teacher=teacher
    )
    if without:
        MEASURES[without](engine)
    return engine


def _score_everything(engine: NativeEngine) -> None:
    def count_all(batch: RolloutBatch) -> None:
        choose_what_trains(batch)
        batch.trains = batch.counted

    choose_what_trains = engine.choose_what_trains
    engine.choose_what_trains = count_all


def _keep_finished_rows(engine: NativeEngine) -> None:
    decoders._COMPACT_SHARE = 2.0


def _prefill_each_row(engine: NativeEngine) -> None:
    sample = sampling.sample

    def one_by_one(
        model: Any, prompts: Any, *, group_size: int, after_group: Any, **options: Any
    ) -> None:
        groups = sample(
            model, [p for p in prompts for _ in range(group_size)], group_size=1, **options
        )
        rows = list(chain(*groups))
        for number in range(len(prompts)):
            after_group(number, rows[number * group_size : (number + 1) * group_size])

    sampling.sample = one_by_one


def _take_rows_as_they_come(engine: NativeEngine) -> None:
    """Micro-batches of as many rows as fit if each were as long as the longest, in the order of the
    rows."""

    def batches(self: Scorer, prompts: Any, completions: Any) -> list[list[int]]:
        longest = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
        size = max(1, self.tokens_per_batch // longest)
        return [list(range(len(prompts))[i : i + size]) for i in range(0, len(prompts), size)]

    Scorer.batches = batches


def _take_all_logits(engine: NativeEngine) -> None:
    assert isinstance(engine.teacher, LocalTeacher)
    engine.scorer.head = engine.teacher.scorer.head = None


MEASURES: dict[str, Callable[[NativeEngine], None]] = {
    "skipping": _score_everything,
    "dropping": _keep_finished_rows,
    "shared_prefill": _prefill_each_row,
    "sorting": _take_rows_as_they_come,
    "tiles": _take_all_logits,
}
"""What makes rlad fast, by name, and how each is switched off."""


# --- TRL ------------------------------------------------------------------------------------------


class Clock:
    """Seconds by part, of one step."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}

    def time(self, owner: Any, name: str, part: str) -> None:
        """Count what the method `name` of `owner` takes as `part`."""
        method = getattr(owner, name)

        @wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)

    def split(self) -> Seconds:
        """The update is what happens outside of `_prepare_inputs`, but for the teacher's forward
        pass."""
        seconds = self.seconds
        self.seconds = {}
        return seconds


def _trl_grpo(beta: float) -> Callable[[Case, Turns], None]:
    def run(case: Case, turns: Turns) -> None:
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer

        def rewards(completions: list[str], **_: Any) -> list[float | None]:
            return [reward(text) for text in completions]

        def build(folder: str, **common: Any) -> Any:
            own = {"beta": beta, "num_generations": case.group_size, "epsilon_high": 0.28}
            args = GRPOConfig(output_dir=folder, **common, **own)
            student = language_model(case, seed=0)
            _save_for_reference(student, folder)
            dataset = _dataset(case, turns, repeat=1)
            return GRPOTrainer(
                student.model,
                rewards,
                args=args,
                train_dataset=dataset,
                processing_class=student.tokenizer,
            )

        _serve(case, turns, build, teacher="ref_model" if beta else None)

    return run


def _trl_distillation(case: Case, turns: Turns) -> None:
    from trl.trainer.distillation_config import DistillationConfig
    from trl.trainer.distillation_trainer import DistillationTrainer

    def build(folder: str, **common: Any) -> Any:
        student = language_model(case, seed=0)
        teacher = language_model(case, seed=1, is_teacher=True)
        return DistillationTrainer(
            student.model,
            teacher.model,
            args=DistillationConfig(output_dir=folder, **common),
            train_dataset=_dataset(case, turns, repeat=case.group_size),
            processing_class=student.tokenizer,
        )

    _serve(case, turns, build, teacher="teacher_model")


def _dataset(case: Case, turns: Turns, *, repeat: int) -> Any:
    from datasets import Dataset

    prompts = range(turns.num_steps * case.num_prompts)
    return Dataset.from_dict(
        {"prompt": [prompt_text(case, i) for i in prompts for _ in range(repeat)]}
    )


def _save_for_reference(student: Any, folder: str) -> None:
    """TRL loads its reference model from where the student says it came from."""
    student.model.save_pretrained(folder)
    student.model.config._name_or_path = folder


def _serve(case: Case, turns: Turns, build: Callable[..., Any], *, teacher: str | None) -> None:
    """`trainer.train()` with a callback that waits for its turn before every step."""
    from transformers import PrinterCallback, TrainerCallback

    rows = max(1, case.tokens_per_batch // (case.prompt_tokens + case.max_tokens))
    rows = max(n for n in range(1, rows + 1) if case.num_rows % n == 0)
    with TemporaryDirectory() as folder:
        trainer = build(
            folder,
            max_steps=turns.num_steps,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=case.num_rows // rows,
            max_completion_length=case.max_tokens,
            learning_rate=1e-6,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            shuffle_dataset=False,
            report_to="none",
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        script = Script(case)
        clock = Clock()
        script.replay_in_generate(trainer.model)
        sampled: list[list[list[int]]] = []
        generate = trainer._generate_single_turn

        def checked(*args: Any, **kwargs: Any) -> Any:
            answer = generate(*args, **kwargs)
            sampled.append(answer[0] if isinstance(answer, tuple) else answer)
            return answer

        trainer._generate_single_turn = checked
        clock.time(trainer, "_generate_single_turn", "generation")
        clock.time(trainer, "_prepare_inputs", "prepare")
        if hasattr(trainer, "_calculate_rewards"):
            clock.time(trainer, "_calculate_rewards", "rewards")
        if teacher:
            model = getattr(trainer, teacher)
            # TRL's distillation calls the backbone, its reference model as a whole.
            clock.time(model if teacher == "ref_model" else model.base_model, "forward", "teacher")
        inside = ("generation", "rewards", *(("teacher",) if teacher == "ref_model" else ()))

        class Turn(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                script.start(turns.step)
                clock.split()
                turns.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                seconds = clock.split()
                total = time.perf_counter() - turns.started
                prepare = seconds.pop("prepare")
                within_update = 0.0 if teacher == "ref_model" else seconds.get("teacher", 0.0)
                seconds["update"] = total - prepare - within_update
                turns.end(seconds)
                assert prepare >= sum(seconds.get(part, 0.0) for part in inside)
                script.require_replayed(sampled[-1])

        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Turn())
        trainer.train()


ENGINES: dict[str, Callable[[Case, Turns], None]] = {
    "rlad trrd": _rlad("trrd"),
    "rlad grpo": _rlad("grpo"),
    "trl grpo": _trl_grpo(0.0),
    "trl grpo beta": _trl_grpo(0.04),
    "trl distillation": _trl_distillation,
    **{f"rlad trrd without {name}": _rlad("trrd", name) for name in MEASURES},
}


def environment() -> Iterator[tuple[str, str]]:
    """The environment variables of every engine's process."""
    yield "HF_HUB_OFFLINE", "1"
    yield "OMP_WAIT_POLICY", os.environ.get("OMP_WAIT_POLICY", "passive")
    yield "TRANSFORMERS_VERBOSITY", "error"
    yield "TOKENIZERS_PARALLELISM", "false"
