"""Train a run's TOML with TRL on several GPUs or hosts, with a served teacher; a file to change.

    torchrun --nproc-per-node 8 recipes/cluster/train_trl.py RUN.toml OUTPUT [KEY=VALUE]...

OUTPUT is TRL's folder; a job that is started again resumes from the last checkpoint there.
The TOML gives models, task, objective, rollouts and learning rate. The rest is TRL's: `RLADConfig`.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer

from rlad.config.file import load_config
from rlad.config.run import RunConfig
from rlad.engines.trl.config import AGGREGATION, RLADConfig
from rlad.engines.trl.trainer import RLADTrainer
from rlad.rollouts.prompts import chat_messages
from rlad.tasks import make_task
from rlad.teachers import make_teacher
from rlad.teachers.base import Setting

COMPLETIONS_PER_FORWARD_PASS = 4  # on each GPU


def main() -> None:
    run, output, *overrides = sys.argv[1:]
    config = load_config(run, overrides)
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    student_context = AutoConfig.from_pretrained(config.student.model).max_position_embeddings
    task = make_task(**config.task.model_dump())
    num_prompts = config.optimization.num_steps * config.rollout.prompts_per_batch
    problems = [task.problem("train", i, seed=config.seed) for i in range(num_prompts)]
    prompts: list[Any] = [problem.prompt for problem in problems]
    if tokenizer.chat_template is not None:
        system = config.rollout.system_prompt
        prompts = [chat_messages(problem.asked, system) for problem in problems]

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        """The task's reward; None where its verifier cannot judge."""
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        pairs = zip(number, texts, strict=True)
        rewards = [task.judge(problems[i], text).reward for i, text in pairs]
        return [None if math.isnan(value) else value for value in rewards]

    trainer = RLADTrainer(
        config.student.model,
        teacher=make_teacher(config.teacher, Setting(config, tokenizer, student_context)),
        problem_of=lambda row: problems[row["number"]],
        reward_funcs=reward,
        args=arguments(config, output),
        train_dataset=Dataset.from_dict({"prompt": prompts, "number": range(num_prompts)}),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(Path(output)))
    trainer.save_model()


def arguments(config: RunConfig, output: str) -> RLADConfig:
    rollout = config.rollout
    optimization = config.optimization
    completions = rollout.prompts_per_batch * rollout.group_size  # of one step, on all GPUs
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    loss_types = {aggregation: name for name, aggregation in reversed(AGGREGATION.items())}
    return RLADConfig(
        output,
        objective=config.objective.model_dump(),
        loss_type=loss_types[optimization.aggregation],
        advantages="rlad",
        num_generations=rollout.group_size,
        max_completion_length=rollout.max_completion_tokens,
        temperature=rollout.temperature,
        max_steps=optimization.num_steps,
        learning_rate=optimization.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=optimization.max_grad_norm,
        per_device_train_batch_size=COMPLETIONS_PER_FORWARD_PASS,
        gradient_accumulation_steps=completions // (COMPLETIONS_PER_FORWARD_PASS * num_processes),
        shuffle_dataset=False,
        seed=config.seed,
        save_steps=20,
        enable_jit_checkpoint=True,  # one more at SIGTERM
        logging_steps=1,
        report_to="none",
    )


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint that was written to its end."""
    whole = [
        folder
        for folder in output.glob("checkpoint-*")
        if (folder / "trainer_state.json").exists()
        and not (folder / "checkpoint-is-incomplete.txt").exists()
    ]
    newest = max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


if __name__ == "__main__":
    main()
