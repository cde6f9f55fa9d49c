"""Supervised fine-tuning: `finetune(config)`, and the task it gives to the engine."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ssl_xcit.checkpoints.folder import StateDict
from ssl_xcit.data.beton import Beton
from ssl_xcit.data.datasets import check_channels, check_datasets, evaluation_loader, open_images
from ssl_xcit.data.loader import MultiCropLoader
from ssl_xcit.data.pixels import normalise
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.results import (
    describe_images,
    describe_software,
    describe_subject,
    write_result,
)
from ssl_xcit.finetune.average import WeightAverage
from ssl_xcit.finetune.batch import Preparation, view_recipe
from ssl_xcit.finetune.config import FinetuneConfig
from ssl_xcit.finetune.distillation import distillation_loss, load_teacher
from ssl_xcit.finetune.start import starting_point
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.distributed import Distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.training import schedules
from ssl_xcit.training.engine import out_of_memory_advice, run_task
from ssl_xcit.training.optim import build_optimizer, layer_scales, parameter_groups
from ssl_xcit.training.task import Checked, StepLoss, Task, distribute, share_batch_statistics


def finetune(config: FinetuneConfig) -> dict:
    """Fine-tune as `config` says, in the run folder `config.out`.

    Prints a table and returns what it also writes to result.json there: top-1 and top-5 in percent
    of the last epoch's weights (with `ema_decay` of their average, and of both by name), and
    everything that decided them. The best epoch is not chosen: that would be choosing by the test
    images.

    Order of precedence for the weights: 1. the newest complete checkpoint in the run folder;
    2. `init`; 3. random initialisation from `seed`.

    Raises UserError for what the user can mend.
    """
    ranks = distributed.setup(config.run.device)
    try:
        with out_of_memory_advice(config, f"--image_size {config.views.image_size}"):
            torch.use_deterministic_algorithms(config.run.deterministic)
            task = Finetuning(config, ranks)
            result = task.result(run_task(task))
    finally:
        distributed.teardown()
    if ranks.rank == 0:
        write_result(result, Path(config.out) / "result.json")
        print(_table(result))
    return result


class Finetuning(Task):
    """A backbone and a classifier that learn labels."""

    kind = "fine-tuning"

    def __init__(self, config: FinetuneConfig, ranks: Distributed) -> None:
        """Network, optimiser and loaders of a run, from its starting point."""
        self.configure(config, ranks)
        config = self.config
        targets = config.targets
        self.data = Beton(config.data)
        self.test = open_images(config.test, self.data.channels)
        check_datasets(self.data, self.test)
        check_channels(self.data.channels, self.test)
        names = self.data.class_names
        self.num_classes = len(names) if names else int(self.data.labels.max()) + 1
        self.start = starting_point(config, self.num_classes, self.data.channels)
        self.statistics = self.start.mean, self.start.std
        if ranks.rank == 0:
            print("\n".join(self.start.report))
        network = share_batch_statistics(self.start.network, ranks, config.run.sync_bn)
        network = network.to(ranks.device).train()
        decay = config.model.ema_decay
        self.average = WeightAverage(network, decay) if decay else None
        network.activation_checkpointing = config.run.activation_checkpointing
        network.compiled = config.run.compile
        scales = layer_scales(len(network.blocks), config.optim.layer_decay)
        groups = parameter_groups(network, undecayed=("cls_token",), lr_scale=scales)
        self.optimizer = build_optimizer("adamw", groups)
        self.model = distribute(network, ranks)
        self.prepare = Preparation(
            config, self.data.labels, self.num_classes, self.statistics, ranks.device
        )
        self.teacher = None
        if targets.distill != "none":
            self.teacher = load_teacher(
                targets.teacher, targets.teacher_arch, self.num_classes, self.statistics
            ).to(ranks.device)
        self._open_loaders()

    def _open_loaders(self) -> None:
        config, ranks, views = self.config, self.ranks, self.config.views
        mean, std = self.statistics
        self.loader = MultiCropLoader(
            self.data,
            view_recipe(config),
            config.optim.batch_size_per_gpu // views.repeated_augment,
            seed=config.seed,
            rank=ranks.rank,
            world_size=ranks.world_size,
            accumulation_steps=config.optim.accumulation_steps,
            num_threads=config.run.num_workers,
            dtype=self.prepare.dtype,
            mean=mean,
            std=std,
        )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{config.data}: an epoch of {len(self.data)} views is less than one global batch "
                f"of {self.global_batch}: use a smaller batch"
            )
        size = config.evaluation.eval_size or views.image_size
        self.test_view = EvalView(config.evaluation.eval_resize or size, size, views.interpolation)
        self.test_loader = evaluation_loader(
            self.test,
            self.test_view,
            config.evaluation.eval_batch,
            ranks,
            num_threads=config.run.num_workers,
            mean=mean,
            std=std,
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show as many views as there are images, with repeats or without."""
        return len(self.loader) // self.config.views.repeated_augment

    def hyperparameters(self, step: int) -> dict[str, float]:
        """What the schedules say at `step`. (XCiT's code moves once per epoch.)"""
        optim = self.config.optim
        peak = optim.lr * self.global_batch / optim.lr_batch
        warmup = optim.warmup_epochs * self.steps_per_epoch
        return {
            "lr": schedules.cosine(
                step, peak, optim.min_lr, self.total_steps, warmup, optim.warmup_lr
            ),
            "weight_decay": optim.weight_decay,
        }

    def loss(
        self, batch: tuple[Tensor, ...], step: int, micro: int, now: dict[str, float]
    ) -> StepLoss:
        """Cross-entropy with smoothed, mixed labels, and the teacher's part if there is one."""
        targets = self.config.targets
        place = self.loader.place(micro)
        images, answers, keys = self.prepare(batch, step // self.steps_per_epoch, step, place)
        teacher_logits = None
        with self.autocast():
            logits = self.model(images, keys).float()
            if self.teacher is not None:
                teacher_logits = self.teacher(images).float()
        loss = F.cross_entropy(logits, answers, label_smoothing=targets.label_smoothing)
        if teacher_logits is not None:
            taught = distillation_loss(
                targets.distill, logits, teacher_logits, targets.distill_temp
            )
            loss = (1 - targets.distill_alpha) * loss + targets.distill_alpha * taught
        return StepLoss(loss)

    def after_update(
        self, now: dict[str, float], means: Float[Tensor, " m"], bad: Bool[Tensor, ""]
    ) -> None:
        """Statistics that the ranks share, then the moving average."""
        if not self.config.run.sync_bn:
            distributed.all_reduce_buffers(self.modules())
        if self.average is not None:
            self.average.update(self.bare_model, skip=bad)

    def modules(self) -> list[nn.Module]:
        """The network."""
        return [self.bare_model]

    def evaluates(self, epoch: int) -> bool:
        """Whether the test images are due."""
        last = epoch + 1 == self.config.optim.epochs
        return last or (epoch + 1) % self.config.evaluation.eval_every == 0

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """Top-1 and top-5 of the weights, and of their average where there is one."""
        networks = {"": self.bare_model}
        if self.average is not None:
            networks["ema_"] = self.average.network
        return {
            f"test/{name}{key}": value
            for name, network in networks.items()
            for key, value in self._accuracy(network, check).items()
        }

    @torch.no_grad()
    def _accuracy(self, network: nn.Module, check: Callable[[], None]) -> dict[str, float]:
        """{"top1", "top5"} in percent, over all ranks."""
        found = torch.zeros(3, dtype=torch.float64)  # right at first, within five, images
        training = network.training
        network.eval()
        for images, labels, _ in Checked(self.test_loader, check):
            images = normalise(images.to(self.ranks.device, non_blocking=True), *self.statistics)
            with self.autocast():
                logits = network(images)
            ranked = logits.float().topk(min(5, self.num_classes), dim=1).indices.cpu()
            right = ranked == labels[:, None]
            found += torch.tensor([right[:, 0].sum(), right.sum(), len(labels)])
        network.train(training)
        distributed.all_reduce_mean(found)
        top1, top5 = (100 * found[:2] / found[2]).tolist()
        return {"top1": top1, "top5": top5}

    def tensors(self) -> dict[str, StateDict]:
        """The network, and the average of its weights."""
        tensors = {"model": self.bare_model.state_dict()}
        if self.average is not None:
            tensors["model_ema"] = self.average.network.state_dict()
        return tensors

    def load(self, tensors: dict[str, StateDict]) -> None:
        """Inverse of `tensors`."""
        self.bare_model.load_state_dict(tensors["model"])
        if self.average is not None:
            self.average.network.load_state_dict(tensors["model_ema"])

    def facts(self) -> dict:
        """What a reader of a checkpoint needs to classify images."""
        names = self.data.class_names
        return {
            "arch": self.start.arch,
            "num_classes": self.num_classes,
            "class_names": list(names) if names else None,
            "mean": self.start.mean,
            "std": self.start.std,
            "image_size": self.config.views.image_size,
        }

    def summary(self) -> str:
        """What is about to happen, in one line."""
        config = self.config
        size = sum(p.numel() for p in self.bare_model.parameters()) / 1e6
        return (
            f"{self.start.arch} ({size:.1f} M parameters, {self.num_classes} classes) on "
            f"{self.ranks.device} x {self.ranks.world_size}: {config.optim.epochs} epochs of "
            f"{self.steps_per_epoch} steps, {self.global_batch} views a step"
        )

    def result(self, row: dict) -> dict:
        """The last logged row and all that decided it."""
        reported = "ema_" if self.average is not None else ""
        return {
            **self.start.facts,
            "top1": row[f"test/{reported}top1"],
            "top5": row[f"test/{reported}top5"],
            "weights": "moving average" if reported else "last",
            **{key.replace("/", "_"): row[key] for key in row if key.startswith("test/")},
            "train_loss": row["train/loss"],
            "epochs": self.config.optim.epochs,
            "steps": self.total_steps,
            "global_batch": self.global_batch,
            "transform": {
                "resize": self.test_view.resize,
                "crop": self.test_view.size,
                "interpolation": self.test_view.interpolation,
                "mean": self.start.mean,
                "std": self.start.std,
            },
            "train": describe_images(self.data),
            "test": describe_images(self.test),
            "precision": self.config.run.precision,
            "device": str(self.ranks.device),
            "ranks": self.ranks.world_size,
            "versions": describe_software(),
        }


def _table(result: dict) -> str:
    """The result as a table."""
    train, test = result["train"], result["test"]
    lines = [
        f"fine-tuning, start: {describe_subject(result)}",
        f"{test['images']:,} test images, {train['images']:,} training images, "
        f"{train['classes']:,} classes, {result['epochs']} epochs",
        f"{'weights':>16}{'top-1 %':>10}{'top-5 %':>10}",
    ]
    for name, key in (("last", "test_"), ("moving average", "test_ema_")):
        if f"{key}top1" in result:
            lines.append(f"{name:>16}{result[f'{key}top1']:>10.2f}{result[f'{key}top5']:>10.2f}")
    return "\n".join(lines)
