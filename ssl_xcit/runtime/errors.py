"""The one exception whose message is meant for the user."""

import os
import signal
import sys
import threading
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


@contextmanager
def starting() -> Iterator[None]:
    """The start of a command, before its work: Ctrl-C ends the process at once, with status 130.

    There is nothing to clean up yet, and modules that KeyboardInterrupt strikes while they are
    imported fail later, in odd ways. A handler of another kind stays as it is.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
