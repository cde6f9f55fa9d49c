"""What a pretraining will cost, before it is paid for: operations, memory, steps and hours.

    python -m ssl_xcit.plan --arch xcit_small_12_p8 --gpus 64
    python -m ssl_xcit.plan --arch xcit_small_12_p16 --gpus 8 --batch_size_per_gpu 32 --tflops 989
    python -m ssl_xcit.plan --config runs/a/config.yaml --gpus 16

Takes every option, recipe and --config of main_dino.py; needs no images and no GPU. The work is
done by ssl_xcit/training_cost.py, training_memory.py and flops.py.
"""

from dataclasses import dataclass

from ssl_xcit.config import TrainConfig, check, run_command

IMAGENET = 1_281_167  # training images of ImageNet-1k


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Foretell what a pretraining costs; every option of main_dino.py, and the machine's."""

    data: str = ""
    """Not needed: --images says how many images there are."""
    out: str = ""
    """Not needed: nothing is written."""
    gpus: int = 8
    """Ranks."""
    images: int = IMAGENET
    """Training images; by default ImageNet-1k's."""
    tflops: float = 312.0
    """Of one GPU at its peak in the precision of the run, 10^12 FLOP/s (A100, dense bf16: 312)."""
    utilisation: float = 0.3
    """Share of the peak that the training reaches: an assumption until you have measured it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, ">= 1", "gpus", "images")
        check(self, "> 0", "tflops")
        check(self, "in (0, 1]", "utilisation")


if __name__ == "__main__":
    run_command(PlanConfig, "ssl_xcit.training_cost:print_plan", ["pretrain/{arch}.yaml"])
