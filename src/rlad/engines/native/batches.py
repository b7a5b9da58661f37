"""Make rollout batches, in the order of the paper: sample, reward, advantage, score.

Seeds and problems are functions of the batch's index; no random state is kept between batches.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlad.config.run import RunConfig
from rlad.engines.metrics import ranking_metrics
from rlad.engines.native.overlap import AskedAhead
from rlad.engines.native.role_evidence import add_role_evidence
from rlad.engines.native.skills import Summariser, skill_bank, with_skill
from rlad.engines.rollout_batch import RolloutBatch
from rlad.errors import RunFailedError, UserError
from rlad.models.loading import LanguageModel
from rlad.objectives import OBJECTIVES, taken_by
from rlad.objectives.advantages import group_advantages
from rlad.rollouts.grading import Timer, asked_prompts, graded_groups
from rlad.rollouts.samplers import beside_another, make_sampler, of_teacher
from rlad.rollouts.skills import Skill, SkillBank, record
from rlad.rollouts.types import Metrics, RolloutGroup, Sampler
from rlad.scoring.scorer import Scorer
from rlad.seeds import stream_seed
from rlad.tasks import Task, Verdict
from rlad.teachers.adapter import AdapterScorer
from rlad.teachers.asking import complete_logprobs
from rlad.teachers.base import Teacher
from rlad.teachers.local import LocalTeacher


class RolloutMaker:
    """The maker of a run's rollout batches on one device, one after the other or one ahead."""

    def __init__(
        self,
        config: RunConfig,
        *,
        student: LanguageModel,
        task: Task,
        teacher: Teacher | None = None,
        reference: LanguageModel | None = None,
        before_work: Callable[[], None] = lambda: None,
    ):
        """Take the parts of a run. `before_work` is called before every decoding step and
        micro-batch; it may raise to stop the run.

        `reference` is the frozen initial student, needed if `kl_coef` is not 0. A LoRA student may
        be its own reference, since its base weights are the initial student.
        """
        self.config = config
        self.student = student
        self.task = task
        self.teacher = teacher
        self.before_work = before_work
        self.step = 0
        self.flat_step: int | None = None
        self.skills = skill_bank(config)
        """Skills learnt from earlier episodes, if the teacher is shown them."""
        self.summariser = Summariser(
            config, self.skills, student=student, teacher=teacher, before_work=before_work
        )
        self.begun_at: int | None = None
        """The step whose weights sample the next rollout batch ahead, if one is being sampled."""
        scoring: dict[str, Any] = {
            "temperature": config.rollout.temperature,
            "tokens_per_batch": config.optimization.tokens_per_batch,
            "before_work": before_work,
        }
        self.scorer = Scorer(student, **scoring)
        self.reference_scorer: Scorer | None = None
        if reference is student:
            self.reference_scorer = AdapterScorer(student, adapter=None, **scoring)
        elif reference is not None:
            self.reference_scorer = Scorer(reference, **scoring)
        if config.objective.asked_of_teacher != "sampled" and teacher is not None:
            teacher.require_comparable(self.scorer)
            self._require_top_k()
        self.sampler, self.writer = self._make_samplers()

    def _make_samplers(self) -> tuple[Sampler, Sampler]:
        """Start the sampler of the student's completions, and the sampler of those that are trained
        on. They may be the same."""
        if self.config.objective.written_by == "student":
            sampler = make_sampler(self.student, self.config.rollout, self.before_work)
            return sampler, sampler
        rollout = beside_another(self.config.rollout)
        sampler = make_sampler(self.student, rollout, self.before_work)
        try:
            with self.local_teacher.at_work():
                teacher_model = self.local_teacher.language_model
                return sampler, make_sampler(teacher_model, of_teacher(rollout))
        except BaseException:
            sampler.close()
            raise

    def _require_top_k(self) -> None:
        """Raise `UserError` if the objective compares more tokens than the vocabulary has."""
        objective: Any = self.config.objective
        vocabulary = self.student.vocabulary
        if "top_k" in objective.asked_of_teacher and objective.top_k > vocabulary:
            raise UserError(
                f"objective.top_k is {objective.top_k}, but the student's vocabulary has "
                f"{vocabulary} tokens; lower it, or compare all of them."
            )

    @property
    def local_teacher(self) -> LocalTeacher:
        """Return the teacher of an objective that needs its model; the config allows no other."""
        assert isinstance(self.teacher, LocalTeacher)
        return self.teacher

    def objective_at(self, batch_index: int) -> Any:
        """Return the config of the objective that is used at a rollout batch."""
        objective = self.config.objective
        loop = self.config.optimization
        first_step = batch_index * loop.steps_per_rollout_batch
        return objective.at_step(first_step, loop.num_steps, flat_step=self.flat_step)

    def make_rollout_batch(self, index: int) -> RolloutBatch:
        """Make everything that the steps on one batch of prompts need, in the order of the
        paper."""
        objective = self.objective_at(index)
        scores_tokens = (
            objective.needs_teacher
            and objective.written_by == "student"
            and objective.asked_of_teacher == "sampled"
        )
        timer = Timer()
        teacher = self.teacher if scores_tokens else None
        ahead = AskedAhead(teacher) if teacher and teacher.works_elsewhere else None

        skills = None if self.skills is None else self.skills.draft()
        chosen = self.choose_skills(index, skills)

        # A teacher on another device scores finished groups while others are still sampled.
        def after_group(number: int, group: RolloutGroup) -> None:
            if ahead is not None:
                with timer("teacher"):
                    group = with_skill(group, chosen[number])
                    requests = self.with_advantages(index, [group]).teacher_requests()
                    ahead.submit(number, requests)

        with ExitStack() as held:
            if teacher is not None:
                held.callback(teacher.cancel)  # what an error leaves under way

            # 1. Sample a group of completions for each prompt, and grade them. With
            # `max_staleness` they were begun one batch ago, and the next ones are begun now.
            sampled_at = self.step if self.begun_at is None else self.begun_at
            sampled = self.sample_groups(index, timer=timer, after_group=after_group)
            groups = list(map(with_skill, sampled, chosen))
            # An error here is raised again once this batch is complete, so it is not lost.
            with suppress(RunFailedError):
                self.begin_ahead(index + 1, timer)

            # 2. Advantages, and with them which completions can contribute to the gradient at all.
            batch = self.with_advantages(index, groups)

            # 3. Score those completions with the teacher, then with reference and old policy.
            if objective.needs_teacher:
                self.add_teacher_scores(batch, teacher, ahead, timer=timer)
        self.add_local_scores(batch, timer=timer)
        if skills is not None:
            # Skills learnt from this batch are for the next one.
            with timer("skills"), self.summariser.at_work(self.sampler) as summarise:
                new = skills.learn(groups, chosen, summarise)
            batch.skills = record(chosen, new)
            batch.counts |= skills.metrics()
        batch.seconds = timer.seconds
        batch.counts |= self.staleness(sampled_at)
        if ahead is not None:
            batch.seconds["teacher/overlap/seconds"] = ahead.overlap_seconds
        # From here on nothing can stop this batch.
        self.skills = skills
        return batch

    def choose_skills(self, index: int, skills: SkillBank | None) -> list[Skill | None]:
        """Choose a skill for the teacher's prompt of each problem of a batch; None for none."""
        indices = self.problems_of(index)
        if skills is None:
            return [None] * len(indices)
        seed = self.config.seed
        return [skills.choose(self.task.problem("train", i, seed=seed)) for i in indices]

    def add_teacher_scores(
        self,
        batch: RolloutBatch,
        teacher: Teacher | None,
        ahead: AskedAhead | None,
        *,
        timer: Timer,
    ) -> None:
        """Score a batch with its teacher, if it is asked now, and count the tokens that it
        scores."""
        if teacher is not None:
            with timer("teacher"):
                batch.teacher_logprobs = batch.by_rollout(
                    self._ask_teacher(batch, ahead), batch.teacher_rows
                )
            num_tokens = batch.num_actions(batch.teacher_rows)
            batch.counts = {"teacher/tokens/count": num_tokens} | teacher.pop_metrics()
            batch.counts |= ranking_metrics(batch.groups, batch.teacher_logprobs)
        else:
            # It has written the completions, or compares their tokens within the update.
            by_teacher = self.objective_at(batch.index).written_by == "teacher"
            rows = range(len(batch.rollouts)) if by_teacher else batch.teacher_rows
            num_tokens = batch.num_actions(rows)
            batch.counts = {"teacher/tokens/count": num_tokens}
        if batch.spoken_share < 1:
            batch.counts["teacher/speaks/frac"] = batch.spoken_share

    def add_local_scores(self, batch: RolloutBatch, *, timer: Timer) -> None:
        """Score a batch with the reference and the old policy, as far as its objective needs it."""
        objective = self.objective_at(batch.index)
        make_token_advantages = OBJECTIVES[objective.type].token_advantages
        if self.reference_scorer is not None:
            with timer("reference"):
                batch.reference_logprobs = self._scores(batch, self.reference_scorer)
        # With one step per rollout batch the student is the old policy during the update, so its
        # own detached log-probs save this pass.
        student_moves = self.config.optimization.steps_per_rollout_batch > 1
        needs_old = student_moves or make_token_advantages or objective.weighs_roles
        if objective.written_by == "student" and needs_old:
            with timer("old_logprobs"):
                batch.old_logprobs = self._scores(batch, self.scorer)
        if objective.weighs_roles:
            with timer("role_evidence"):
                add_role_evidence(batch, objective, self.scorer, self.config)
        if make_token_advantages:
            knobs = taken_by(make_token_advantages, objective.knobs_at(self.step))
            batch.make_token_advantages(partial(make_token_advantages, **knobs))

    def sample_groups(
        self,
        index: int,
        *,
        timer: Timer,
        after_group: Callable[[int, RolloutGroup], None] = lambda number, group: None,
    ) -> list[RolloutGroup]:
        """Return a graded group for each prompt of a rollout batch, sampled from the student or its
        teacher."""
        by_teacher = self.objective_at(index).written_by == "teacher"
        stream = "teacher rollouts" if by_teacher else "rollouts"
        with self.local_teacher.at_work() if by_teacher else nullcontext():
            if self.begun_at is None and not self.writer.is_trainers_own:
                with timer("hand_over"):
                    self.writer.update_weights()
            self.begun_at = None
            return graded_groups(
                self.student,
                self.task,
                "train",
                self.problems_of(index),
                rollout=self.config.rollout,
                seed=stream_seed(self.config.seed, stream, index),
                problem_seed=self.config.seed,
                sampler=self.writer,
                before_work=self.before_work,
                after_group=after_group,
                timer=timer,
            )

    def staleness(self, sampled_at: int) -> Metrics:
        """Return the age in steps of a batch sampled with the weights of step `sampled_at`, if
        batches may be stale."""
        age = float(self.step - sampled_at)
        return {"rollout/staleness/steps": age} if self.config.rollout.max_staleness else {}

    def begin_ahead(self, index: int, timer: Timer) -> None:
        """Start sampling the next rollout batch with the student's current weights, while it trains
        on the current batch."""
        rollout = self.config.rollout
        is_last = index >= self.config.optimization.num_rollout_batches
        if not rollout.max_staleness or is_last or self.begun_at is not None:
            return
        if self.objective_at(index).written_by == "teacher":
            return
        with timer("hand_over"):
            indices = self.problems_of(index)
            seed = self.config.seed
            asked = asked_prompts(self.student, self.task, "train", indices, rollout, seed)
            self.sampler.begin(
                [one.prompt for one in asked],
                group_size=rollout.group_size,
                max_completion_tokens=rollout.max_completion_tokens,
                temperature=rollout.temperature,
                seed=stream_seed(seed, "rollouts", index),
                before_token=self.before_work,
            )
        self.begun_at = self.step

    def problems_of(self, index: int) -> range:
        """Return the indices of the training problems of a rollout batch."""
        size = self.config.rollout.prompts_per_batch
        return range(index * size, (index + 1) * size)

    def with_advantages(self, index: int, groups: Sequence[RolloutGroup]) -> RolloutBatch:
        """Make a batch of some groups, with their advantages and the choice of what trains."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        advantages = group_advantages(
            torch.tensor([r.reward for r in rollouts], dtype=torch.float64),
            len(groups[0].rollouts),
            scale=self.config.optimization.advantage_scale,
            judged=torch.tensor([r.verdict != Verdict.CANNOT_JUDGE for r in rollouts]),
        )
        batch = RolloutBatch(index, groups, advantages)
        self.choose_what_trains(batch)
        return batch

    def choose_what_trains(self, batch: RolloutBatch) -> None:
        """Leave out the rollouts that cannot contribute to the gradient of their objective."""
        objective = self.objective_at(batch.index)
        batch.choose_what_trains(
            objective,
            step=batch.index * self.config.optimization.steps_per_rollout_batch,
            has_leash=bool(self.config.optimization.kl_coef),
            can_read=self.student.can_read,
            teacher=self.teacher if objective.needs_teacher else None,
        )

    def _scores(self, batch: RolloutBatch, scorer: Scorer) -> list[Tensor]:
        rows = batch.training_rows
        return batch.by_rollout(scorer.score(*batch.sequences(rows)), rows)

    def _ask_teacher(self, batch: RolloutBatch, ahead: AskedAhead | None = None) -> list[Tensor]:
        """Return the teacher's log-probs of the rollouts that train; it may have been asked
        ahead."""
        assert self.teacher is not None
        return complete_logprobs(
            self.teacher,
            batch.teacher_requests(),
            max_missing_share=self.config.optimization.max_missing_teacher_share,
            step=self.step + 1,
            answers=None if ahead is None else ahead.wait(),
        )

    def close(self) -> None:
        self.sampler.close()
        self.writer.close()
        if self.teacher is not None:
            self.teacher.close()
