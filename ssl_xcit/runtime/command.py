"""The body of a command."""

from collections.abc import Sequence

from ssl_xcit.runtime import processor
from ssl_xcit.runtime.config import load_config
from ssl_xcit.runtime.errors import exit_on_user_error
from ssl_xcit.runtime.options import Config
from ssl_xcit.runtime.references import resolve


def run_command(
    cls: type[Config],
    target: str,
    files: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Run a command: read the configuration, then call `target` ("module:function") with it.

    The target is imported only once the configuration is known to be valid. A UserError becomes
    one line on stderr and exit status 2.
    """
    with exit_on_user_error():
        config = load_config(cls, files, argv)
        processor.prepare()
        resolve(target)(config)
