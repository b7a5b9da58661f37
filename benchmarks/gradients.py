"""How far loss and gradient of each divergence are from those of full logits; prints a Markdown
table.

    python benchmarks/gradients.py

The loss of `gkd` by the native engine, with each support and kind of teacher, against a slow
reference: one sequence after the other, float64 logits of the whole vocabulary, formulas token by
token. Batches are those of `tests/engines/test_distillation.py`: tiny random models with a
vocabulary of 64, unequal lengths. The loss differs by |a - b|, the gradient by |a - b| / |b|; the
largest of three batches. Models are float64; what a cache or a server gives is float32.
"""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch

from conformance_server import ConformanceServer
from parity_cases import Case, by_engine, by_reference, difference, make_case, rollouts_of
from rlad.config.file import parse_config
from rlad.teachers import make_teacher
from rlad.teachers.base import Setting, Teacher
from rlad.teachers.cache_store import CacheStore
from rlad.teachers.cached import CachedTeacher

DIVERGENCES = {"forward KL": 0.0, "reverse KL": 1.0, "JSD": 0.5}
SUPPORTS = {
    "sampled": ("local", "cached", "served"),
    "student_top_k": ("local", "cached", "served"),
    "teacher_top_k": ("local", "cached", "served"),
    "full": ("local",),
}
"""the kinds of teacher that give it"""
TOP_K = 5
BATCHES = range(3)


@contextmanager
def teacher_of(case: Case, kind: str, support: str) -> Iterator[Teacher]:
    """Give the case's teacher, asked directly, through a cache, or over HTTP."""
    local = case.engine.teacher
    assert local is not None
    with ExitStack() as held:
        if kind == "cached":
            store = CacheStore(
                Path(held.enter_context(tempfile.TemporaryDirectory())), max_bytes=2**30
            )
            yield held.enter_context(
                closing(CachedTeacher(local, store, temperature=1.0, tolerance=0.1))
            )
        elif kind == "served":
            ways = ("prompt_logprob_token_ids", "prompt_logprobs", "echo")
            server = held.enter_context(ConformanceServer(case.teacher, understands=ways))
            config = parse_config(
                {
                    "student": {"model": "s"},
                    "teacher": {"type": "served", "urls": [server.url], "model": server.name},
                    "task": {"type": "arithmetic"},
                    "objective": {"type": "gkd", "support": support, "top_k": TOP_K},
                    "rollout": {"max_completion_tokens": 20, "max_prompt_tokens": 40},
                }
            )
            student = case.engine.student
            setting = Setting(config, student.tokenizer, 100, student)
            yield held.enter_context(closing(make_teacher(config.teacher, setting)))
        else:
            yield local


def largest_difference(beta: float, support: str, kind: str) -> tuple[float, float]:
    case = make_case("gkd", knobs={"beta": beta, "support": support, "top_k": TOP_K})
    found = []
    with teacher_of(case, kind, support) as teacher:
        case.engine.teacher = teacher
        for index in BATCHES:
            batch = case.engine.make_rollout_batch(index)
            wanted = rollouts_of(case)
            found.append(
                difference(by_engine(case, batch, wanted), by_reference(case, batch, wanted))
            )
    return max(loss for loss, _ in found), max(gradient for _, gradient in found)


def main() -> None:
    torch.set_num_threads(1)
    titles = [f"{name}, {what}" for name in DIVERGENCES for what in ("loss", "gradient")]
    print(f"| support | teacher | {' | '.join(titles)} |\n|---|---|{'---:|' * len(titles)}")
    for support, kinds in SUPPORTS.items():
        for kind in kinds:
            figures = [largest_difference(beta, support, kind) for beta in DIVERGENCES.values()]
            shown = " | ".join(f"{figure:.1e}" for pair in figures for figure in pair)
            print(f"| `{support}` | {kind} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
