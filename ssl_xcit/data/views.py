"""Views: descriptions of random and evaluation views, and the recipes built from them.

A recipe is a list of groups of views; all views of a group have the same size and reach the model
as one array. `ssl_xcit.data.kernels` draws and computes them; each operation equals Pillow's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from ssl_xcit.runtime.errors import UserError

Interpolation = Literal["bicubic", "bilinear"]
FILTERS = get_args(Interpolation)


@dataclass(frozen=True)
class View:
    """A random view, in this order: crop, flip, (one of,) colour jitter, grayscale, blur, solarize.

    Each operation has a probability of its own, drawn per image and view. On images of other than 3
    channels saturation, hue and grayscale do nothing.

    Raises UserError for a value out of its range.
    """

    size: int  # pixels a side
    scale: tuple[float, float]  # range of the crop's area, relative to the image's
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of its width / height, log-uniform
    interpolation: Interpolation = "bicubic"  # antialiased, as in Pillow
    flip: float = 0.5  # probability of a horizontal flip
    jitter: float = 0.0  # probability of the four colour adjustments, in random order
    brightness: float = 0.0  # the factor is uniform in [max(0, 1 - x), 1 + x]
    contrast: float = 0.0  # likewise
    saturation: float = 0.0  # likewise
    hue: float = 0.0  # the shift is uniform in [-x, x] turns of the colour circle
    grayscale: float = 0.0  # probability of gray in all channels
    blur: float = 0.0  # probability of a Gaussian blur
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # range of its standard deviation, pixels
    solarize: float = 0.0  # probability of inverting values from 128 on
    one_of: bool = False
    """Exactly one of grayscale, solarize and blur, with equal probability and before the colour
    jitter; their own probabilities are ignored."""
    simple_crop: bool = False
    """Instead of the crop: resize the short side to `size` and cut out a square that may reach 4
    pixels over each edge, into the image's reflection. `scale` and `ratio` are ignored."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            _require(0 <= getattr(self, name) <= 1, self, name, "a probability in 0..1")
        for name in ("brightness", "contrast", "saturation"):
            _require(getattr(self, name) >= 0, self, name, "0 or more")
        least = 5 if self.simple_crop else 1  # a reflection of 4 pixels needs one more
        _require(self.size >= least, self, "size", f"at least {least} pixel(s)")
        _require(0 <= self.hue <= 0.5, self, "hue", "within 0..0.5")
        low, high = self.scale
        _require(0 < low <= high <= 1, self, "scale", "0 < low <= high <= 1")
        low, high = self.ratio
        _require(0 < low <= high, self, "ratio", "0 < low <= high")
        low, high = self.blur_sigma
        _require(0 <= low <= high, self, "blur_sigma", "0 <= low <= high")
        _require(self.interpolation in FILTERS, self, "interpolation", " or ".join(FILTERS))


@dataclass(frozen=True)
class EvalView:
    """A deterministic view: the short side resized to `resize`, then a central crop.

    Without `crop` the image is resized to a square of side `resize`, whatever its shape. Sizes are
    rounded as in torchvision's Resize and CenterCrop.

    Raises UserError for a value out of its range.
    """

    resize: int  # pixels
    crop: int | None = None  # pixels a side, at most `resize`
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        _require(self.resize >= 1, self, "resize", "at least 1 pixel")
        crop = self.resize if self.crop is None else self.crop
        _require(1 <= crop <= self.resize, self, "crop", f"within 1..resize = {self.resize}")
        _require(self.interpolation in FILTERS, self, "interpolation", " or ".join(FILTERS))

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.resize if self.crop is None else self.crop


Recipe = Sequence[Sequence[View]]


def dino_views(
    global_crops_size: int = 224,
    global_crops_scale: tuple[float, float] = (0.4, 1.0),
    local_crops_number: int = 8,
    local_crops_size: int = 96,
    local_crops_scale: tuple[float, float] = (0.05, 0.4),
    color_jitter_prob: float = 0.8,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.2,
    hue: float = 0.1,
    grayscale_prob: float = 0.2,
    global1_blur_prob: float = 1.0,
    global2_blur_prob: float = 0.1,
    local_blur_prob: float = 0.5,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_prob: float = 0.2,
    interpolation: Interpolation = "bicubic",
) -> list[list[View]]:
    """DINO's multi-crop (Caron et al., 2021, appendix; dino/main_dino.py DataAugmentationDINO).

    Returns two groups: two global views, of which only the second is solarized, and
    `local_crops_number` local views.
    """
    first = View(
        global_crops_size,
        global_crops_scale,
        interpolation=interpolation,
        jitter=color_jitter_prob,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        grayscale=grayscale_prob,
        blur=global1_blur_prob,
        blur_sigma=blur_sigma,
    )
    second = replace(first, blur=global2_blur_prob, solarize=solarize_prob)
    local = replace(first, size=local_crops_size, scale=local_crops_scale, blur=local_blur_prob)
    return [[first, second], [local] * local_crops_number]


def supervised_views(
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: Interpolation = "bicubic",
    simple_crop: bool = False,
) -> list[list[View]]:
    """One crop and flip: linear probes and plain fine-tuning."""
    return [[View(size, scale, interpolation=interpolation, simple_crop=simple_crop)]]


def three_augment_views(
    size: int = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    simple_crop: bool = False,
    jitter: float = 0.3,
    interpolation: Interpolation = "bicubic",
) -> list[list[View]]:
    """3-Augment (Touvron et al., "DeiT III", 2022, section 3): one view.

    A crop and flip; one of grayscale, solarize and blur; jitter of brightness, contrast and
    saturation. `simple_crop` is the paper's Simple Random Crop, else a random resized crop.
    """
    [[view]] = supervised_views(size, scale, interpolation, simple_crop)
    strengths = {"brightness": jitter, "contrast": jitter, "saturation": jitter}
    return [[replace(view, one_of=True, jitter=float(jitter > 0), **strengths)]]


def _require(holds: bool, view: View | EvalView, name: str, expected: str) -> None:
    if not holds:
        raise UserError(
            f"{type(view).__name__}.{name}: expected {expected}, got {getattr(view, name)}"
        )
