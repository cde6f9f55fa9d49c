"""What can be submitted beside a pretraining, and which words of a command line are the job's."""

from collections.abc import Sequence
from pkgutil import resolve_name

from ssl_xcit.runtime import options
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.slurm.config import SlurmConfig

CONFIGURATIONS = {
    "finetune": "finetune.config:FinetuneConfig",
    "knn": "evaluation.config:KnnConfig",
    "linear": "evaluation.config:LinearConfig",
    "supervised": "evaluation.config:SupervisedConfig",
    "visualize": "report.config:VisualizeConfig",
}


def settings_of(name: str) -> type:
    """The class of an evaluation's settings. Raises UserError if there is no such evaluation."""
    if name not in CONFIGURATIONS:
        known = ", ".join(CONFIGURATIONS)
        raise UserError(f"expected an evaluation ({known}), got {options.as_text(name)}")
    return resolve_name(f"ssl_xcit.{CONFIGURATIONS[name]}")


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
