"""The settings of fine-tuning; see `ssl_xcit.runtime.config`.

The defaults are XCiT's supervised recipe (main.py of facebookresearch/xcit), except for what
depends on the data; where a default differs, its text says so.
"""

from dataclasses import dataclass, field
from typing import Literal

from ssl_xcit.data.views import Interpolation
from ssl_xcit.models.variants import check_arch
from ssl_xcit.runtime.config import check, check_range
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.config import Run


@dataclass(frozen=True)
class FinetuneModel:
    """Network"""

    drop_path_rate: float = 0.0
    """Stochastic depth: the same rate in every block. XCiT: 0 tiny_12, 0.05 small_12, 0.1 small_24,
    0.15 medium_24."""
    keep_head: bool = False
    """Keep the classifier of --init, which must have as many classes, instead of a new one."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is evaluated too and reported as the result;
    0 = none. (XCiT: 0.99996, stored but never evaluated.)"""

    def __post_init__(self) -> None:
        check(self, "in [0, 1)", "drop_path_rate", "ema_decay")


@dataclass(frozen=True)
class Views:
    """Images and their augmentation"""

    image_size: int = 224
    """Side of the training views, pixels."""
    augment: Literal["3augment", "randaugment", "plain"] = "randaugment"
    """After crop and flip: 3-Augment of DeiT III, RandAugment, or nothing."""
    simple_crop: bool = False
    """Crop a square from the image resized to image_size, instead of a random resized crop."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Share of the image's area that a random resized crop covers: low, high."""
    interpolation: Interpolation = "bicubic"
    """How images are resized (antialiased, as Pillow does it)."""
    color_jitter: float = 0.3
    """3augment: brightness, contrast and saturation change by factors in [1 - this, 1 + this]."""
    randaugment_ops: int = 2
    """RandAugment: operations per image."""
    randaugment_magnitude: int = 9
    """RandAugment: strength, 0 to 30."""
    random_erasing: float = 0.25
    """Probability that a rectangle of the view becomes noise."""
    repeated_augment: int = 1
    """Views of each image in a batch. An epoch still has as many views as there are images: with R
    views each, it shows one in R images, others in each epoch. (XCiT: 3.)"""
    mean: tuple[float, ...] = ()
    """Subtracted from each channel; by default the mean that --init was trained with, else that of
    ImageNet."""
    std: tuple[float, ...] = ()
    """Each channel is divided by this afterwards; default as for mean."""

    def __post_init__(self) -> None:
        check(self, ">= 1", "image_size", "randaugment_ops", "repeated_augment")
        check(self, ">= 0", "color_jitter", "randaugment_magnitude")
        check(self, "in (0, 1]", "crop_scale")
        check(self, "in [0, 1]", "random_erasing")
        check(self, "> 0", "std")
        check_range(self, "crop_scale")
        if self.randaugment_magnitude > 30:
            raise UserError(
                f"randaugment_magnitude must be in 0..30, got {self.randaugment_magnitude}"
            )
        if len(self.mean) != len(self.std):
            raise UserError(
                f"mean and std need one number per channel each, got {len(self.mean)} and "
                f"{len(self.std)}"
            )


@dataclass(frozen=True)
class Targets:
    """Targets of the loss"""

    label_smoothing: float = 0.1
    """Share of the target spread over all classes."""
    mixup: float = 0.8
    """Mixup: lambda ~ Beta(this, this); 0 = none."""
    cutmix: float = 1.0
    """CutMix: lambda ~ Beta(this, this); 0 = none."""
    mix_prob: float = 1.0
    """Probability that a micro-batch is mixed."""
    mix_switch_prob: float = 0.5
    """Probability of CutMix rather than mixup, if both are on."""
    distill: Literal["none", "hard", "soft"] = "none"
    """Also learn from a teacher: its most likely class (hard) or its probabilities (soft)."""
    teacher: str = ""
    """The teacher's weights: an XCiT with its classifier, or a file for --teacher_arch."""
    teacher_arch: str = ""
    """torchvision:NAME for a torchvision model, such as torchvision:regnet_y_16gf."""
    distill_alpha: float = 0.5
    """Weight of the distillation loss; that of the labels has the rest."""
    distill_temp: float = 1.0
    """soft: temperature of both softmaxes."""

    def __post_init__(self) -> None:
        check(self, "in [0, 1)", "label_smoothing")
        check(self, ">= 0", "mixup", "cutmix")
        check(self, "in [0, 1]", "mix_prob", "mix_switch_prob", "distill_alpha")
        check(self, "> 0", "distill_temp")
        if (self.distill == "none") != (not self.teacher):
            raise UserError(
                f"give --distill hard or soft and --teacher PATH, or neither; got distill "
                f"{self.distill} and teacher {self.teacher or 'nothing'}"
            )
        if self.teacher_arch and not self.teacher_arch.startswith("torchvision:"):
            raise UserError(
                f"teacher_arch must be torchvision:NAME, got {self.teacher_arch}; leave it out for "
                "an XCiT teacher"
            )


@dataclass(frozen=True)
class FinetuneOptim:
    """Optimisation (AdamW)"""

    lr: float = 5e-4
    """Peak learning rate for a global batch of lr_batch; scaled linearly with the global batch."""
    lr_batch: int = 512
    """The global batch that lr is meant for."""
    min_lr: float = 1e-5
    """Learning rate at the end (cosine), not scaled."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up, not scaled."""
    warmup_epochs: int = 5
    """Epochs of linear warm-up."""
    weight_decay: float = 0.05
    """Weight decay of all parameters but vectors, biases and the cls token."""
    layer_decay: float = 1.0
    """Learning rate of each layer over that of the layer above it; 1 = all equal."""
    clip_grad: float = 0.0
    """Largest gradient norm; 0 = no clipping."""
    clip_mode: Literal["parameter", "global"] = "global"
    """Norm of each parameter tensor or of all of them together."""
    epochs: int = 100
    """Passes over the images. (XCiT from scratch: 400.)"""
    batch_size_per_gpu: int = 64
    """Views per rank and micro-batch; a multiple of repeated_augment."""
    accumulation_steps: int = 1
    """Micro-batches per step. Global batch = batch_size_per_gpu x accumulation_steps x ranks."""

    def __post_init__(self) -> None:
        check(self, "> 0", "lr")
        check(self, ">= 0", "min_lr", "warmup_lr", "warmup_epochs", "weight_decay", "clip_grad")
        check(self, "in (0, 1]", "layer_decay")
        check(self, ">= 1", "lr_batch", "epochs", "batch_size_per_gpu", "accumulation_steps")


@dataclass(frozen=True)
class Evaluation:
    """Evaluation on the test images"""

    eval_every: int = 1
    """Epochs between two evaluations; there is always one at the end."""
    eval_size: int = 0
    """Side of the central crop, pixels; 0 = image_size."""
    eval_resize: int = 0
    """Shorter side before the crop, pixels; 0 = eval_size, which keeps the whole short side (XCiT's
    --full_crop)."""
    eval_batch: int = 128
    """Images per forward pass and rank."""

    def __post_init__(self) -> None:
        check(self, ">= 1", "eval_every", "eval_batch")
        check(self, ">= 0", "eval_size", "eval_resize")


@dataclass(frozen=True)
class FinetuneConfig:
    """Train an XCiT and a classifier on labelled images, from a checkpoint or from scratch."""

    data: str
    """The .beton file with the labelled training images."""
    test: str
    """Labelled images to classify: a .beton, or a folder of class folders."""
    out: str
    """The run folder; the same command again continues the run in it."""
    arch: str = ""
    """Architecture for --from_scratch; with --init it is read from the checkpoint."""
    init: str = ""
    """Run folder or checkpoint file to start from."""
    from_scratch: bool = False
    """Start from random weights of --arch."""
    role: Literal["teacher", "student", "model", "model_ema"] = "teacher"
    """Which network of --init: teacher or student of a pretraining; model or model_ema of a
    fine-tuning, where teacher means the one it reported."""
    prefix: str = ""
    """What the names of the network begin with, if the checkpoint has several: model.student."""
    seed: int = 0
    """Random seed of the whole run."""
    model: FinetuneModel = field(default_factory=FinetuneModel)
    views: Views = field(default_factory=Views)
    targets: Targets = field(default_factory=Targets)
    optim: FinetuneOptim = field(default_factory=FinetuneOptim)
    evaluation: Evaluation = field(default_factory=Evaluation)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if bool(self.init) == self.from_scratch:
            raise UserError(
                "give exactly one of --init PATH and --from_scratch (with --arch), got "
                + ("both" if self.init else "neither")
            )
        if self.arch or self.from_scratch:
            check_arch(self.arch)
        if self.model.keep_head and self.from_scratch:
            raise UserError("keep_head needs the classifier of an --init")
        check(self, "in [0, 2^63)", "seed")
        repeats, batch = self.views.repeated_augment, self.optim.batch_size_per_gpu
        if batch % repeats:
            raise UserError(
                f"batch_size_per_gpu must be a multiple of repeated_augment = {repeats}, "
                f"got {batch}"
            )
        size = self.evaluation.eval_size or self.views.image_size
        if self.evaluation.eval_resize and self.evaluation.eval_resize < size:
            raise UserError(
                f"eval_resize must be >= the crop ({size}), got {self.evaluation.eval_resize}"
            )
