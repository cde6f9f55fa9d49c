"""The command line `launch/submit.py eval NAME ...`: what is the evaluation's, what is the job's.

A script of eval/ says itself which options it has, by its `run_command(...)`; so any that is put
there can be submitted.
"""

import ast
import importlib
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ssl_xcit import options
from ssl_xcit.config import SlurmConfig, load_config
from ssl_xcit.errors import UserError, exit_on_user_error

SCRIPTS = Path(__file__).resolve().parent.parent / "eval"


@dataclass(frozen=True)
class EvaluationJobConfig:
    """Submit an evaluation to SLURM: launch/submit.py eval NAME, every option of eval/NAME.py, and
    the job's, which are:"""

    slurm: SlurmConfig = field(default_factory=SlurmConfig)


class Script(NamedTuple):
    """A script of eval/: the class of its settings and the recipes below them."""

    name: str
    config: type
    files: tuple[str, ...]

    def check(self, arguments: Sequence[str]) -> object:
        """The settings that these arguments give. Raises UserError as the script would."""
        return load_config(self.config, self.files, arguments)


def read_script(name: str) -> Script:
    """What eval/NAME.py says about itself. Raises UserError if there is none."""
    path = SCRIPTS / f"{name}.py"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in SCRIPTS.glob("*.py")))
        raise UserError(f"expected an evaluation ({known}), got {options.as_text(name)}")
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    (call,) = (call for call in calls if ast.unparse(call.func) == "run_command")
    files = [keyword.value for keyword in call.keywords if keyword.arg == "files"] + call.args[2:3]
    return Script(
        name,
        runpy.run_path(str(path))[call.args[0].id],
        tuple(ast.literal_eval(files[0])) if files else (),
    )


def split_arguments(cls: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the job's, those of `cls`): options of the job that `cls` has, too, are its own, but with
    --slurm. before them.
    """
    theirs = {name.rpartition(".")[2] for name in options.leaves(cls)}
    ours = options.leaves(SlurmConfig).keys() - theirs
    parts: tuple[list[str], list[str]] = ([], [])
    part = parts[1]
    for token in arguments:
        if token.startswith("--"):
            name = token[2:].partition("=")[0].replace("-", "_")
            part = parts[0] if name in ours or name.startswith("slurm.") else parts[1]
        part.append(token)
    return parts


def submit_evaluation(argv: Sequence[str]) -> None:
    """Body of `launch/submit.py eval ...`; argv is what follows "eval"."""
    with exit_on_user_error():
        name, *arguments = argv or [""]
        script = read_script(name)
        job, evaluation = split_arguments(script.config, arguments)
        help_wanted = [token for token in evaluation if token in ("-h", "--help")]
        config = load_config(EvaluationJobConfig, ["slurm.yaml"], [*job, *help_wanted])
        slurm = importlib.import_module("ssl_xcit.slurm")
        slurm.submit_script(script, evaluation, config.slurm)
