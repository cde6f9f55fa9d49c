"""The one exception whose message is meant for the person at the keyboard."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Bad input. The message is one line: what was expected, what came, what to do.

    Every command prints it without a traceback and exits with status 2.
    """


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Around the body of a command: UserError is one line on stderr and exit status 2, Ctrl-C 130.

    A reader of its output that goes away (`| head`) ends it silently, as it ends any other program.

    Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's exit complains
        raise SystemExit(141) from None
