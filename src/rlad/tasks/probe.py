"""A try of the verifier on reference answers, before it judges a student."""

from rlad.errors import UserError
from rlad.tasks.base import Task, Verdict
from rlad.tasks.several import SeveralTasks

NUM_PROBED_ANSWERS = 5


def require_working_verifier(task: Task) -> None:
    """Raise `UserError` when the verifier cannot judge even the reference answers of the first
    problems; of several tasks, when one's cannot."""
    if isinstance(task, SeveralTasks):
        for one in task.tasks.values():
            require_working_verifier(one)
        return
    problems = [task.problem("train", i) for i in range(NUM_PROBED_ANSWERS)]
    judgements = [task.judge(problem, problem.answer) for problem in problems]
    if all(judgement.verdict == Verdict.CANNOT_JUDGE for judgement in judgements):
        raise UserError(
            f"the verifier of task {task.name!r} cannot judge the reference answers of the first "
            f"{len(problems)} training problems ({judgements[0].reason}); fix the verifier or the "
            "answers."
        )
