"""The loss with its centre."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DINOLoss(nn.Module):
    """Cross entropy between teacher and student distributions of different views of an image.

    The buffer `center` (1, K) is the running mean of the teacher's logits that is subtracted from
    them; it starts at 0 and is the loss's only state.
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self,
        student_logits: Float[Tensor, "vn k"],
        teacher_logits: Float[Tensor, "tn k"],
        teacher_temp: float,
        views: range | None = None,
        total: int | None = None,
    ) -> Float[Tensor, ""]:
        """The loss, with the centre as it is: move it afterwards by `update_center`.

        Both logits are view-major; views 0 and 1 are the global ones, seen by both networks. The
        student's are of all V views, or of some `views` (0 and 1 both or neither) of `total`: then
        it is their part of the sum.

            for each sample b, each teacher view t in (0, 1), each student view v != t:
                q = softmax((teacher_logits[t, b] - center) / teacher_temp)
                p = softmax(student_logits[v, b] / student_temp)
                loss += -sum_k q[k] log p[k] / (n (2 V - 2))

        No gradient flows to the teacher. Computed and returned in float32 under autocast too
        (float64 from float64 logits). Starts near ln K; stuck there, the outputs are uniform.
        """
        n, remainder = divmod(len(teacher_logits), 2)
        views = range(len(student_logits) // n) if views is None else views
        total = len(views) if total is None else total
        assert remainder == 0, f"{len(teacher_logits)} teacher logits are not two views"
        assert total >= 2, f"{len(student_logits)} student logits for {n} samples"
        assert len(student_logits) == len(views) * n, "the views hold different numbers of samples"
        targets = teacher_probs(teacher_logits, self.center, teacher_temp)  # (2 n, k)
        return _CrossEntropy.apply(student_logits, targets, self.student_temp, views, total)

    @torch.no_grad()
    def update_center(
        self, teacher_logits_mean: Float[Tensor, "1 k"], skip: Bool[Tensor, ""] | None = None
    ) -> None:
        """center = m center + (1 - m) mean, once per step and after the step's losses.

        `teacher_logits_mean`: mean of the teacher's raw logits over both global views, all
        micro-batches and all ranks; the caller averages. Where `skip` is true nothing changes.
        """
        moved = self.center.lerp(
            teacher_logits_mean.to(self.center.dtype), 1 - self.center_momentum
        )
        self.center.copy_(moved if skip is None else torch.where(skip, self.center, moved))


class _CrossEntropy(torch.autograd.Function):
    """The mean over pairs of different views of -<q, log p>, its gradient made on the way.

    View by view, so that what is between the logits and the gradient stays in a CPU's cache:
    sum_k q_k = 1 makes the derivative of a view's terms by its logits (w p - q) / T, where q is the
    sum of the w targets that the view is compared with, 1 for a global and 2 for a local one.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        student_logits: Float[Tensor, "vn k"],
        targets: Float[Tensor, "tn k"],
        student_temp: float,
        views: range,
        total: int,
    ) -> Float[Tensor, ""]:
        n = len(targets) // 2
        first, second = targets.split(n)
        both = first + second if max(views) > 1 else None
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        pairs = n * (2 * total - 2)
        gradient = torch.empty_like(student_logits) if ctx.needs_input_grad[0] else None
        loss = targets.new_zeros((), dtype=dtype)
        for i, (view, logits) in enumerate(zip(views, student_logits.split(n), strict=True)):
            target = (second, first)[view] if view < 2 else both
            log_p = (logits.to(dtype) / student_temp).log_softmax(dim=1)
            loss -= (target * log_p).sum()
            if gradient is not None:
                by_view = log_p.exp_().mul_(1 if view < 2 else 2).sub_(target)
                rows = gradient[i * n : (i + 1) * n]
                torch.mul(by_view, 1 / (student_temp * pairs), out=rows)
        ctx.save_for_backward(gradient)
        return loss / pairs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Float[Tensor, ""]
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


@torch.no_grad()
def teacher_probs(
    teacher_logits: Float[Tensor, "b k"], center: Float[Tensor, "1 k"], teacher_temp: float
) -> Float[Tensor, "b k"]:
    """softmax((logits - center) / teacher_temp): centring and sharpening, in float32 at least."""
    return torch.softmax((teacher_logits - center) / teacher_temp, dim=-1)
