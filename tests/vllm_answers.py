"""Greedy completions by vLLM on the CPU. A program for vLLM's environment:

PYTHON tests/vllm_answers.py MODEL < prompts.json > answers.json     # lists of token ids
"""

import json
import os
import sys

# Before vLLM is imported. What it says goes to stderr.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
}

from vllm import LLM, SamplingParams


def main(model: str, prompts: list[list[int]], length: int) -> list[list[int]]:
    llm = LLM(model=model, dtype="float32", max_model_len=128, enforce_eager=True)
    how = SamplingParams(temperature=0.0, max_tokens=length)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], how, use_tqdm=False
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    found = main(sys.argv[1], asked["prompts"], asked["length"])
    print("\n" + json.dumps(found))
