"""Classes as TRL's `environment_factory` takes them."""


class Counter:
    """Is to be counted up to a number."""

    def reset(self, number: int = 3, **row) -> str:
        self.goal = number % 5 + 1
        self.count = 0
        return f"Count to {self.goal}."

    def add(self, amount: int) -> str:
        """
        Add to the counter.

        Args:
            amount: how much to add
        """
        if amount < 0:
            raise ValueError("only upwards")
        self.count += amount
        return f"The counter is at {self.count}."

    async def look(self) -> dict:
        """
        Look at the counter.
        """
        return {"count": self.count}

    def get_reward(self) -> float:
        return float(self.count == self.goal)

    def _hidden(self) -> None: ...


class Untyped(Counter):
    """Has a tool that cannot be described."""

    def wait(self, how_long):
        return how_long


class NoTools:
    """Has nothing that a model could do."""

    def reset(self, **row) -> str:
        return ""

    def get_reward(self) -> float:
        return 0.0
