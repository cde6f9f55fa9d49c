"""Start a pretraining from existing weights: `--init_from FILE`."""

from pathlib import Path
from typing import Literal

from torch import nn

from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.checkpoints.formats import listing
from ssl_xcit.checkpoints.read import read
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import MultiCropWrapper
from ssl_xcit.runtime.errors import UserError


def init_from(
    path: Path | str,
    arch: str,
    parts: Literal["all", "backbone"],
    student: MultiCropWrapper,
    teacher: MultiCropWrapper,
    dino_loss: DINOLoss,
    prefix: str = "",
) -> list[str]:
    """Load `path` into student, teacher and centre; returns lines that say what was loaded.

    `path` is anything `ssl_xcit.checkpoints.read.read` reads. From a full checkpoint, ours or
    DINO's, each network gets its own weights; from a backbone both networks start. With "all", a
    head and a centre in the file are loaded too, and must fit; "backbone" leaves them out.
    `prefix`: see `read`; both networks get the one that it names.

    Raises UserError for another architecture, and for tensors that do not fit.
    """
    lines = []
    left_out = " (the file's is left out)"
    for role, network in (("student", student), ("teacher", teacher)):
        weights = read(path, role, prefix=prefix)
        if weights.arch != arch:
            raise UserError(f"--init_from {path} is a {weights.arch}, this run trains a {arch}")
        _fit(network.backbone, weights.backbone, f"{path}: backbone")
        loaded, head = "backbone", ""
        if weights.dino_head and parts == "all":
            _fit(network.head, weights.dino_head, f"{path}: head")
            loaded = "backbone and head"
        else:
            head = ", head fresh" + (left_out if weights.dino_head else "")
        lines.append(f"{role}: {loaded} of {weights.path} ({weights.role}) loaded{head}")
    center = "0"
    if weights.center is not None and parts == "all":
        _fit(dino_loss, {"center": weights.center}, f"{path}: center")
        center = "loaded"
    elif weights.center is not None:
        center += left_out
    return [*lines, f"center: {center}"]


def _fit(module: nn.Module, state: StateDict, what: str) -> None:
    """Load `state`, whose names and shapes must match the module's."""
    own = module.state_dict()
    missing, unknown = own.keys() - state.keys(), state.keys() - own.keys()
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unknown or shapes:
        wrong = {"lacks": missing, "has extra": unknown, "has other shapes of": shapes}
        reasons = "; ".join(f"{verb} {listing(keys)}" for verb, keys in wrong.items() if keys)
        raise UserError(
            f"{what} does not fit this run ({reasons}): use the settings it was trained with, or "
            "--init_parts backbone to load only its backbone"
        )
    module.load_state_dict(state)
