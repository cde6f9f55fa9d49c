"""BatchNorm over the batches of all ranks, on CPUs too.

torch.nn.SyncBatchNorm supports only CUDA tensors. The class below computes the same on the CPU,
over gloo, with plain differentiable operations, so that tests can compare several ranks with one
process.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class _SumOverRanks(torch.autograd.Function):
    """Differentiable all-reduce (sum).

    The objective is the sum of the ranks' losses. Each loss depends on the reduced sum, so the
    gradient of the sum is the sum of all ranks' gradients.
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
    """nn.BatchNorm1d or 2d that normalises training batches with the statistics of all ranks.

        mean = sum_r sum x / N,  var = sum_r sum (x - mean)^2 / N,  N values per channel in total

    The running variance is updated with var N / (N - 1), as in nn.BatchNorm.
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
    """Synchronise all BatchNorm layers of `model`; parameters and buffers stay the same objects."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.__class__ = CpuSyncBatchNorm  # same state, different forward
    return model
