"""The method: head, multi-crop forward, loss with its centre, teacher update.

Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", Algorithm 1;
constants as in facebookresearch/dino. `ssl_xcit.train.Pretraining` puts the pieces together.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows are g_k v_k / |v_k|, k = 1..out_dim.

    The keys are those of `torch.nn.utils.weight_norm`, which DINO used and torch has deprecated:
    `weight_g` (K, 1), here 1 at the start, and `weight_v` (K, in_dim), which starts as nn.Linear's
    weight does. With `weight_g` left at 1 and inputs of length 1, the logits are cosines.
    """

    def __init__(self, in_dim: int, out_dim: int, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        norm = self.weight_v.norm(dim=1, keepdim=True)
        return F.linear(x, self.weight_v * (self.weight_g / norm))


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
            layers += [nn.Linear(before, after), *norm, nn.GELU()]
        last = nn.Linear(widths[-2], bottleneck_dim)
        self.mlp = nn.Sequential(*layers, last) if layers else last
        for layer in (*layers, last):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)  # cut at +-2, that is, hardly ever
                nn.init.zeros_(layer.bias)
        self.last_layer = WeightNormLinear(bottleneck_dim, out_dim, not norm_last_layer)

    def forward(self, x: Float[Tensor, "b d"]) -> Float[Tensor, "b k"]:
        """Logits of the `out_dim` prototypes."""
        x = self.mlp(x)
        # in float32 at least: half precision would round the unit sphere coarsely
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)
        return self.last_layer(x)


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
    ) -> Float[Tensor, "m k"]:
        """Logits of all views, view by view: the n samples of view 0, then those of view 1, ...

        Each entry of `crops` holds the views of one resolution and gets one pass through the
        backbone; the head sees all of them at once. An entry without views (no local crops) is
        skipped. `keys` are the random streams of the samples' drop path, one per view and sample;
        without them the backbone draws from torch's generator.
        """
        features = []
        for entry, views in enumerate(crops):
            if len(views) == 0:
                continue  # BatchNorm refuses an empty batch
            images = views.flatten(0, 1)  # (v n, c, h, w)
            extra = {} if keys is None else {"keys": keys[entry].flatten()}
            features.append(self.backbone(images, **extra))
        return self.head(torch.cat(features))


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
    ) -> Float[Tensor, ""]:
        """The loss, with the centre as it is: move it afterwards by `update_center`.

        Both logits are view-major; views 0 and 1 are the global ones, seen by both networks.

            for each sample b, each teacher view t in (0, 1), each student view v != t:
                q = softmax((teacher_logits[t, b] - center) / teacher_temp)
                p = softmax(student_logits[v, b] / student_temp)
                loss += -sum_k q[k] log p[k] / (n (2 V - 2))

        Each view's log p is computed once, and all local views share <q_0 + q_1, sum_v log p_v>.
        No gradient flows to the teacher. Computed and returned in float32 under autocast too
        (float64 from float64 logits). Starts near ln K; stuck there, the outputs are uniform.
        """
        n, remainder = divmod(len(teacher_logits), 2)
        views = len(student_logits) // n
        assert remainder == 0, f"{len(teacher_logits)} teacher logits are not two views"
        assert views >= 2, f"{len(student_logits)} student logits for {n} samples"
        assert len(student_logits) == views * n, "the views hold different numbers of samples"
        first, second = teacher_probs(teacher_logits, self.center, teacher_temp).chunk(2)  # (n, k)
        dtype = torch.promote_types(student_logits.dtype, torch.float32)
        student = student_logits.to(dtype) / self.student_temp
        log_p = student.log_softmax(-1).unflatten(0, (views, n))
        # Split, not indexed: the gradient of three slices would be three zero-padded full tensors.
        global_0, global_1, local = log_p.split([1, 1, views - 2])
        total = (second * global_0).sum() + (first * global_1).sum()
        if views > 2:
            total = total + ((first + second) * local.sum(0)).sum()
        return -total / (n * (2 * views - 2))

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


@torch.no_grad()
def teacher_probs(
    teacher_logits: Float[Tensor, "b k"], center: Float[Tensor, "1 k"], teacher_temp: float
) -> Float[Tensor, "b k"]:
    """softmax((logits - center) / teacher_temp): centring and sharpening, in float32 at least."""
    return torch.softmax((teacher_logits - center) / teacher_temp, dim=-1)


@torch.no_grad()
def loss_statistics(
    loss: Float[Tensor, ""],
    teacher_logits: Float[Tensor, "tn k"],
    center: Float[Tensor, "1 k"],
    teacher_temp: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The loss in two parts (teacher entropy, KL divergence), without waiting for the device.

    The entropy H(q) is the mean over the samples of both views, and the loss, a mean of cross
    entropies in which both views count alike, is H(q) + KL(q | p). Entropy near ln K or near 0 is
    the collapse that centring and sharpening hold back. `center`: the one that the loss used.
    """
    entropy = torch.special.entr(teacher_probs(teacher_logits, center, teacher_temp)).sum(-1).mean()
    return entropy, loss - entropy


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
