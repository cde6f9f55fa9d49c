"""The method: head, multi-crop forward, loss with its centre, teacher update.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", Algorithm 1;
constants as in facebookresearch/dino. `ssl_xcit.train.Pretraining` puts the pieces together.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ssl_xcit.products import Linear, initialise
from ssl_xcit.prototypes import WeightNormLinear


class DINOHead(nn.Module):
    """Projection head: an MLP to `bottleneck_dim`, L2 normalisation, weight-normed prototypes.

    `nlayers` Linear layers with `hidden_dim` between them, each but the last followed by
    [BatchNorm1d] and GELU; a single Linear, called `mlp`, when `nlayers` is 1. With
    `norm_last_layer` the norms `weight_g` of the prototypes stay 1; without, they are trained,
    which is better and less stable. Keys: `mlp.{0,2,4}` (`mlp.{0,3,6}` with BatchNorm between),
    `last_layer.weight_{g,v}`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            norm = [nn.BatchNorm1d(after)] if use_bn else []
            layers += [Linear(before, after), *norm, nn.GELU()]
        last = Linear(widths[-2], bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        initialise(self.mlp)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, not norm_last_layer)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Logits of the `out_dim` prototypes."""
        return self.last_layer(self.unit_vectors(x))

    def unit_vectors(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b e"]:
        """What the prototypes are compared with: the MLP's outputs, each of length 1."""
        x = self.mlp(x)
        # in float32 at least: half precision would round the unit sphere coarsely
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


class MultiCropWrapper(nn.Module):
    """Backbone and head over views of several resolutions."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        crops: Sequence[Float[Tensor, "_v n c _h _w"]],
        keys: Sequence[Int[Tensor, "_v n"]] | None = None,
        unit_vectors: bool = False,
    ) -> Float[Tensor, "m k"]:
        """Logits of all views, view by view: the n samples of view 0, then those of view 1, ...

        Each entry of `crops` holds the views of one resolution. The backbone gets all of them in
        one call, as a list of batches of images, and the head sees all views at once. An entry
        without views (no local crops) is skipped. `keys` are the random streams of the samples'
        drop path, one per view and sample; without them the backbone draws from torch's generator.
        With `unit_vectors` the head stops before its prototypes.
        """
        images = [views.flatten(0, 1) for views in crops if len(views)]  # (v n, c, h, w)
        extra = {}
        if keys is not None:
            pairs = zip(crops, keys, strict=True)
            extra = {"keys": [streams.flatten() for views, streams in pairs if len(views)]}
        head = self.head.unit_vectors if unit_vectors else self.head
        return head(self.backbone(images, **extra))


class Part(NamedTuple):
    """The views that the student sees in one pass."""

    crops: list[Float[Tensor, "_v n c _h _w"]]
    keys: list[Int[Tensor, "_v n"]] | None  # of drop path
    views: range  # their numbers
    total: int  # views of a sample, those of other parts included


def split_crops(
    crops: list[Float[Tensor, "_v n c _h _w"]],
    keys: list[Int[Tensor, "_v n"]] | None,
    in_turn: bool,
) -> list[Part]:
    """The student's passes, in order: a size at a time if `in_turn`, else all at once."""
    total = sum(map(len, crops))
    if not in_turn:
        return [Part(crops, keys, range(total), total)]
    parts, first = [], 0
    for i, crop in enumerate(crops):
        streams = None if keys is None else [keys[i]]
        parts.append(Part([crop], streams, range(first, first + len(crop)), total))
        first += len(crop)
    return parts


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


@torch.no_grad()
def update_teacher(
    student: nn.Module, teacher: nn.Module, momentum: float, skip: Bool[Tensor, ""] | None = None
) -> None:
    """teacher = momentum teacher + (1 - momentum) student, over parameters, in place.

    Buffers are left alone, as in DINO: the teacher runs in train mode, normalises by its own
    batches and keeps its own BatchNorm statistics, of global views only. Where `skip` is true
    nothing changes; a GPU is not waited for.
    """
    ours, theirs = list(teacher.parameters()), list(student.parameters())
    assert len(ours) == len(theirs)
    if skip is None or skip.device.type == "cpu":
        if skip is None or not skip:
            torch._foreach_lerp_(ours, theirs, 1 - momentum)
        return
    steps = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(steps, torch.where(skip, 0.0, 1 - momentum))
    torch._foreach_add_(ours, steps)
