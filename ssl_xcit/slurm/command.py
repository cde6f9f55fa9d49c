"""The command `submit`: a pretraining, or with `eval NAME` an evaluation."""

import importlib
import sys
from collections.abc import Sequence

from ssl_xcit.runtime.config import load_config, run_command
from ssl_xcit.runtime.errors import exit_on_user_error
from ssl_xcit.slurm.config import EvaluationJobConfig, SubmitConfig
from ssl_xcit.slurm.evaluations import settings_of, split_arguments

SUBMIT = "ssl_xcit.slurm.submit"  # needs submitit, which takes a while to import


def main(argv: Sequence[str] | None = None) -> None:
    """Submit a pretraining, or what follows "eval"."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["eval"]:
        submit_evaluation(words[1:])
    else:
        recipes = ("slurm.yaml", "pretrain/{arch}.yaml")
        run_command(SubmitConfig, f"{SUBMIT}:submit", recipes, words)


def submit_evaluation(argv: Sequence[str]) -> None:
    """Submit an evaluation; `argv`: its name, its options and the job's."""
    with exit_on_user_error():
        name, *arguments = argv or [""]
        job, evaluation = split_arguments(settings_of(name), arguments)
        help_wanted = [token for token in evaluation if token in ("-h", "--help")]
        config = load_config(EvaluationJobConfig, ["slurm.yaml"], [*job, *help_wanted])
        importlib.import_module(SUBMIT).submit_script(name, evaluation, config.slurm)
