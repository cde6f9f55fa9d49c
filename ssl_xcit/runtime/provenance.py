"""Where results come from: the commit of the code."""

import subprocess
from pathlib import Path


def commit() -> str | None:
    """The code's git commit, with -dirty if it was changed; None if unknown.

    A job's frozen copy of the code notes it in a file beside the package; otherwise git is asked.
    """
    folder = Path(__file__).resolve().parents[2]
    noted = folder / "COMMIT"
    if noted.is_file():
        return noted.read_text().strip() or None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # compute nodes may have no git
        return None
    return described.stdout.strip() or None
