"""Settings of a pretraining run. The defaults are those of the DINO paper and its main_dino.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssl_xcit.data.views import Interpolation
from ssl_xcit.models.variants import check_arch
from ssl_xcit.runtime import options
from ssl_xcit.runtime.config import check, check_range, over_recipes
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training.config import Run


@dataclass(frozen=True)
class Crops:
    """Views of an image"""

    global_crops_size: int = 224
    """Side of the two global views, pixels."""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Share of the image's area that a global view covers: low, high."""
    local_crops_number: int = 8
    """Local views per image; 0 trains on the two global views alone."""
    local_crops_size: int = 96
    """Side of the local views, pixels."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Share of the image's area that a local view covers: low, high."""
    interpolation: Interpolation = "bicubic"
    """How a crop is resized (antialiased, as Pillow does it)."""
    color_jitter_prob: float = 0.8
    """Probability of colour jitter, per view."""
    brightness: float = 0.4
    """Jitter: factor from [1 - this, 1 + this]."""
    contrast: float = 0.4
    """Jitter: factor from [1 - this, 1 + this]."""
    saturation: float = 0.2
    """Jitter: factor from [1 - this, 1 + this]."""
    hue: float = 0.1
    """Jitter: shift from [-this, this], in turns of the colour circle."""
    grayscale_prob: float = 0.2
    """Probability of grayscale, per view."""
    global1_blur_prob: float = 1.0
    """Probability of Gaussian blur, first global view."""
    global2_blur_prob: float = 0.1
    """Probability of Gaussian blur, second global view."""
    local_blur_prob: float = 0.5
    """Probability of Gaussian blur, local views."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, pixels: low, high."""
    solarize_prob: float = 0.2
    """Probability of solarisation, second global view."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Mean subtracted from each channel (pixel values in [0, 1])."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Standard deviation by which each channel is then divided."""
    crops_in_turn: bool = False
    """Finish the global crops' backward pass before the local crops' forward pass: less memory."""

    def __post_init__(self) -> None:
        check(self, ">= 1", "global_crops_size", "local_crops_size")
        check(self, ">= 0", "local_crops_number", "brightness", "contrast", "saturation")
        check(self, "in (0, 1]", "global_crops_scale", "local_crops_scale")
        check(self, "in [0, 1]", "color_jitter_prob", "grayscale_prob", "solarize_prob")
        check(self, "in [0, 1]", "global1_blur_prob", "global2_blur_prob", "local_blur_prob")
        check(self, "in [0, 0.5]", "hue")
        check(self, "> 0", "blur_sigma", "std")
        check_range(self, "global_crops_scale", "local_crops_scale", "blur_sigma")

    def view_arguments(self) -> dict[str, options.Value]:
        """Arguments of `data.views.dino_views`: the settings that decide how views are cut."""
        others = ("mean", "std", "crops_in_turn")
        return {k: v for k, v in options.flat(self).items() if k not in others}


@dataclass(frozen=True)
class Model:
    """Backbone"""

    drop_path_rate: float = 0.1
    """Stochastic depth of the student: the same rate in every block."""
    in_chans: int = 3
    """Channels of an image."""
    init_from: str = ""
    """Initial weights: a full checkpoint (ours or DINO's) or a backbone in any format."""
    init_prefix: str = ""
    """What the names of the network begin with, if init_from has several: model.student."""
    init_parts: Literal["all", "backbone"] = "all"
    """Load from init_from the backbone, head and center (if present), or only the backbone."""

    def __post_init__(self) -> None:
        check(self, "in [0, 1)", "drop_path_rate")
        check(self, ">= 1", "in_chans")


@dataclass(frozen=True)
class Head:
    """Projection head"""

    out_dim: int = 65536
    """Number of prototypes (outputs of the head). Fewer (1024 to 16384) suit small data."""
    norm_last_layer: bool = True
    """Keep the last layer's weights at unit norm; false is often better but less stable."""
    use_bn_in_head: bool = False
    """BatchNorm after the head's hidden layers."""
    head_layers: int = 3
    """Linear layers before the last one."""
    head_hidden_dim: int = 2048
    """Width of the hidden layers."""
    head_bottleneck_dim: int = 256
    """Width of the normalised vector that is compared with the prototypes."""

    def __post_init__(self) -> None:
        check(self, ">= 1", "out_dim", "head_layers", "head_hidden_dim", "head_bottleneck_dim")


@dataclass(frozen=True)
class Loss:
    """Loss and teacher"""

    student_temp: float = 0.1
    """Softmax temperature of the student."""
    warmup_teacher_temp: float = 0.04
    """Softmax temperature of the teacher at the start."""
    teacher_temp: float = 0.04
    """Softmax temperature of the teacher after its warm-up."""
    warmup_teacher_temp_epochs: int = 0
    """Epochs of the teacher temperature's warm-up."""
    center_momentum: float = 0.9
    """Momentum of the centre, which is subtracted from the teacher's logits."""
    momentum_teacher: float = 0.996
    """Momentum of the teacher at the start (cosine to 1); 0.9995 suits batches of 256."""

    def __post_init__(self) -> None:
        check(self, "> 0", "student_temp", "warmup_teacher_temp", "teacher_temp")
        check(self, ">= 0", "warmup_teacher_temp_epochs")
        check(self, "in [0, 1]", "center_momentum", "momentum_teacher")


@dataclass(frozen=True)
class Optim:
    """Optimisation"""

    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """Optimiser."""
    lr: float = 5e-4
    """Peak learning rate for a global batch of 256; scaled linearly with the global batch."""
    min_lr: float = 1e-6
    """Learning rate at the end (cosine), not scaled."""
    warmup_epochs: int = 10
    """Epochs of linear warm-up from 0."""
    weight_decay: float = 0.04
    """Weight decay at the start."""
    weight_decay_end: float = 0.4
    """Weight decay at the end (cosine)."""
    clip_grad: float = 3.0
    """Maximum gradient norm; 0 = no clipping."""
    clip_mode: Literal["parameter", "global"] = "parameter"
    """Clip by the norm of each parameter tensor (as DINO does) or by the global norm."""
    freeze_last_layer: int = 1
    """Epochs during which the head's last layer stays as initialised."""
    epochs: int = 100
    """Passes over the training images."""
    batch_size_per_gpu: int = 64
    """Images per rank and micro-batch."""
    accumulation_steps: int = 1
    """Micro-batches per step. Global batch = batch_size_per_gpu x accumulation_steps x ranks."""

    def __post_init__(self) -> None:
        check(self, "> 0", "lr")
        check(self, ">= 0", "min_lr", "warmup_epochs", "weight_decay", "weight_decay_end")
        check(self, ">= 0", "clip_grad", "freeze_last_layer")
        check(self, ">= 1", "epochs", "batch_size_per_gpu", "accumulation_steps")


@dataclass(frozen=True)
class Probe:
    """k-NN probe during training"""

    every: int = 0
    """Epochs between two probes; 0 = none."""
    probe_train: str = ""
    """Labelled training images of the k-NN: a .beton or a folder of class folders."""
    probe_test: str = ""
    """Labelled test images of the k-NN: a .beton or a folder of class folders."""
    probe_k: int = 20
    """Number of neighbours, k."""
    probe_resize: int = 256
    """Shorter side after resizing, pixels."""
    probe_crop: int = 224
    """Side of the central crop, pixels."""
    probe_limit: int = 10_000
    """Maximum number of images of each set, a random subset fixed by the seed; 0 = all."""

    def __post_init__(self) -> None:
        check(self, ">= 0", "every", "probe_limit")
        check(self, ">= 1", "probe_k", "probe_resize", "probe_crop")
        if self.probe_crop > self.probe_resize:
            raise UserError(
                f"probe_crop must be <= probe_resize ({self.probe_resize}), got {self.probe_crop}"
            )
        if self.every and not (self.probe_train and self.probe_test):
            raise UserError(
                f"probe.every is {self.every}, so probe_train and probe_test must be given"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain an XCiT with DINO on the images in a .beton file."""

    arch: str
    """xcit_SIZE_p16 or xcit_SIZE_p8 with SIZE one of nano_12, tiny_12, tiny_24, small_12, small_24,
    medium_24, large_24; loads its recipe from configs/pretrain/."""
    data: str
    """The .beton file with the images (written by ssl-xcit data write)."""
    out: str
    """Run folder; the same command continues the run in it."""
    seed: int = 0
    """Random seed of the whole run."""
    crops: Crops = field(default_factory=Crops)
    model: Model = field(default_factory=Model)
    head: Head = field(default_factory=Head)
    loss: Loss = field(default_factory=Loss)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    probe: Probe = field(default_factory=Probe)

    def __post_init__(self) -> None:
        check_arch(self.arch)
        check(self, "in [0, 2^63)", "seed")
        for name in ("mean", "std"):
            value = getattr(self.crops, name)
            if len(value) != self.model.in_chans:
                raise UserError(
                    f"{name} must have in_chans = {self.model.in_chans} numbers, got "
                    f"{options.as_text(value)}"
                )
        if self.crops.crops_in_turn and self.head.use_bn_in_head:
            raise UserError(
                "head.use_bn_in_head normalises over all views at once, but crops.crops_in_turn "
                "processes them size by size: switch one of them off"
            )


def read_crops(path: str | Path) -> Crops:
    """Read the view settings from a --config file: a recipe, or a run's config.yaml.

    Other settings may be missing from the file. Raises UserError.
    """
    values = options.read_file(TrainConfig, Path(path))
    values = over_recipes(TrainConfig, ["pretrain/{arch}.yaml"], values)
    return Crops(**options.nested(values).get("crops", {}))


IMAGENET = 1_281_167  # training images of ImageNet-1k


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Predict the cost of a pretraining run. Takes main_dino.py's options and the machine's."""

    data: str = ""
    """Not used: --images gives the number of images."""
    out: str = ""
    """Not used: nothing is written."""
    gpus: int = 8
    """Number of GPUs (ranks)."""
    images: int = IMAGENET
    """Number of training images (default: ImageNet-1k)."""
    tflops: float = 312.0
    """Peak 10^12 FLOP/s of one GPU in the precision of the run (A100, dense bf16: 312)."""
    utilisation: float = 0.3
    """Fraction of the peak that training reaches: an assumption until you measure it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, ">= 1", "gpus", "images")
        check(self, "> 0", "tflops")
        check(self, "in (0, 1]", "utilisation")
