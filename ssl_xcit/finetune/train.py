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
from ssl_xcit.data.views import EvalView
from ssl_xcit.evaluation.accuracy import count_hits
from ssl_xcit.evaluation.features import evaluating
from ssl_xcit.evaluation.results import (
    Result,
    count_classes,
    describe_images,
    describe_machine,
    describe_subject,
    describe_view,
    run_evaluation,
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

COLUMNS = (("weights", 16), ("top-1 %", 10), ("top-5 %", 10))


def finetune(config: FinetuneConfig) -> dict:
    """Fine-tune as `config` says, in the run folder `config.out`.

    Prints a table, and returns what it writes to result.json there: top-1 and top-5 in percent of
    the weights after the last epoch (with `ema_decay`, of their average, and of both by name), and
    everything that decided them. No best epoch is chosen: the test images would choose it.

    Order of precedence for the weights: 1. the newest complete checkpoint in the run folder;
    2. `init`; 3. random initialisation from `seed`.

    Raises UserError for what the user can correct.
    """

    def train(ranks: Distributed) -> Result:
        with out_of_memory_advice(config, f"--image_size {config.views.image_size}"):
            torch.use_deterministic_algorithms(config.run.deterministic)
            task = Finetuning(config, ranks)
            return task.result(run_task(task))

    return run_evaluation(train, config.run.device, Path(config.out) / "result.json")


class Finetuning(Task):
    """A backbone and a classifier that learn labels."""

    kind = "fine-tuning"

    def __init__(self, config: FinetuneConfig, ranks: Distributed) -> None:
        """Make the network, the optimiser and the loaders of a run, as it starts."""
        self.configure(config, ranks)
        config = self.config
        targets = config.targets
        self.data = Beton(config.data)
        self.test = open_images(config.test, self.data.channels)
        check_datasets(self.data, self.test)
        check_channels(self.data.channels, self.test)
        self.num_classes = count_classes(self.data)
        self.start = starting_point(config, self.num_classes, self.data.channels)
        self.statistics = self.start.statistics
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
            path, arch = targets.teacher, targets.teacher_arch
            teacher = load_teacher(path, arch, self.num_classes, self.statistics)
            self.teacher = teacher.to(ranks.device)
        self._open_loaders()

    def _open_loaders(self) -> None:
        config, ranks, views = self.config, self.ranks, self.config.views
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
            mean=self.statistics[0],
            std=self.statistics[1],
        )
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{config.data}: an epoch of {len(self.data)} views is less than one global batch "
                f"of {self.global_batch}: use a smaller batch"
            )
        size = config.evaluation.eval_size or views.image_size
        self.test_view = EvalView(config.evaluation.eval_resize or size, size, views.interpolation)
        batch_size, num_threads = config.evaluation.eval_batch, config.run.num_workers
        self.test_loader = evaluation_loader(
            self.test, self.test_view, batch_size, ranks, num_threads=num_threads
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps that show as many views as there are images, whatever `repeated_augment` is."""
        return len(self.loader) // self.config.views.repeated_augment

    def hyperparameters(self, step: int) -> dict[str, float]:
        """Learning rate and weight decay at `step`. (XCiT's code updates once per epoch.)"""
        optim, steps = self.config.optim, self.total_steps
        peak = optim.lr * self.global_batch / optim.lr_batch
        warmup = optim.warmup_epochs * self.steps_per_epoch
        lr = schedules.cosine(step, peak, optim.min_lr, steps, warmup, optim.warmup_lr)
        return {"lr": lr, "weight_decay": optim.weight_decay}

    def loss(
        self, batch: tuple[Tensor, ...], step: int, micro: int, now: dict[str, float]
    ) -> StepLoss:
        """Cross-entropy with smoothed, mixed labels, and the distillation loss if there is one."""
        targets = self.config.targets
        place = self.loader.place(micro)
        images, answers, keys = self.prepare(batch, step // self.steps_per_epoch, step, place)
        with self.autocast():
            logits = self.model(images, keys).float()
        loss = F.cross_entropy(logits, answers, label_smoothing=targets.label_smoothing)
        if self.teacher is not None:
            with self.autocast():
                taught = self.teacher(images).float()
            distilled = distillation_loss(targets.distill, logits, taught, targets.distill_temp)
            loss = (1 - targets.distill_alpha) * loss + targets.distill_alpha * distilled
        return StepLoss(loss)

    def after_update(
        self, now: dict[str, float], means: Float[Tensor, " m"], bad: Bool[Tensor, ""]
    ) -> None:
        """Share BatchNorm's statistics among the ranks, then update the moving average."""
        if not self.config.run.sync_bn:
            distributed.all_reduce_buffers(self.modules())
        if self.average is not None:
            self.average.update(self.bare_model, skip=bad)

    def modules(self) -> list[nn.Module]:
        """The network."""
        return [self.bare_model]

    def evaluates(self, epoch: int) -> bool:
        """Whether to evaluate on the test images after `epoch`."""
        last = epoch + 1 == self.config.optim.epochs
        return last or (epoch + 1) % self.config.evaluation.eval_every == 0

    def evaluate(self, check: Callable[[], None]) -> dict[str, float]:
        """Top-1 and top-5 of the weights, and of their average where there is one."""
        networks = {"": self.bare_model}
        if self.average is not None:
            networks["ema_"] = self.average.network
        found = {}
        precision = self.config.run.precision
        for name, network in networks.items():
            batches = Checked(self.test_loader, check)
            with evaluating(network):
                hits = count_hits(network, batches, self.statistics, self.ranks, precision)
            found |= {f"test/{name}{key}": value for key, value in hits.percent().items()}
        return found

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
            "arch": self.start.facts["arch"],
            "num_classes": self.num_classes,
            "class_names": list(names) if names else None,
            "mean": self.statistics[0],
            "std": self.statistics[1],
            "image_size": self.config.views.image_size,
        }

    def summary(self) -> str:
        """What is about to happen, in one line."""
        config = self.config
        size = sum(p.numel() for p in self.bare_model.parameters()) / 1e6
        return (
            f"{self.start.facts['arch']} ({size:.1f} M parameters, {self.num_classes} classes) on "
            f"{self.ranks.device} x {self.ranks.world_size}: {config.optim.epochs} epochs of "
            f"{self.steps_per_epoch} steps, {self.global_batch} views a step"
        )

    def result(self, row: dict) -> Result:
        """The last logged row, and everything that decided it."""
        reported = "ema_" if self.average is not None else ""
        measured = {key.replace("/", "_"): row[key] for key in row if key.startswith("test/")}
        facts = {
            **self.start.facts,
            "top1": row[f"test/{reported}top1"],
            "top5": row[f"test/{reported}top5"],
            "weights": "moving average" if reported else "last",
            **measured,
            "train_loss": row["train/loss"],
            "epochs": self.config.optim.epochs,
            "steps": self.total_steps,
            "global_batch": self.global_batch,
            "transform": describe_view(self.test_view, *self.statistics),
            "train": describe_images(self.data),
            "test": describe_images(self.test),
            "precision": self.config.run.precision,
            **describe_machine(self.ranks),
        }
        heading = [
            f"fine-tuning, start: {describe_subject(facts)}",
            f"{len(self.test):,} test images, {len(self.data):,} training images, "
            f"{facts['train']['classes']:,} classes, {facts['epochs']} epochs",
        ]
        rows = [
            [name, f"{measured[f'{key}top1']:.2f}", f"{measured[f'{key}top5']:.2f}"]
            for name, key in (("last", "test_"), ("moving average", "test_ema_"))
            if f"{key}top1" in measured
        ]
        return Result(facts, heading, COLUMNS, rows)
