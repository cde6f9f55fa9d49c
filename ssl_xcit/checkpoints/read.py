"""One door for weights: whatever a file or folder holds."""

from pathlib import Path

from torch import Tensor

from ssl_xcit.checkpoints.folder import load_checkpoint, load_latest
from ssl_xcit.checkpoints.formats import CLASSIFIER, Contents, StateDict, listing
from ssl_xcit.checkpoints.weights import ROLES, Read, Weights, identify, read_file
from ssl_xcit.runtime.errors import UserError


def read_weights(path: Path | str, role: str = "teacher", arch: str = "") -> Weights:
    """The network in any supported file or folder, its tensors checked one by one.

    `path` is a run folder (its newest complete checkpoint), a checkpoint folder, or a file in any
    format of `ssl_xcit.checkpoints.formats`: .safetensors, or .pth in torch's present or former
    container.
    `role` matters where there are several networks: "teacher" or "student", "model" or
    "model_ema"; a file without teacher and student gives its only or its first network for these
    two. `arch`, if given, must be what the file holds; otherwise its tensors tell.

    info: path, step (None for a file), role, format ("official", "dino", "dino_backbone", "timm",
    "mmpretrain", or "ssl_xcit"), num_classes (0: no classifier), tensors (of this network in the
    file, a projection head included), roles (all there are), ignored (entries of the file that
    belong to its training).

    Raises UserError for whatever is not an XCiT to the last tensor. Runs no code of the file.
    """
    return read_network(path, role, arch).weights


def read_network(path: Path | str, role: str = "teacher", arch: str = "") -> Read:
    """What `read_weights` reads, and the projection head and centre that DINO keeps beside it."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: expected a run folder, a checkpoint or a file")
    if path.is_file():
        return identify(read_file(path), path, role, arch)
    path, step, contents = _read_folder(path)
    return identify(contents, path, role, arch, step)


def read_backbone(
    path: Path | str, role: str = "teacher", arch: str = ""
) -> tuple[str, StateDict, dict]:
    """(architecture, state dict without classifier, info) of what `read_weights` reads."""
    arch, state, info = read_weights(path, role, arch)
    return arch, _without_classifier(state), info


def read_dino_model(
    path: Path | str, role: str = "teacher"
) -> tuple[str, StateDict, StateDict | None, Tensor | None, dict]:
    """(architecture, backbone, projection head, centre, info): what DINO training starts from.

    The head has the names of `ssl_xcit.dino.head.DINOHead`. Head and centre are None without one,
    as in a backbone or a supervised model (whose classifier is left out: info's num_classes).
    """
    weights, head, center = read_network(path, role)
    return weights.arch, _without_classifier(weights.state), head or None, center, weights.info


def read_linear_weights(path: Path | str) -> tuple[Tensor, Tensor]:
    """(weight (classes, features), bias (classes)) of a DINO linear probe's file."""
    if not Path(path).is_file():
        raise UserError(f"no file at {path}: expected the linear weights of DINO")
    state = next(iter(read_file(Path(path)).networks.values()))
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if state.keys() != {"linear.weight", "linear.bias"}:
        raise UserError(
            f"{path} holds no linear probe: expected linear.weight and linear.bias, got "
            f"{listing(state)}"
        )
    weight, bias = state["linear.weight"], state["linear.bias"]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(
            f"{path} holds no linear probe: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}"
        )
    return weight, bias


def _read_folder(path: Path) -> tuple[Path, int, Contents]:
    """A checkpoint folder of ours, or a run folder's newest: its path, its step and networks."""
    if (path / "manifest.json").exists():
        checkpoint = load_checkpoint(path)
    else:
        checkpoint, skipped = load_latest(path / "checkpoints")
        if checkpoint is None:
            why = "; ".join(skipped) or f"no {path / 'checkpoints'}/step_* in it"
            raise UserError(f"{path} holds no complete checkpoint: {why}")
    groups = checkpoint.tensors
    networks = {role: groups[role] for role in ROLES if role in groups}
    if not networks:
        raise UserError(f"{checkpoint.path} holds no network but {listing(groups)}")
    contents = Contents(networks, groups.get("loss", {}).get("center"), [], ours=True)
    return checkpoint.path, checkpoint.state["step"], contents


def _without_classifier(state: StateDict) -> StateDict:
    return {key: tensor for key, tensor in state.items() if key not in CLASSIFIER}
