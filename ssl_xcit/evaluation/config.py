"""The configurations of the evaluations, one class per command in eval/."""

import difflib
from dataclasses import dataclass
from typing import Literal

from ssl_xcit.checkpoints.zoo import zoo
from ssl_xcit.data.views import Interpolation
from ssl_xcit.models.variants import check_arch
from ssl_xcit.runtime.config import Device, Precision, check, check_range
from ssl_xcit.runtime.errors import UserError

Features = Literal["cls", "patch", "cls+patch", "inputs1", "inputs2"]


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
    features: tuple[Features, ...] = ("cls",)
    """Class token, mean patch token, both, or what enters the last n layers of class attention."""
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
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32; auto takes the quickest of this machine."""
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
        for name in ("features", "k", "temperature"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must name at least one value, each once, got {values}")
        if self.crop > self.resize:
            raise UserError(f"crop must be <= resize ({self.resize}), got {self.crop}")


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Classify images by linear classifiers of their frozen features.

    official: DINO's protocol, SGD on random views, for every learning rate and kind of feature at
    once; fast: the features of central views once, then logistic regression for every strength of
    regularisation and kind of feature. Both choose by images held out of --train, and the chosen
    classifier meets --test once.
    """

    test: str
    """Labelled images to classify at the end: a .beton, or a folder of class folders."""
    train: str = ""
    """Labelled images to learn from: a .beton; for --mode fast a folder of class folders, too."""
    checkpoint: str = ""
    """Run folder or checkpoint whose backbone makes the features."""
    arch: str = ""
    """Architecture of --random-init, or of a checkpoint that does not say its own."""
    random_init: bool = False
    """Baseline: the untrained network of --arch."""
    role: Literal["teacher", "student"] = "teacher"
    """Whose weights are read from a run."""
    mode: Literal["both", "official", "fast"] = "both"
    """Protocols to follow: hours, minutes, or both side by side."""
    evaluate: str = ""
    """Train nothing: test this classifier, a folder with our linear.json or DINO's linear file."""
    features: tuple[Features, ...] = ("cls", "cls+patch", "inputs1", "inputs2")
    """Kinds of features to choose from; published numbers of XCiT are of cls alone."""
    held_out: float = 0.1
    """Share of --train that only chooses; 0 = none, with one kind and one value of each sort."""
    lr: tuple[float, ...] = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Official: learning rates to choose from, for 256 images per step (scaled linearly)."""
    epochs: int = 100
    """Official: length of the training."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Official: range of a random crop's share of the image."""
    l2: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6)
    """Fast: strengths to choose from; l2 / 2 x the weights' squared length joins the mean loss."""
    iterations: int = 300
    """Fast: at most this many of L-BFGS for one strength."""
    resize: int = 256
    """Shorter side after resizing, pixels; held-out and test images, fast: training images too."""
    crop: int = 224
    """Side of the central crop, and of official's random ones, pixels."""
    interpolation: Interpolation = "bicubic"
    """How images are resized for the central crop; random ones are bilinear."""
    batch_size: int = 256
    """Images per step, over all ranks."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32; auto takes the quickest of this machine."""
    seed: int = 0
    """Of the choice of held-out images, views, order, initial weights and --random-init."""
    save_every: float = 10.0
    """Official: minutes between saves, besides those at the end of each epoch."""
    out: str = ""
    """Folder for result, classifiers and what a killed run continues from."""

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == self.random_init:
            raise UserError("give exactly one of --checkpoint and --random-init (with --arch)")
        if self.random_init or self.arch:
            check_arch(self.arch)
        missing = [f"--{name}" for name in ("train", "out") if not getattr(self, name)]
        if missing and not self.evaluate:
            raise UserError(f"missing {', '.join(missing)} (--help describes every option)")
        if self.evaluate and self.train:
            raise UserError("--evaluate trains nothing: drop --train")
        check(self, ">= 1", "epochs", "iterations", "resize", "crop", "batch_size")
        check(self, ">= 0", "num_workers")
        check(self, "> 0", "lr", "l2", "save_every")
        check(self, "in (0, 1]", "scale")
        check_range(self, "scale")
        check(self, "in [0, 1)", "held_out")
        check(self, "in [0, 2^63)", "seed")
        grids = {"features": self.features}
        grids |= {"lr": self.lr} if self.mode != "fast" else {}
        grids |= {"l2": self.l2} if self.mode != "official" else {}
        for name, values in grids.items():
            if not values or len(set(values)) < len(values):
                raise UserError(f"{name} must name at least one value, each once, got {values}")
            if self.held_out == 0 and len(values) > 1 and not self.evaluate:
                raise UserError(
                    f"held_out must be above 0 to choose among {len(values)} values of {name}, "
                    "got 0: name one"
                )
        if self.crop > self.resize:
            raise UserError(f"crop must be <= resize ({self.resize}), got {self.crop}")


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
