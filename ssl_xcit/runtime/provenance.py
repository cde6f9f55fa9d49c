"""Where results come from: the commit of the code."""

import subprocess

from ssl_xcit.runtime.config import INSTALLED, PACKAGE


def commit() -> str | None:
    """The code's git commit, with -dirty if it was changed; None if unknown.

    A job's frozen copy of the code notes it in a file beside the package; otherwise git is asked.
    """
    noted = PACKAGE.parent / "COMMIT"
    if noted.is_file():
        return noted.read_text().strip() or None
    if INSTALLED:  # git would describe whatever repository the environment lies in
        return None
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:  # compute nodes may have no git
        return None
    return described.stdout.strip() or None
