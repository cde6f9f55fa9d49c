"""The configuration of eval/supervised.py; see `ssl_xcit.config`."""

import difflib
from dataclasses import dataclass
from typing import Literal

from ssl_xcit.config import Device, Precision, check
from ssl_xcit.errors import UserError
from ssl_xcit.model_zoo import zoo


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Classify images by a checkpoint's own classifier, beside the published accuracy.

    Either one --checkpoint, or every published model that a folder holds (--all), or no images at
    all: --list shows the table of published models beside what our networks have and cost.
    """

    data: str = ""
    """Labelled images: a .beton, or a folder of class folders (read by Pillow)."""
    checkpoint: str = ""
    """File, run folder or checkpoint with a classifier."""
    model: str = ""
    """Its name in --list; by default told by the file's name or sha256."""
    resolution: int = 0
    """Side of the images, pixels, of a checkpoint that is no published model; 0 = the model's."""
    all: str = ""
    """Folder: evaluate every file in it that belongs to a published model."""
    list: bool = False
    """Show the published models, with parameters and FLOPs of our own networks beside theirs."""
    preprocess: Literal["mmpretrain", "full-crop"] = "mmpretrain"
    """mmpretrain: at 224 short side 256 and central crop, at 384 a square whatever the shape;
    full-crop: the whole short side and a central crop, as XCiT's --full_crop and timm."""
    classes: str = ""
    """Where --data has some of the classes only: all their names, as class folders or as the first
    words of a text file's lines."""
    role: Literal["teacher", "student", "model", "model_ema"] = "teacher"
    """Whose weights are read where a checkpoint has several; teacher: its first if it has none."""
    batch_size: int = 128
    """Images per forward pass and rank."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32; auto takes the quickest of this machine."""
    out: str = ""
    """JSON file for the result; with --all also a table beside it (.md), and nothing done twice."""

    def __post_init__(self) -> None:
        chosen = [bool(self.checkpoint), bool(self.all), self.list]
        if sum(chosen) != 1:
            raise UserError(
                f"give exactly one of --checkpoint, --all and --list, got {sum(chosen)} of them"
            )
        if self.model and self.model not in zoo():
            nearest = difflib.get_close_matches(self.model, zoo(), n=1, cutoff=0.0)[0]
            raise UserError(
                f"no published model is called {self.model}: nearest {nearest} (--list shows all)"
            )
        needed = {"checkpoint": ("data",), "all": ("data", "out"), "list": ()}
        mode = ("checkpoint", "all", "list")[chosen.index(True)]
        missing = [f"--{name}" for name in needed[mode] if not getattr(self, name)]
        if missing:
            raise UserError(f"missing {', '.join(missing)} (--help describes every option)")
        if self.all and (self.model or self.resolution):
            raise UserError("--all takes model and resolution from the files: drop both options")
        if self.all and not self.out.endswith(".json"):
            raise UserError(f"out must end in .json with --all, got {self.out}")
        check(self, ">= 1", "batch_size")
        check(self, ">= 0", "num_workers", "resolution")
