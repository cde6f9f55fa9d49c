"""Converts weights between all formats and checks the result; shows what a file holds.

    ssl-xcit checkpoint convert FILE OUT --to timm
    ssl-xcit checkpoint info FILE

The written file is read again before it gets its name: all tensors must come back bit for bit. For
an export, which has no names to compare, the logits at two resolutions must agree.
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ssl_xcit.checkpoints.formats import CLASSIFIER, StateDict, to_mmpretrain, to_timm
from ssl_xcit.checkpoints.read import Weights, read, read_linear_weights
from ssl_xcit.checkpoints.tensor_file import sealed_metadata
from ssl_xcit.models.xcit import build_xcit
from ssl_xcit.runtime.errors import UserError, exit_on_user_error
from ssl_xcit.runtime.files import make_folder, new_file

# Target -> the endings its file may have.
TARGETS = {
    "official": (".pth", ".pt"),
    "mmpretrain": (".pth", ".pt"),
    "timm": (".pth", ".pt", ".safetensors"),
    "dino": (".pth", ".pt"),
    "safetensors": (".safetensors",),
    "onnx": (".onnx",),
    "torchexport": (".pt2",),
}
EXPORTS = ("onnx", "torchexport")  # graphs, whose weights cannot be read back

# (images, height, width) of the comparison: several batch sizes, not only squares.
SHAPES = ((1, 64, 64), (3, 96, 48))
# Other programs sum in another order. Measured: a few 1e-7, for logits around 1.
EXPORT_TOLERANCE = 1e-4


class Converted(NamedTuple):
    """What `convert` did."""

    weights: Weights  # of the source
    path: Path
    tensors: int  # in the file written; 0 for an export
    left_out: list[str]  # names of tensors that the target cannot hold
    difference: float  # the largest between outputs before and after


def convert(
    source: Path | str,
    out: Path | str,
    to: str,
    *,
    role: str = "teacher",
    arch: str = "",
    prefix: str = "",
    overwrite: bool = False,
) -> Converted:
    """Write the network that `ssl_xcit.checkpoints.read.read` finds in `source` as `to`.

    `to` is one of `TARGETS`: official `{"model": ...}`; mmpretrain `{"state_dict": ...}`; timm, a
    flat state dict, or .safetensors if `out` ends so; dino, flat without classifier ("backbone
    only"); safetensors under the official names; onnx and torchexport, graphs for any number and
    size of images. The file appears complete and verified, or not at all.

    Raises UserError for a source that cannot be read, an `out` that exists or has another ending,
    packages that are missing, and outputs that differ.
    """
    out = Path(out)
    if out.suffix not in TARGETS[to]:
        raise UserError(f"--to {to} writes {' or '.join(TARGETS[to])}, not {out.name}")
    packages = ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ()
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise UserError(f"this needs {', '.join(missing)}: pip install {' '.join(missing)}")
    original = read(source, role, arch, prefix)
    weights = dataclasses.replace(original, state=original.backbone) if to == "dino" else original
    left_out = [key for key in CLASSIFIER if key in original.state.keys() - weights.state.keys()]
    model = weights.build()
    make_folder(out.parent)
    with new_file(out, overwrite) as file:
        tensors = 0
        if to in EXPORTS:
            again = _export(model, file, to)
        else:
            tensors = _write_tensors(weights, to, file)
            again = _read_again(weights, Path(file.name))
        difference = _largest_difference(model, again)
        if not difference <= (EXPORT_TOLERANCE if to in EXPORTS else 0):
            raise UserError(
                f"{source} written as {to} gives outputs that differ by {difference:.1e}: "
                "nothing was kept of it"
            )
    return Converted(original, out, tensors, left_out, difference)


def layout(state: StateDict, to: str) -> dict[str, Tensor] | dict[str, StateDict]:
    """The content of a .pth of format `to`: the state dict renamed, in the entry it belongs in."""
    if to == "timm":
        return to_timm(state)
    if to == "mmpretrain":
        return {"state_dict": to_mmpretrain(state)}
    return {"model": state} if to == "official" else state


def _write_tensors(weights: Weights, to: str, file: BinaryIO) -> int:
    # A .pth stores shared memory and strides: each tensor gets a contiguous copy of its own.
    plain = {
        key: tensor.clone(memory_format=torch.contiguous_format)
        for key, tensor in weights.state.items()
    }
    content = layout(plain, to)
    try:
        if ".safetensors" in Path(file.name).suffixes:
            facts = {"format": "pt", "arch": weights.arch, "role": weights.role}
            if not weights.statistics_assumed:
                mean, std = weights.statistics
                facts |= {"mean": json.dumps(mean), "std": json.dumps(std)}
            file.write(save(content, metadata=sealed_metadata(content, facts)))
        else:
            known = to in ("official", "mmpretrain") and not weights.statistics_assumed
            mean, std = map(list, weights.statistics)
            torch.save(content | ({"mean": mean, "std": std} if known else {}), file)
        file.flush()
    except RuntimeError as error:  # torch's word for a full disk
        raise OSError(str(error).splitlines()[0]) from error
    return len(next(iter(content.values())) if to in ("official", "mmpretrain") else content)


def _read_again(weights: Weights, path: Path) -> nn.Module:
    """The network in the file just written, after comparing every bit of its tensors."""
    again = read(path, arch=weights.arch)
    different = [
        key
        for key, tensor in weights.state.items()
        if tensor.dtype != again.state[key].dtype or not _same_bits(tensor, again.state[key])
    ]
    if different:
        raise UserError(
            f"{path} was not written well: {', '.join(different[:3])} came back altered"
        )
    return again.build()


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    return torch.equal(a, b)


def _largest_difference(model: nn.Module, again: Callable[[Tensor], Tensor]) -> float:
    """Largest absolute difference of the outputs, for noise of all `SHAPES`; nan if one is."""
    generator = torch.Generator().manual_seed(0)
    in_chans = model.patch_embed.proj[0][0].in_channels
    differences = []
    for count, height, width in SHAPES:
        x = torch.randn(count, in_chans, height, width, generator=generator)
        with torch.inference_mode():
            differences.append((model(x) - again(x)).abs().max())
    return torch.stack(differences).max().item()


def _export(model: nn.Module, file: BinaryIO, to: str) -> Callable[[Tensor], Tensor]:
    """Write the graph of the network, for any number of images of any height and width above 16.

    Returns the network in the file.
    """
    any_size = torch.export.Dim.DYNAMIC
    example = torch.zeros(2, model.patch_embed.proj[0][0].in_channels, 64, 96)
    sizes = {"x": {0: any_size, 2: any_size, 3: any_size}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some torch versions warn of their own doing
        program = torch.export.export(model, (example,), dynamic_shapes=sizes)
        if to == "torchexport":
            torch.export.save(program, file)
            file.seek(0)
            return torch.export.load(file).module()
        import onnxruntime

        # its optimiser reports at length what it does not change
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        torch.onnx.export(
            program,
            (),
            file.name,
            input_names=["image"],
            output_names=["logits" if model.num_classes else "features"],
            external_data=False,
            verbose=False,
        )
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"image": x.numpy()})[0])


# What a file holds


def describe(path: Path | str, role: str = "teacher", prefix: str = "") -> dict[str, str]:
    """Format, architecture, role, tensors and checksum of whatever can be read, as text."""
    path = Path(path)
    try:
        weights = read(path, role, prefix=prefix)
    except UserError as error:
        try:
            weight, _ = read_linear_weights(path)
        except UserError:
            raise error from None
        features = f"{weight.shape[0]} classes of {weight.shape[1]} features"
        return {"format": "dino_linear", "linear": features, "sha256": _checksum(path)}
    classes = weights.num_classes
    with torch.device("meta"):
        model = build_xcit(weights.arch, num_classes=classes)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    others = [other for other in weights.roles if other != weights.role]
    facts = {
        "format": f"{weights.format} ({_container(path)})",
        "architecture": f"{weights.arch}, {parameters / 1e6:.2f} million parameters",
        "classifier": f"{classes} classes" if classes else "none",
        "role": weights.role + (f" (there is also: {', '.join(others)})" if others else ""),
        "tensors": str(weights.tensors),
    }
    if weights.step is not None:
        facts["step"] = str(weights.step)
    mean, std = weights.statistics
    assumed = " (ImageNet's, assumed)" if weights.statistics_assumed else ""
    facts["mean, std"] = f"{mean}, {std}{assumed}"
    if weights.dino_head:
        prototypes = len(weights.dino_head.get("last_layer.weight_v", ()))
        facts["DINO head"] = f"{len(weights.dino_head)} tensors, {prototypes} prototypes"
    if weights.ignored:
        facts["ignored"] = ", ".join(weights.ignored)
    file = path if path.is_file() else Path(weights.path) / f"{weights.role}.safetensors"
    return facts | {"sha256": _checksum(file)}


def _container(path: Path) -> str:
    if path.is_dir():
        return "folder"
    if path.suffix == ".safetensors":
        return "safetensors"
    return "torch zip" if zipfile.is_zipfile(path) else "torch legacy pickle"


def _checksum(path: Path) -> str:
    """The first 8 digits, by which OpenMMLab's and torch.hub's files are named."""
    with path.open("rb") as file:
        digits = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    named = re.search(r"-([0-9a-f]{8})\.\w+$", path.name)
    if named is None:
        return digits
    return digits + (" as in its name" if named[1] == digits else ", NOT as in its name: altered")


# The command


def _convert_command(args: argparse.Namespace) -> None:
    how = {name: getattr(args, name) for name in ("role", "arch", "prefix", "overwrite")}
    done = convert(args.source, args.out, args.to, **how)
    found = done.weights
    classes = f"{found.num_classes} classes" if found.num_classes else "no classifier"
    print(f"{found.path}: {found.format}, {found.arch}, {found.role}, {classes}")
    if found.ignored:
        print(f"  not converted, only for training: {', '.join(found.ignored)}")
    if done.left_out:
        print(f"  left out, no place in {args.to}: {', '.join(done.left_out)}")
    size, count = done.path.stat().st_size / 1e6, f"{done.tensors} tensors"
    what = "a graph" if args.to in EXPORTS else f"{count}, all read back bit for bit"
    print(f"{done.path}: {args.to}, {size:.1f} MB, {what}, sha256 {_checksum(done.path)}")
    output = "logit" if found.num_classes and not done.left_out else "feature"
    shapes = " and ".join(f"{count} x {height} x {width}" for count, height, width in SHAPES)
    print(f"  largest {output} difference {done.difference:.1e} (images: {shapes})")
    mean, std = found.statistics
    assumed = ", ImageNet's: the source states none" if found.statistics_assumed else ""
    print(f"  normalise images by mean {mean}, std {std}{assumed}")
    if args.to == "timm":
        # timm silently drops a classifier unless the overlay states its size too
        size = f"num_classes={found.num_classes}"
        print(
            f"  timm.create_model('{found.arch}_224', pretrained=True, {size}, "
            f"pretrained_cfg_overlay=dict(file={str(done.path)!r}, {size}, mean={mean}, std={std}))"
        )


def _info_command(args: argparse.Namespace) -> None:
    for name, value in describe(args.file, args.role, args.prefix).items():
        print(f"{name:<14}{value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssl-xcit checkpoint", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(required=True)

    change = commands.add_parser("convert", help="write weights in another format")
    change.set_defaults(run=_convert_command)
    change.add_argument("source", help="run folder, checkpoint folder, .pth or .safetensors")
    change.add_argument("out", help="file to write; it appears complete or not at all")
    change.add_argument("--to", choices=TARGETS, required=True, help="format to write")
    change.add_argument("--arch", default="", help="fail unless the source holds this architecture")
    change.add_argument("--overwrite", action="store_true", help="replace an existing file")

    info = commands.add_parser("info", help="print what a file holds")
    info.set_defaults(run=_info_command)
    info.add_argument("file", help="run folder, checkpoint folder, .pth or .safetensors")
    for command in (change, info):
        command.add_argument(
            "--role",
            default="teacher",
            choices=("teacher", "student", "model", "model_ema"),
            help="which of several networks (teacher; of a supervised training file, model)",
        )
        command.add_argument(
            "--prefix",
            default="",
            help="what the names of the network begin with, if there are several: model.student.",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; exit status 2 and one line on stderr for a user's mistake."""
    args = _parser().parse_args(argv)
    with exit_on_user_error():
        args.run(args)
