"""What a task says about its own training."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """One of the names above, and one line each: the figures, the likely cause, what to change.

    Cause and advice are empty where nothing is wrong.
    """

    name: str
    sentence: str
    cause: str = ""
    advice: str = ""

    @property
    def text(self) -> str:
        """All of it in one line."""
        text = f"verdict: {self.name}: {self.sentence}"
        return f"{text}; likely cause: {self.cause}; try {self.advice}" if self.cause else text
