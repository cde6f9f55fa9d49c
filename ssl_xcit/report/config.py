"""The settings of eval/visualize.py; see `ssl_xcit.runtime.config`."""

from dataclasses import dataclass
from typing import Literal

from ssl_xcit.models.variants import check_arch
from ssl_xcit.runtime.config import Device, Precision, check
from ssl_xcit.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Draw what a network sees in images: attention of each head, and patch tokens as colours.

    The checkpoint and the images may come first, without option names: RUN IMAGE... --out FOLDER
    """

    POSITIONAL = ("checkpoint", "images")

    checkpoint: str
    """Run folder or checkpoint of any format, including supervised ones."""
    images: tuple[str, ...]
    """Image files, folders of them, .beton files."""
    out: str
    """Folder for one PNG per image; a name ending in .png puts all images in one picture."""
    limit: int = 8
    """Images from each folder and .beton, evenly spread; 0 = all."""
    size: int = 0
    """Longest side of the network's input, pixels; the aspect ratio is kept, rounded to whole
    patches. 0 = as stored, at most 480. Larger inputs give finer maps."""
    heads: Literal["each", "mean"] = "each"
    """One map per head, or their mean."""
    scale: Literal["head", "shared"] = "head"
    """Range of the attention's colours: that of each head, or one for all heads of an image, which
    shows which heads are weak."""
    pca: Literal["image", "joint"] = "image"
    """Principal components of each image's patch tokens, or of all images' jointly, which makes
    colours comparable between images."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """Show patches as squares, or smoothed."""
    arch: str = ""
    """Architecture, if the checkpoint does not name it."""
    role: Literal["teacher", "student", "model", "model_ema"] = "teacher"
    """Which weights to read if a checkpoint has several; without a teacher, its first."""
    prefix: str = ""
    """What the names of the network begin with, if the checkpoint has several: model.student."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32; auto takes the fastest on this machine."""

    def __post_init__(self) -> None:
        if self.arch:
            check_arch(self.arch)
        check(self, ">= 0", "limit", "size")
        if not self.images:
            raise UserError("images must name at least one file or folder, got none")
