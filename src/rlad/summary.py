"""What `rlad train` says at its end."""

from rich.console import Console
from rich.text import Text

from rlad.console import printable
from rlad.run_dir import EVAL, RunDirectory
from rlad.training import TrainResult


def print_summary(console: Console, result: TrainResult) -> None:
    """Figures, a puzzle that was solved only after training, where everything is, and what to type next."""
    shown = printable(str(result.run_dir))
    console.rule("result", style="dim")
    console.print(f"test pass@1 before {result.before}")
    console.print(f"test pass@1 after  [bold]{result.after}[/]   (95 % intervals over problems)")
    _print_example(console, RunDirectory(result.run_dir))
    console.rule("where it is, and what next", style="dim")
    console.print(Text(f"run directory   {shown}  ({result.seconds:.0f} s)\nlearning curve  {shown}/curve.png"))
    console.print(
        Text(
            f"rlad evaluate {shown} --num-samples 8     mean@8 and pass@k, by difficulty\n"
            f"rlad sample {shown}/config.toml        completions with the teacher's opinion\n"
            "rlad train objective=grpo               the same run without the teacher\n"
            "rlad list objectives trrd               the formula and its settings"
        )
    )


def _print_example(console: Console, run: RunDirectory) -> None:
    tests = [row for row in run.read(EVAL) if row["split"] == "test"]
    before, after = tests[0]["results"], tests[-1]["results"]
    solved = [
        (b, a) for b, a in zip(before, after, strict=True) if not b["num_correct"] and a["num_correct"] == a["num_samples"]
    ]
    if not solved:
        return
    then, now = min(solved, key=lambda pair: len(pair[1]["first_completion"]))
    console.rule("a test problem that it solves now", style="dim")
    console.print(Text(printable(then["prompt"]).strip(), style="bold"))
    console.print(Text("before: ", style="red").append(printable(then["first_completion"]).strip(), style="default"))
    console.print(Text("after: ", style="green").append(printable(now["first_completion"]).strip(), style="default"))
