"""BatchNorm whose batch is that of all ranks, also where torch's own SyncBatchNorm cannot run.

torch.nn.SyncBatchNorm is for CUDA tensors only. On the CPU, by gloo, the class below computes the
same from plain differentiable operations, so that what several ranks compute can be compared with
what one process does.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, on every rank.

    What is minimised is the sum of the ranks' losses, and each of them depends on the sum, so its
    gradient is the sum of all ranks' gradients.
    """

    @staticmethod
    def forward(ctx, tensor: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return _SumOverRanks.forward(ctx, gradient)


class CpuSyncBatchNorm(_BatchNorm):
    """nn.BatchNorm1d or 2d that, in training, normalises by the statistics of all ranks' batches.

        mean = sum_r sum x / N,  var = sum_r sum (x - mean)^2 / N,  N values per channel in all

    The running variance moves towards var N / (N - 1), as nn.BatchNorm's does.
    """

    def forward(self, x: Float[Tensor, "b c ..."]) -> Float[Tensor, "b c ..."]:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        others = [axis for axis in range(x.ndim) if axis != 1]
        sums = wide.sum(others)
        *_, count = counted = _SumOverRanks.apply(
            torch.cat((sums, sums.new_full((1,), wide.numel() // wide.shape[1])))
        )
        shape = [1, -1] + [1] * (x.ndim - 2)
        centred = wide - (mean := counted[:-1] / count).view(shape)
        var = _SumOverRanks.apply(centred.square().sum(others)) / count
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim not in (2, 4):
            raise ValueError(f"expected (b, c) or (b, c, height, width), got {tuple(x.shape)}")


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with every BatchNorm layer synchronised, its parameters and buffers the same ones."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = CpuSyncBatchNorm  # same state, other forward
    return model
