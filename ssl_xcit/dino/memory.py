"""Memory of a pretraining step, found by running the step on tensors without contents.

torch's FakeTensorMode dispatches every operator of the forward passes, the loss, the backward pass
and the optimiser, but computes none; the bytes of all live storages are summed after each. The
estimate therefore follows from the model's own code and includes whatever an operator keeps for its
gradient. It takes seconds at any size, and no memory.

Not counted, because no operator returns it: scratch memory of operators, the allocator's rounding
and fragmentation, the CUDA context, NCCL's buffers, the loader, and the effects of torch.compile.
benchmarks/plan_memory.py measures the first two on a CPU: the plan is 0.4 to 3.2 % above the peak
of the process in float32, and up to 10 % below it in bf16, whose CPU kernels make copies.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssl_xcit.dino.algorithm import Settings, micro_batch
from ssl_xcit.dino.config import TrainConfig
from ssl_xcit.dino.loss import DINOLoss
from ssl_xcit.dino.networks import MultiCropWrapper, dino_network
from ssl_xcit.models.layers import FourierPositions
from ssl_xcit.runtime.precision import planned
from ssl_xcit.training.optim import build_optimizer, clip_gradients, parameter_groups


class TrainingMemory(NamedTuple):
    """Bytes on one rank. The first six stay; the last two are added, one after the other."""

    student: int  # parameters and BatchNorm's running statistics
    teacher: int
    centre: int
    optimizer: int
    images: int  # the views of a micro-batch in float32; on a GPU also as uint8
    gradients: int  # 0 if they exist only from the backward pass to the update
    passes: int  # peak of the rest in forward and backward passes: activations, logits, gradients
    update: int  # peak of the rest in the update: temporaries, gradients that do not stay

    @property
    def resident(self) -> int:
        """Bytes that stay allocated between steps."""
        return sum(self[:6])

    @property
    def peak(self) -> int:
        """The most bytes alive at any time of a step."""
        return self.resident + max(self.passes, self.update)


def training_memory(config: TrainConfig, world_size: int, cuda: bool) -> TrainingMemory:
    """Memory of one rank of `world_size`.

    Gradients stay if several micro-batches accumulate, and in DistributedDataParallel's buckets; a
    single rank frees them after each update. bf16 autocast casts as on CPUs, which for these
    operators is as on GPUs.
    """
    precision = planned(config.run.precision, cuda)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, precision=precision))
    _prepare_positions(config)
    with torch.device("meta"):
        student, teacher = dino_network(config), dino_network(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        student, teacher = student.to_empty(device="cpu"), teacher.to_empty(device="cpu")
        teacher.requires_grad_(False)
        # On a CPU, drop path skips samples, but which ones depends on contents that these tensors
        # do not have. To within 2 %, a step that skips none needs the most memory, provided that
        # it computes each size of crops apart, as drop path does there. A GPU joins the sizes and
        # skips no sample.
        student.backbone.activation_checkpointing = config.run.activation_checkpointing
        if cuda:
            student.backbone.join_sizes = not config.run.activation_checkpointing
        elif config.model.drop_path_rate > 0:
            student.backbone.join_sizes = False
        student.backbone.drop_path_rate = teacher.backbone.drop_path_rate = 0.0
        n, channels = config.optim.batch_size_per_gpu, config.model.in_chans
        crops = [torch.empty(v, n, channels, side, side) for v, side in crop_groups(config)]
        loss = DINOLoss(config.head.out_dim)
        optimizer = build_optimizer(config.optim.optimizer, parameter_groups(student))
        optimizer.found_inf = torch.zeros(())
        trained = [p for p in student.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()  # allocates its moments
        moments = [t for state in optimizer.state.values() for t in state.values()]
        moments = [tensor for tensor in moments if isinstance(tensor, Tensor)]
        gradients = _bytes(trained)
        stay = world_size > 1 or config.optim.accumulation_steps > 1
        if not stay:
            optimizer.zero_grad(set_to_none=True)
        held = [*_tensors(student), *_tensors(teacher), loss.center, *crops, *moments]
        with LiveBytes([*held, *_gradients(trained)]) as passes:
            forward_backward(config, student, teacher, loss, crops)
        with LiveBytes([*held, *_gradients(trained)]) as update:
            clip_gradients(trained, config.optim.clip_grad, config.optim.clip_mode)
            optimizer.step()
    networks = _tensors(student)
    # On a GPU the teacher is updated in one piece, after gradients that do not stay are freed.
    teacher_move = _bytes(student.parameters()) if cuda else 0
    return TrainingMemory(
        student=_bytes(networks),
        teacher=_bytes(networks),
        centre=_bytes([loss.center]),
        optimizer=_bytes(moments),
        images=_bytes(crops) * 5 // 4 if cuda else _bytes(crops),
        gradients=gradients if stay else 0,
        passes=passes.peak,
        update=max(update.peak + (0 if stay else gradients), teacher_move),
    )


def forward_backward(
    config: TrainConfig,
    student: MultiCropWrapper,
    teacher: MultiCropWrapper,
    dino_loss: DINOLoss,
    crops: list[Tensor],
) -> None:
    """Run one micro-batch of a logged step, which needs the most memory."""
    settings = Settings(
        config.loss.teacher_temp, config.run.precision, crops_in_turn=config.crops.crops_in_turn
    )
    found = micro_batch(student, teacher, dino_loss, crops, None, settings, with_health=True)
    found.loss.backward()


def crop_groups(config: TrainConfig) -> list[tuple[int, int]]:
    """(views, side in pixels) for each size of crops; the global crops come first."""
    crops = config.crops
    groups = [(2, crops.global_crops_size), (crops.local_crops_number, crops.local_crops_size)]
    return [group for group in groups if group[0]]


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of the live storages that operators create; `peak` is the largest sum.

    A storage counts until neither Python nor autograd refers to it. Those of `held` do not count.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._held = list(held)
        self._known = {tensor.untyped_storage()._cdata for tensor in self._held}

    def __torch_dispatch__(
        self, operator: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _prepare_positions(config: TrainConfig) -> None:
    # The model caches the Fourier features of a grid. Fill the cache with real tensors, or a later
    # real forward pass would find tensors without contents.
    patch_size = int(config.arch.rpartition("_p")[2])
    for _, side in crop_groups(config):
        grid = -(-side // patch_size)
        FourierPositions(1)(grid, grid, torch.device("cpu"))


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
