"""The DINO loss and its centre."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DINOLoss(nn.Module):
    """Cross-entropy between teacher and student distributions of different views of an image.

    The buffer `center` (1, K) is the running mean of the teacher's logits, which is subtracted from
    them. It starts at 0 and is the loss's only state.
    """

    def __init__(
        self, out_dim: int, student_temp: float = 0.1, center_momentum: float = 0.9
    ) -> None:
        super().__init__()
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.register_buffer("center", torch.zeros(1, out_dim))

    def forward(
        self,
        student_logits: Float[Tensor, "vn k"],
        teacher_logits: Float[Tensor, "tn k"],
        teacher_temp: float,
        views: range | None = None,
        total: int | None = None,
    ) -> Float[Tensor, ""]:
        """Compute the loss with the present centre; call `update_center` afterwards.

        Logits are ordered view by view. Views 0 and 1 are the global views, which both networks
        see. The student logits cover all V views, or only the `views` out of `total` (0 and 1 both
        or neither); the result is then the part of the sum due to these views.

            for each sample b, each teacher view t in (0, 1), each student view v != t:
                q = softmax((teacher_logits[t, b] - center) / teacher_temp)
                p = softmax(student_logits[v, b] / student_temp)
                loss += -sum_k q[k] log p[k] / (n (2 V - 2))

        No gradient flows to the teacher. The loss is float32, under autocast too (float64 for
        float64 logits). It starts near ln K; if it stays there, the outputs are uniform.
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
        """Set center = m center + (1 - m) mean; call it once per step, after the step's losses.

        `teacher_logits_mean`: mean of the teacher's raw logits over both global views, all
        micro-batches and all ranks; the caller averages. Nothing changes if `skip` is true.
        """
        moved = self.center.lerp(
            teacher_logits_mean.to(self.center.dtype), 1 - self.center_momentum
        )
        self.center.copy_(moved if skip is None else torch.where(skip, self.center, moved))


class _CrossEntropy(torch.autograd.Function):
    """Mean of -<q, log p> over pairs of different views, with its gradient computed on the way.

    It works view by view so that intermediate results stay in a CPU's cache. As sum_k q_k = 1, the
    derivative of a view's terms with respect to its logits is (w p - q) / T, where q is the sum of
    the w targets that the view is compared with: w = 1 for a global view, 2 for a local one.
    """

    @staticmethod
    def forward(
        ctx, student_logits: Tensor, targets: Tensor, student_temp: float, views: range, total: int
    ) -> Tensor:
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
    def backward(ctx, grad: Float[Tensor, ""]) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None, None


@torch.no_grad()
def teacher_probs(
    teacher_logits: Float[Tensor, "b k"], center: Float[Tensor, "1 k"], teacher_temp: float
) -> Float[Tensor, "b k"]:
    """softmax((logits - center) / teacher_temp), in at least float32: centring and sharpening."""
    return torch.softmax((teacher_logits - center) / teacher_temp, dim=-1)
