"""The configuration of eval/visualize.py; see `ssl_xcit.runtime.config`."""

from dataclasses import dataclass
from typing import Literal

from ssl_xcit.models.variants import check_arch
from ssl_xcit.runtime.config import Device, Precision, check
from ssl_xcit.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class VisualizeConfig:
    """Draw what a network sees in images: attention of each head, and patch tokens as colours.

    The checkpoint and the images may stand first, without their names: RUN IMAGE... --out FOLDER
    """

    POSITIONAL = ("checkpoint", "images")

    checkpoint: str
    """Run folder or checkpoint of any format, supervised ones too."""
    images: tuple[str, ...]
    """Image files, folders of them, .beton files."""
    out: str
    """Folder for a PNG per image; or, if it ends in .png, one picture of all of them."""
    limit: int = 8
    """Images of each folder and .beton, spread evenly over it; 0 = all."""
    size: int = 0
    """Longest side that the network sees, pixels; the shorter one follows, and both are rounded to
    whole patches. 0 = as stored, at most 480. Larger sides give finer maps."""
    heads: Literal["each", "mean"] = "each"
    """A map for each head, or the mean of all."""
    scale: Literal["head", "shared"] = "head"
    """Colours of the attention: over each head's own range, or one range for all heads of an image,
    which tells weak heads from strong ones."""
    pca: Literal["image", "joint"] = "image"
    """Principal components of each image's own patch tokens, or of all images' together, so that
    equal colours mean the same in all of them."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """Patches as the squares that they are, or smoothed."""
    arch: str = ""
    """Architecture of a checkpoint that does not say its own."""
    role: Literal["teacher", "student", "model", "model_ema"] = "teacher"
    """Whose weights are read where a checkpoint has several; teacher: its first if it has none."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32; auto takes the quickest of this machine."""

    def __post_init__(self) -> None:
        if self.arch:
            check_arch(self.arch)
        check(self, ">= 0", "limit", "size")
        if not self.images:
            raise UserError("images must name at least one file or folder, got none")
