"""What scoring by a local teacher costs in memory, beside the tensor `[batch, token, vocabulary]` that it never makes.

    python benchmarks/teacher_memory.py --out teacher_memory.json

A small random Llama (hidden size 64) scores one completion of each length for each vocabulary, in a process of its own, so that
one case's peak does not hide another's. "peak" is how much the resident memory rose above that of the loaded model while it
scored. The last column is what one float32 tensor of all logits would take.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

LENGTHS, VOCABULARIES = (1024, 2048, 4096, 8192), (32_000, 151_936)
MIB = 1024**2
# glibc keeps freed blocks of less than 32 MiB, and the peak would be that of its heap; so they go back at once.
ENVIRONMENT = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}


def measure(num_tokens: int, vocabulary: int) -> dict[str, float]:
    """Of this process: one case."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from rlad.language_model import LanguageModel
    from rlad.teachers import TeacherRequest
    from rlad.teachers.local import LocalTeacher

    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=num_tokens + 64, tie_word_embeddings=True, **sizes)
    no_tokenizer = PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast)  # scoring token ids needs none
    model = LanguageModel("random", LlamaForCausalLM(config).eval(), no_tokenizer, (0,), 0, torch.float32)
    teacher = LocalTeacher(model, temperature=1.0, tokens_per_batch=num_tokens + 16)
    prompt, completion = torch.randint(vocabulary, (16,)).tolist(), torch.randint(vocabulary, (num_tokens,)).tolist()
    teacher.logprobs([TeacherRequest(prompt, completion[:8])])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (logprobs,) = teacher.logprobs([TeacherRequest(prompt, completion)])
    assert len(logprobs) == num_tokens and logprobs.isfinite().all()
    unit = 1 if sys.platform == "darwin" else 1024
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    return {"tokens": num_tokens, "vocabulary": vocabulary, "peak_bytes": peak, "all_logits_bytes": 4 * num_tokens * vocabulary}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of the completion")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--case", nargs=2, type=int, metavar=("TOKENS", "VOCABULARY"), help="measure one case in this process")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case)))
        return
    print("| vocabulary | tokens | peak MiB | all logits MiB |\n| --- | --- | --- | --- |")
    rows = []
    for vocabulary in arguments.vocabularies:
        for num_tokens in arguments.lengths:
            command = [sys.executable, __file__, "--case", str(num_tokens), str(vocabulary)]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout)
            print(
                f"| {vocabulary} | {num_tokens} | {row['peak_bytes'] / MIB:.0f} | {row['all_logits_bytes'] / MIB:.0f} |",
                flush=True,
            )
            rows.append(row)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
