"""Start a pretraining from existing weights: `--init_from FILE`."""

from pathlib import Path
from typing import Literal

from torch import nn

from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.checkpoints.formats import listing
from ssl_xcit.checkpoints.read import read_dino_model
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
) -> list[str]:
    """Load weights into student, teacher and centre; return lines that say what was loaded.

    `path` is anything `read_dino_model` reads: a full checkpoint (ours or DINO's), from which each
    network gets its own weights, or a backbone in any format, from which both networks start. With
    `parts` "all", a head and a centre in the file are loaded too and must fit; "backbone" ignores
    them.

    Raises UserError if the architecture differs or anything does not fit.
    """
    lines = []
    for role, network in (("student", student), ("teacher", teacher)):
        found, backbone, head, center, info = read_dino_model(path, role)
        if found != arch:
            raise UserError(f"--init_from {path} is a {found}, this run trains a {arch}")
        _fit(network.backbone, backbone, f"{path}: backbone")
        with_head = head is not None and parts == "all"
        if with_head:
            _fit(network.head, head, f"{path}: head")
        lines.append(
            f"{role}: backbone{' and head' if with_head else ''} of {info['path']} "
            f"({info['role']}) loaded{'' if with_head else ', head fresh'}"
            + (" (the file's is left out)" if head is not None and not with_head else "")
        )
    with_center = center is not None and parts == "all"
    if with_center:
        _fit(dino_loss, {"center": center}, f"{path}: center")
    lines.append(
        f"center: {'loaded' if with_center else '0'}"
        + (" (the file's is left out)" if center is not None and not with_center else "")
    )
    return lines


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
