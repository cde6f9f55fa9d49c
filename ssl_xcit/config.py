"""The configuration: frozen dataclasses, and how a command fills them.

Precedence, weakest first:
1. the defaults below, which are those of the DINO paper (and of its main_dino.py);
2. the recipe under configs/, such as pretrain/{arch}.yaml;
3. files given by --config: YAML (nested or flat keys), a run's own config.yaml, a DINO args.txt;
4. flags: dotted (--optim.lr) or flat as in DINO (--lr), with - or _.

The string below a field is its text in --help.
"""

import difflib
import importlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssl_xcit import options, processor
from ssl_xcit.errors import UserError, exit_on_user_error
from ssl_xcit.options import Config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

ARCHITECTURES = tuple(
    f"xcit_{size}_p{patch}"
    for size in ("nano_12", "tiny_12", "tiny_24", "small_12", "small_24", "medium_24", "large_24")
    for patch in (16, 8)
)

# A run folder belongs to one configuration; these may differ when it is continued. The two batch
# fields are here because what a run fixes is their product with the number of ranks.
RUN_KEYS_THAT_MAY_CHANGE = frozenset(
    {
        "out",
        "optim.batch_size_per_gpu",
        "optim.accumulation_steps",
        "run.device",
        "run.num_workers",
        "run.compile",
        "run.activation_checkpointing",
        "crops.crops_in_turn",
        "head.prototype_chunk",
        "run.log_every",
        "run.save_every",
        "run.max_bad_steps",
        "run.stall_timeout",
        "run.keep_last",
        "run.saveckp_freq",
        "run.tensorboard",
        "run.wandb",
        "probe.every",
        "probe.probe_train",
        "probe.probe_test",
        "probe.probe_k",
        "probe.probe_resize",
        "probe.probe_crop",
        "probe.probe_limit",
    }
)

Interpolation = Literal["bicubic", "bilinear"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


# Bounds by their wording in an error message. NaN and infinity satisfy none of them.
BOUNDS = {
    "> 0": lambda number: 0 < number < math.inf,
    ">= 0": lambda number: 0 <= number < math.inf,
    ">= 1": lambda number: 1 <= number < math.inf,
    ">= 2": lambda number: 2 <= number < math.inf,
    "in [0, 0.5]": lambda number: 0 <= number <= 0.5,
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "in (0, 1]": lambda number: 0 < number <= 1,
    "in [0, 2^63)": lambda number: 0 <= number < 2**63,
}


def check(section: object, bound: str, *names: str) -> None:
    """Raise UserError unless every named number (every element of a tuple) satisfies `bound`."""
    for name in names:
        value = getattr(section, name)
        if not all(map(BOUNDS[bound], value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{name} must be {bound}, got {options.as_text(value)}")


def check_range(section: object, *names: str) -> None:
    """Raise UserError unless each named pair is (low, high) with low <= high."""
    for name in names:
        low, high = getattr(section, name)
        if low > high:
            raise UserError(f"{name} must be (low, high) with low <= high, got {low}, {high}")


def check_arch(arch: str) -> None:
    """Raise UserError, naming the nearest, unless `arch` is one of ARCHITECTURES."""
    if arch not in ARCHITECTURES:
        nearest = difflib.get_close_matches(arch, ARCHITECTURES, n=3, cutoff=0.0)
        raise UserError(
            f"arch must be one of the {len(ARCHITECTURES)} XCiT names, got {arch!r}: "
            f"nearest {', '.join(nearest)}"
        )


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
    """Subtracted from each channel (pixel values in [0, 1])."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Divides each channel after that."""
    crops_in_turn: bool = False
    """Global crops go through their backward pass before local ones are looked at: less memory."""

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
        """The arguments of `augment.dino_views`: all but what happens to the views."""
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
    """Start from these weights: a full checkpoint (a run's, DINO's) or a backbone of any format."""
    init_parts: Literal["all", "backbone"] = "all"
    """Of init_from: backbone, head and center as far as it holds them, or the backbone alone."""

    def __post_init__(self) -> None:
        check(self, "in [0, 1)", "drop_path_rate")
        check(self, ">= 1", "in_chans")


@dataclass(frozen=True)
class Head:
    """Projection head"""

    out_dim: int = 65536
    """Prototypes: outputs of the head. Fewer (1024 to 16384) suit small data."""
    norm_last_layer: bool = True
    """Keep the last layer's weights at unit norm; false often learns better, less stably."""
    use_bn_in_head: bool = False
    """BatchNorm after the head's hidden layers."""
    head_layers: int = 3
    """Linear layers before the last one."""
    head_hidden_dim: int = 2048
    """Width of the hidden layers."""
    head_bottleneck_dim: int = 256
    """Width of the normalised vector that the prototypes are compared with."""
    prototype_chunk: int = 0
    """Prototypes whose logits exist at a time, for memory independent of out_dim; 0: all."""

    def __post_init__(self) -> None:
        check(self, ">= 0", "prototype_chunk")
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
    """Epochs over which the teacher's temperature goes from one to the other."""
    center_momentum: float = 0.9
    """Momentum of the centre subtracted from the teacher's logits."""
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
    """Which optimiser."""
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
    """Largest gradient norm; 0 = no clipping."""
    clip_mode: Literal["parameter", "global"] = "parameter"
    """Norm of each parameter tensor (as DINO) or of all of them together."""
    freeze_last_layer: int = 1
    """Epochs during which the head's last layer stays as initialised."""
    epochs: int = 100
    """Passes over the images."""
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
class Run:
    """How it runs (no science)"""

    device: Device = "auto"
    """auto takes the GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 autocast, or float32 throughout; auto takes the quickest of this machine."""
    num_workers: int = 0
    """Loader threads per rank; 0 = this rank's share of the cores."""
    compile: bool = False
    """Compile the backbone (torch.compile)."""
    activation_checkpointing: bool = False
    """Compute the student's blocks again in the backward pass: less memory, a third more time."""
    log_every: int = 10
    """Steps between two log lines."""
    save_every: float = 15.0
    """Minutes between two checkpoints."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    saveckp_freq: int = 20
    """Epochs between two checkpoints that are kept for good; 0 = none."""
    sync_bn: bool = True
    """BatchNorm over the batches of all ranks; false: over each micro-batch."""
    max_bad_steps: int = 10
    """Steps in a row with a loss or gradient that is not finite before the run gives up."""
    stall_timeout: float = 600.0
    """Seconds that a rank waits for another before it says which one and ends; 0 = for ever."""
    deterministic: bool = False
    """The same bits on every run of a GPU too, at some cost of speed."""
    tensorboard: bool = False
    """Copy the log to TensorBoard, in the run folder's tensorboard/ (pip install tensorboard)."""
    wandb: str = ""
    """Copy the log to this project of Weights & Biases (pip install wandb)."""

    def __post_init__(self) -> None:
        check(self, ">= 0", "num_workers", "save_every", "saveckp_freq", "stall_timeout")
        check(self, ">= 1", "log_every", "max_bad_steps")
        check(self, ">= 2", "keep_last")


@dataclass(frozen=True)
class Probe:
    """k-NN probe during training"""

    every: int = 0
    """Epochs between two probes; 0 = none."""
    probe_train: str = ""
    """Labelled images that vote: a .beton or a folder of class folders."""
    probe_test: str = ""
    """Labelled images that are classified: a .beton or a folder of class folders."""
    probe_k: int = 20
    """Neighbours that vote."""
    probe_resize: int = 256
    """Shorter side after resizing, pixels."""
    probe_crop: int = 224
    """Side of the central crop, pixels."""
    probe_limit: int = 10_000
    """Images of each of the two to look at, at most: a subset drawn by the seed; 0 = all."""

    def __post_init__(self) -> None:
        check(self, ">= 0", "every", "probe_limit")
        check(self, ">= 1", "probe_k", "probe_resize", "probe_crop")
        if self.probe_crop > self.probe_resize:
            raise UserError(
                f"probe_crop must be <= probe_resize ({self.probe_resize}), got {self.probe_crop}"
            )
        if self.every and not (self.probe_train and self.probe_test):
            raise UserError(
                f"probe.every is {self.every}, so probe_train and probe_test must name betons"
            )


@dataclass(frozen=True)
class TrainConfig:
    """Pretrain an XCiT with DINO on the images of a .beton file."""

    arch: str
    """xcit_SIZE_p16 or xcit_SIZE_p8 with SIZE one of nano_12, tiny_12, tiny_24, small_12, small_24,
    medium_24, large_24; its recipe in configs/pretrain/ is loaded."""
    data: str
    """The .beton file with the images (python -m ssl_xcit.beton write makes one)."""
    out: str
    """The run folder; the same command again continues the run in it."""
    seed: int = 0
    """Of everything random."""
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
                "head.use_bn_in_head normalises over all views at once, crops.crops_in_turn takes "
                "them size by size: switch one of them off"
            )


@dataclass(frozen=True)
class SlurmConfig:
    """The job"""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """slurm; local = processes on this machine; debug = this very process."""
    dry_run: bool = False
    """Print the script that sbatch would be given and every setting; submit nothing."""
    runs: str = "runs"
    """Folder of run folders where --out does not say otherwise; all machines must share it."""
    images: str = ""
    """The .beton to pretrain on where --data does not say otherwise."""
    partition: str = ""
    """Partition; by default the cluster's own choice, as for the next three."""
    account: str = ""
    """Account that pays."""
    qos: str = ""
    """Quality of service."""
    constraint: str = ""
    """Kind of node."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs per machine, one process for each; 0 = on the CPU."""
    tasks_per_node: int = 0
    """Processes per machine; 0 = one for each GPU, or one on the CPU."""
    cpus_per_task: int = 10
    """Cores per process."""
    mem: float = 0.0
    """Memory per machine, GiB; 0 = the cluster's default."""
    time: float = 48.0
    """Time limit, hours; a job that reaches it saves, is queued again and goes on."""
    signal_delay: int = 120
    """Seconds before the limit at which the job is told to save and stop: a step and a save."""
    max_idle_attempts: int = 10
    """Attempts in a row that may begin at the same step; then the job gives up."""
    additional: str = ""
    """Any other option of sbatch, as "nodelist=n[1-4] exclusive"."""
    setup: str = ""
    """Lines of shell before the job's processes start, such as "module load cuda"."""
    eval: tuple[str, ...] = ()
    """Evaluations to submit, too, once the training has ended: knn, linear, finetune."""
    eval_train: str = ""
    """Labelled images to learn from in these; by default --probe_train."""
    eval_test: str = ""
    """Labelled images to classify in these; by default --probe_test."""
    sweep: tuple[str, ...] = ()
    """A job for each combination, as "optim.lr=2.5e-4,5e-4 seed=0,1"; --out holds their folders."""

    def __post_init__(self) -> None:
        check(self, ">= 1", "nodes", "cpus_per_task", "max_idle_attempts")
        check(self, ">= 0", "gpus_per_node", "tasks_per_node", "mem", "signal_delay")
        check(self, "> 0", "time")
        if self.cluster != "slurm" and self.nodes > 1:
            raise UserError(f"nodes must be 1 with cluster {self.cluster}, got {self.nodes}")
        if self.cluster == "slurm" and self.signal_delay >= 3600 * self.time:
            raise UserError(
                f"signal_delay must be < the time limit ({3600 * self.time:g} s), got "
                f"{self.signal_delay}"
            )


@dataclass(frozen=True)
class SubmitConfig(TrainConfig):
    """Submit the pretraining of an XCiT to SLURM; every option of main_dino.py, and the job's."""

    data: str = ""
    """The .beton file with the images, by default that of configs/slurm.yaml."""
    out: str = ""
    """The run folder, by default RUNS/ARCH; the same command again continues the run in it."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)


def run_command(
    cls: type[Config],
    target: str,
    files: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Body of a script: read the command line, then call `target` ("module:function") with it.

    The target is imported only once the configuration is known to be good. A UserError becomes
    one line on stderr and exit status 2.
    """
    with exit_on_user_error():
        config = load_config(cls, files, argv)
        processor.prepare()
        module, function = target.split(":")
        getattr(importlib.import_module(module), function)(config)


def load_config(
    cls: type[Config], files: Sequence[str] = (), argv: Sequence[str] | None = None
) -> Config:
    """A `cls` filled from its defaults < `files` < --config files < flags (argv, or sys.argv).

    `files` are paths under configs/; "{arch}" in them stands for the architecture that the flags
    or the --config files name. Raises UserError for anything wrong, SystemExit after --help.
    """
    flags, paths, wants_help = options.read_flags(cls, sys.argv[1:] if argv is None else argv)
    given: dict[str, options.Value] = {}
    for path in paths:
        given |= options.read_file(cls, path)
    given |= flags
    values = _over_recipes(cls, files, given)
    if wants_help:
        options.print_help(cls, values)
        raise SystemExit(0)
    return options.build(cls, values)


def _over_recipes(
    cls: type, files: Sequence[str], given: dict[str, options.Value]
) -> dict[str, options.Value]:
    """`given` over the values of `files`, see `load_config`."""
    recipe: dict[str, options.Value] = {}
    for name in files:
        if "{arch}" in name and "arch" in given:
            check_arch(given["arch"])
        elif "{arch}" in name:
            continue  # without --arch there is --help to show or an error to come, no recipe
        recipe |= options.read_file(cls, CONFIGS / name.format_map(given))
    return recipe | given


def read_config(cls: type[Config], path: str | Path) -> Config:
    """A `cls` from one file alone over the defaults: no recipe, no flags. Raises UserError."""
    return options.build(cls, options.read_file(cls, Path(path)))


def read_crops(path: str | Path) -> Crops:
    """The views of a training with this --config: a recipe, or a run's config.yaml.

    Nothing else need be in the file. Raises UserError.
    """
    values = options.read_file(TrainConfig, Path(path))
    values = _over_recipes(TrainConfig, ["pretrain/{arch}.yaml"], values)
    return Crops(**options.nested(values).get("crops", {}))


def save_config(config: object, path: str | Path) -> None:
    """Write every setting as YAML that reads back equal, floats to the last bit; atomically."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(
            "# Every setting of a run. To repeat it: --config THIS_FILE --out ANOTHER_FOLDER\n"
        )
        file.write(options.to_yaml(config))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def config_differences(old: object, new: object) -> list[str]:
    """What makes `new` another run than `old`: ["optim.lr: 0.0005 -> 0.001", ...].

    Leaves RUN_KEYS_THAT_MAY_CHANGE out, and the precision "auto", which is that of the run. Whether
    the global batch is the same depends on the number of ranks and is the caller's to check.
    """
    before, after = options.flat(old), options.flat(new)
    same = RUN_KEYS_THAT_MAY_CHANGE | {
        name for name in ("precision", "run.precision") if after.get(name) == "auto"
    }
    return [
        f"{name}: {options.as_text(before[name])} -> {options.as_text(value)}"
        for name, value in after.items()
        if value != before[name] and name not in same
    ]
