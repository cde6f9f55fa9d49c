"""The configurations of the evaluations, one class per command in eval/; see `ssl_xcit.config`."""

from dataclasses import dataclass
from typing import Literal

from ssl_xcit.config import Device, Interpolation, Precision, check, check_arch
from ssl_xcit.errors import UserError

Features = Literal["cls", "patch", "cls+patch"]


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """Classify images by the k nearest neighbours of their frozen features."""

    train: str = ""
    """Labelled images that vote: a .beton, or a folder of class folders (read by Pillow)."""
    test: str = ""
    """Labelled images that are classified: a .beton, or a folder of class folders."""
    checkpoint: str = ""
    """Run folder or checkpoint whose backbone makes the features."""
    arch: str = ""
    """Architecture of --random-init, or of a checkpoint that does not say its own."""
    random_init: bool = False
    """Baseline: the untrained network of --arch."""
    pixels: bool = False
    """Baseline: the pixels themselves."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote; one result for each."""
    temperature: tuple[float, ...] = (0.07,)
    """A neighbour of cosine similarity s has exp(s / temperature) votes; one result for each."""
    features: Features = "cls"
    """Class token, mean of the patch tokens, or both."""
    role: Literal["teacher", "student"] = "teacher"
    """Whose weights are read from a run."""
    resize: int = 256
    """Shorter side after resizing, pixels."""
    crop: int = 224
    """Side of the central crop, pixels."""
    interpolation: Interpolation = "bicubic"
    """How images are resized."""
    batch_size: int = 128
    """Images per forward pass and rank."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "fp32"
    """float32, or bf16 autocast."""
    seed: int = 0
    """Of --random-init."""
    save_features: str = ""
    """Folder for the features, stored as they are made: the same command continues after a kill."""
    load_features: str = ""
    """Folder of --save-features: the search alone, without images or checkpoint."""
    out: str = ""
    """JSON file for the result."""

    def __post_init__(self) -> None:
        sources = [bool(self.checkpoint), self.random_init, self.pixels, bool(self.load_features)]
        if sum(sources) != 1:
            raise UserError(
                "give exactly one of --checkpoint, --random-init (with --arch), --pixels and "
                f"--load-features, got {sum(sources)} of them"
            )
        missing = [f"--{name}" for name in ("train", "test") if not getattr(self, name)]
        if missing and not self.load_features:
            raise UserError(f"missing {', '.join(missing)} (--help describes every option)")
        if self.load_features and (self.save_features or len(missing) < 2):
            raise UserError(
                "--load-features needs no --train, --test or --save-features: drop them"
            )
        if self.random_init or self.arch:
            check_arch(self.arch)
        check(self, ">= 1", "k", "resize", "crop", "batch_size")
        check(self, ">= 0", "num_workers")
        check(self, "> 0", "temperature")
        check(self, "in [0, 2^63)", "seed")
        if not (self.k and self.temperature):
            raise UserError("k and temperature must name at least one number, got none")
        if self.crop > self.resize:
            raise UserError(f"crop must be <= resize ({self.resize}), got {self.crop}")
