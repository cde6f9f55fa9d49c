"""A task's verdict on its own training."""

from typing import NamedTuple


class Verdict(NamedTuple):
    """A verdict's name, and one line each: the figures, the likely cause, what to change.

    Cause and advice are empty if nothing is wrong.
    """

    name: str
    sentence: str
    cause: str = ""
    advice: str = ""

    @property
    def text(self) -> str:
        """The whole verdict in one line."""
        text = f"verdict: {self.name}: {self.sentence}"
        return f"{text}; likely cause: {self.cause}; try {self.advice}" if self.cause else text
