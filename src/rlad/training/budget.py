"""What a run may use up beside its steps."""

from collections.abc import Mapping

from rlad.config.run import OptimizationConfig


class Budget:
    """Seconds of training and tokens asked of the teacher, against their limits."""

    def __init__(self, settings: OptimizationConfig):
        self.settings = settings
        self.seconds = 0.0
        self.teacher_tokens = 0.0

    def use(self, metrics: Mapping[str, float]) -> None:
        """Count one step."""
        self.seconds += sum(value for key, value in metrics.items() if key.startswith("time/"))
        self.teacher_tokens += metrics.get("teacher/tokens/count", 0.0)

    @property
    def is_used_up(self) -> bool:
        limits = self.settings.max_seconds, self.settings.max_teacher_tokens
        used = self.seconds, self.teacher_tokens
        return any(
            limit is not None and amount >= limit
            for amount, limit in zip(used, limits, strict=True)
        )
