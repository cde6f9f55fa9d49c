"""The one exception whose message is meant for the user."""

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
    """The context of a command: UserError is one line on stderr and exit status 2, Ctrl-C 130.

    A closed pipe (`| head`) ends the command silently, as it does any other program. Any other
    exception is a bug of ours and keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # or Python complains at exit, when it flushes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
