"""Whether a sampler's tokens are draws of the model's distribution, and pass@1 with several seeds.

    python benchmarks/sampler_draws.py runs/samplers/runs/native/seed-0 --samplers native vllm

Summed over sampled tokens, log p + H (H: the entropy of the distribution that the token is from)
has mean 0 for right draws, whenever a completion ends; z is that sum by its standard deviation. The
student is that of the run's last checkpoint, at temperature 1. `vllm` needs vLLM
(`.ci/vllm-environment`).
"""

import argparse
import math
from contextlib import closing
from pathlib import Path

import torch

from rlad.config.file import load_config
from rlad.models.student import load_student
from rlad.rollouts.prompts import prompt_token_ids
from rlad.rollouts.samplers import make_sampler
from rlad.runs.directory import RunDirectory
from rlad.tasks import make_task

GROUP_SIZE = 4


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samplers", nargs="+", default=["native"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--num-problems", type=int, default=100)
    options = parser.parse_args()
    config = load_config(options.run)
    student = load_student(config, RunDirectory(options.run).newest_checkpoint()[1])
    task = make_task(**config.task.model_dump())
    problems = [task.problem("test", i, seed=0) for i in range(options.num_problems)]
    for name in options.samplers:
        rollout = config.rollout.model_copy(update={"engine": name})
        prompts = [prompt_token_ids(student.tokenizer, one.prompt, rollout) for one in problems]
        with closing(make_sampler(student, rollout)) as sampler:
            for seed in options.seeds:
                groups = sampler.sample(
                    prompts,
                    group_size=GROUP_SIZE,
                    max_completion_tokens=rollout.max_completion_tokens,
                    temperature=1.0,
                    seed=seed,
                )
                total = 0.0
                variance = 0.0
                num_correct = 0
                for problem, prompt, group in zip(problems, prompts, groups, strict=True):
                    for one in group:
                        ids = torch.tensor([[*prompt, *one.token_ids]])
                        logits = student.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
                        logprobs = logits.double().log_softmax(-1)
                        drawn = logprobs.gather(1, torch.tensor(one.token_ids)[:, None])
                        entropy = -(logprobs.exp() * logprobs).sum(-1)
                        total += float(drawn.sum() + entropy.sum())
                        squares = (logprobs.exp() * logprobs**2).sum(-1)
                        variance += float((squares - entropy**2).sum())
                        text = student.tokenizer.decode(one.token_ids, skip_special_tokens=True)
                        num_correct += task.judge(problem, str(text)).reward == 1
                share = num_correct / (GROUP_SIZE * len(problems))
                print(
                    f"{name}, seed {seed}: z {total / math.sqrt(variance):+.2f}, pass@1 {share:.1%}"
                )


if __name__ == "__main__":
    main()
