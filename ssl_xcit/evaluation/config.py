"""The settings of the evaluations, one class per command in eval/."""

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
class FrozenConfig:
    """Classify images by the features of a frozen network."""

    train: str = ""
    """Labelled images to learn from: a .beton, or a folder of class folders (read by Pillow)."""
    test: str = ""
    """Labelled images to classify: a .beton, or a folder of class folders."""
    checkpoint: str = ""
    """Run folder or checkpoint whose backbone makes the features."""
    arch: str = ""
    """Architecture of --random-init, or of a checkpoint that does not say its own."""
    random_init: bool = False
    """Baseline: the untrained network of --arch."""
    role: Literal["teacher", "student"] = "teacher"
    """Which network of a run."""
    prefix: str = ""
    """What the names of the network begin with, if the checkpoint has several: model.student."""
    features: tuple[Features, ...] = ("cls",)
    """Class token, mean patch token, both, or what enters the last n layers of class attention."""
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
    """bf16 or fp16 autocast, or float32; auto takes the fastest on this machine."""
    seed: int = 0
    """Of --random-init."""
    out: str = ""
    """JSON file for the result."""

    def __post_init__(self) -> None:
        if self.random_init or self.arch:
            check_arch(self.arch)
        check(self, ">= 1", "resize", "crop", "batch_size")
        check(self, ">= 0", "num_workers")
        check(self, "in [0, 2^63)", "seed")
        if self.crop > self.resize:
            raise UserError(f"crop must be <= resize ({self.resize}), got {self.crop}")
        check_choices(self, "features")


def check_given(config: object, *names: str) -> None:
    """Raise UserError unless every named setting has a value."""
    missing = [f"--{name}" for name in names if not getattr(config, name)]
    if missing:
        raise UserError(f"missing {', '.join(missing)} (--help describes every option)")


def check_choices(config: object, *names: str) -> None:
    """Raise UserError unless every named setting has at least one value, and none twice."""
    for name in names:
        values = getattr(config, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"{name} must name at least one value, each once, got {values}")


@dataclass(frozen=True, kw_only=True)
class KnnConfig(FrozenConfig):
    """Classify images by the k nearest neighbours of their frozen features."""

    pixels: bool = False
    """Baseline: the pixels themselves."""
    k: tuple[int, ...] = (10, 20, 100, 200)
    """Neighbours that vote; one result for each."""
    temperature: tuple[float, ...] = (0.07,)
    """A neighbour of cosine similarity s has exp(s / temperature) votes; one result for each."""
    save_features: str = ""
    """Folder for the features, stored as they are made: the same command continues after a kill."""
    load_features: str = ""
    """Folder of --save-features: search again, without images or checkpoint."""

    def __post_init__(self) -> None:
        sources = [bool(self.checkpoint), self.random_init, self.pixels, bool(self.load_features)]
        if sum(sources) != 1:
            raise UserError(
                "give exactly one of --checkpoint, --random-init (with --arch), --pixels and "
                f"--load-features, got {sum(sources)} of them"
            )
        if not self.load_features:
            check_given(self, "train", "test")
        elif self.train or self.test or self.save_features:
            raise UserError(
                "--load-features needs no --train, --test or --save-features: drop them"
            )
        super().__post_init__()
        check(self, ">= 1", "k")
        check(self, "> 0", "temperature")
        check_choices(self, "k", "temperature")


@dataclass(frozen=True, kw_only=True)
class LinearConfig(FrozenConfig):
    """Classify images by linear classifiers of their frozen features.

    official: DINO's protocol, SGD on random views, for every learning rate and kind of feature at
    once; fast: the features of central views once, then logistic regression for every strength of
    regularisation and kind of feature. Both choose on images held out of --train, and the chosen
    classifier meets --test once.
    """

    mode: Literal["both", "official", "fast"] = "both"
    """Protocols to follow: official takes hours and a .beton to train on, fast takes minutes."""
    features: tuple[Features, ...] = ("cls", "cls+patch", "inputs1", "inputs2")
    """Kinds of features to choose from; XCiT's published numbers are for cls alone."""
    evaluate: str = ""
    """Train nothing: test this classifier, a folder with our linear.json or DINO's linear file."""
    held_out: float = 0.1
    """Share of --train on which to choose; 0 = none, with one kind of feature, lr and l2."""
    lr: tuple[float, ...] = (1e-4, 3e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Official: learning rates to choose from, for 256 images per step (scaled linearly)."""
    epochs: int = 100
    """Official: epochs of training."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Official: share of the image's area that a random crop covers: low, high."""
    l2: tuple[float, ...] = (1.0, 0.1, 0.01, 0.001, 1e-4, 1e-5, 1e-6)
    """Fast: strengths to choose from; l2 / 2 x the weights' squared norm joins the mean loss."""
    iterations: int = 300
    """Fast: most iterations of L-BFGS for one strength."""
    interpolation: Interpolation = "bicubic"
    """How images are resized for the central crop; random crops are bilinear."""
    batch_size: int = 256
    """Images per step, over all ranks."""
    seed: int = 0
    """Random seed of the split, views, order, initial weights and --random-init."""
    save_every: float = 10.0
    """Official: minutes between saves, besides those at the end of each epoch."""
    out: str = ""
    """Folder for the result, the classifiers, and what a killed evaluation continues from."""

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == self.random_init:
            raise UserError("give exactly one of --checkpoint and --random-init (with --arch)")
        check_given(self, *(["test"] if self.evaluate else ["train", "test", "out"]))
        if self.evaluate and self.train:
            raise UserError("--evaluate trains nothing: drop --train")
        super().__post_init__()
        check(self, ">= 1", "epochs", "iterations")
        check(self, "> 0", "lr", "l2", "save_every")
        check(self, "in (0, 1]", "scale")
        check_range(self, "scale")
        check(self, "in [0, 1)", "held_out")
        grids = {"both": ("lr", "l2"), "official": ("lr",), "fast": ("l2",)}[self.mode]
        check_choices(self, *grids)
        for name in ("features", *grids):
            count = len(getattr(self, name))
            if self.held_out == 0 and count > 1 and not self.evaluate:
                raise UserError(
                    f"held_out must be above 0 to choose among {count} values of {name}, got 0: "
                    "name one"
                )


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig:
    """Classify images by a checkpoint's own classifier, and compare with the published accuracy.

    Evaluates one --checkpoint, or every published model in a folder (--all). --list needs no
    images: it shows the published models, and parameters and FLOPs of our own networks.
    """

    data: str = ""
    """Labelled images: a .beton, or a folder of class folders (read by Pillow)."""
    checkpoint: str = ""
    """File, run folder or checkpoint with a classifier."""
    model: str = ""
    """Its name in --list; by default recognised by the name or sha256 of the file."""
    resolution: int = 0
    """Side of the images, pixels; 0 = that of the published model."""
    all: str = ""
    """Folder: evaluate every file in it that is a published model."""
    list: bool = False
    """Show the published models, and parameters and FLOPs of our own networks beside theirs."""
    preprocess: Literal["mmpretrain", "full-crop"] = "mmpretrain"
    """mmpretrain: at 224 short side 256 and central crop, at 384 stretched to a square; full-crop:
    central crop of the whole short side, as XCiT's --full_crop and timm."""
    classes: str = ""
    """Names of all classes, if --data has only some of them: a folder of class folders, or a text
    file with a name first in each line."""
    role: Literal["teacher", "student", "model", "model_ema"] = "teacher"
    """Which network of a checkpoint with several; teacher: the first one if it has no teacher."""
    prefix: str = ""
    """What the names of the network begin with, if the checkpoint has several: model.student."""
    batch_size: int = 128
    """Images per forward pass and rank."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32; auto takes the fastest on this machine."""
    out: str = ""
    """JSON file for the result; with --all also a table beside it (.md), and no file done twice."""

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
        if not self.list:
            check_given(self, *(["data", "out"] if self.all else ["data"]))
        if self.all and (self.model or self.resolution):
            raise UserError("--all takes model and resolution from the files: drop both options")
        if self.all and not self.out.endswith(".json"):
            raise UserError(f"out must end in .json with --all, got {self.out}")
        check(self, ">= 1", "batch_size")
        check(self, ">= 0", "num_workers", "resolution")
