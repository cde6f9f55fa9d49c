"""Metrics that show whether a run learns or collapses; `ssl_xcit.dino.verdict` interprets them.

All but `rankme` follow from the means over images in `batch_means`. Averaged over micro-batches and
ranks, these are the means of the global batch, so `health` does not depend on how the batch was
split. Nothing here synchronises with the device, and only logged steps compute it.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

SCALARS = 4  # in `batch_means`: 1, loss, teacher entropy, student entropy
BLOCK_ROWS = 4096  # rows of features converted to float64 at a time


def means_size(k: int, d: int) -> int:
    """Length of `batch_means` for `k` prototypes and `d`-dimensional features."""
    return SCALARS + k + 2 * d


@torch.no_grad()
def batch_means(
    loss: Float[Tensor, ""],
    student_logits: Iterable[Float[Tensor, "n k"]],
    teacher_logits: Iterable[Float[Tensor, "n k"]],
    teacher_features: Float[Tensor, "tn d"],
    center: Float[Tensor, "1 k"],
    temperatures: tuple[float, float],
) -> Float[Tensor, " means"]:
    """Return the means over images and views of a micro-batch that `health` needs.

    `means_size` numbers, in this order: 1; the loss; the mean entropies of the teacher's
    distributions q and of the student's p, in nats; the mean of q (k); the mean of the
    L2-normalised features (d); the mean of their squares (d).

    Logits are passed and processed view by view, which bounds the memory. `center` is the one that
    the loss used, `temperatures` are (student, teacher), `teacher_features` come from the backbone.
    """
    student_temp, teacher_temp = temperatures
    student = [_mean_distribution(logits, student_temp)[0] for logits in student_logits]
    teacher = [_mean_distribution(logits - center, teacher_temp) for logits in teacher_logits]
    entropies, probs = zip(*teacher, strict=True)
    features = F.normalize(_wide(teacher_features), dim=1)
    one = torch.ones_like(entropies[0])
    scalars = [one, loss, sum(entropies) / len(entropies), sum(student) / len(student)]
    vectors = [sum(probs) / len(probs), features.mean(0), features.square().mean(0)]
    return torch.cat([torch.stack([_wide(scalar) for scalar in scalars]), *vectors])


@torch.no_grad()
def health(
    means: Float[Tensor, " means"], center: Float[Tensor, "1 k"], images: int
) -> dict[str, Float[Tensor, ""]]:
    """Return the health metrics of a step over `images` images from its `batch_means`.

    teacher_entropy, student_entropy: mean over views and images, nats. 0: each image selects one
        prototype; ln k: uniform over all k.
    kl: mean of KL(q | p), nats. The loss is the teacher's entropy plus this.
    center_norm: L2 norm of the centre.
    prototypes: exp(entropy of the mean of q), the effective number of prototypes in the batch.
        1: the batch uses a single one; k: it uses all equally.
    prototypes_used: the same, relative to the most that the batch could use, min(k, images); at
        most 1.
    feature_std: standard deviation of the teacher's L2-normalised features, averaged over
        dimensions, relative to 1 / sqrt(d). 1: spread evenly over the sphere; 0: equal for all
        images.

    All but center_norm are NaN if `means` are zeros (a skipped step).
    """
    k = center.size(1)
    d = (len(means) - SCALARS - k) // 2
    scalars, probs, first, second = (means / means[0]).split([SCALARS, k, d, d])
    _, loss, teacher, student = scalars
    prototypes = torch.special.entr(probs).sum().exp()
    deviations = (second - first.square()).clamp(min=0).sqrt()
    return {
        "teacher_entropy": teacher,
        "student_entropy": student,
        "kl": loss - teacher,
        "center_norm": center.norm(),
        "prototypes": prototypes,
        "prototypes_used": (prototypes / min(k, images)).clamp(max=1),
        "feature_std": deviations.mean() * math.sqrt(d),
    }


@torch.no_grad()
def rankme(features: Real[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Effective rank: exp of the entropy of the singular values, normalised to sum to 1.

    Garrido et al. 2023, "RankMe" (arXiv:2210.02885, eq. 4, without its 1e-7, which only avoids
    log 0). It lies between 1 and min(n, d). Computed in float64. The singular values are square
    roots of the eigenvalues of the d x d Gram matrix, so those far below 1e-8 of the largest are
    rounding errors.
    """
    d = features.size(1)
    gram = torch.zeros(d, d, dtype=torch.float64, device=features.device)
    for block in features.split(BLOCK_ROWS):
        gram.addmm_(block.double().T, block.double())
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(values / values.sum()).sum().exp()


def _mean_distribution(
    logits: Float[Tensor, "n k"], temperature: float
) -> tuple[Float[Tensor, ""], Float[Tensor, " k"]]:
    """Mean entropy and mean of the rows' distributions softmax(logits / temperature)."""
    log_probs = torch.log_softmax(_wide(logits) / temperature, dim=1)
    probs = log_probs.exp()
    # A matrix product would be rounded by autocast; dot is not.
    return -torch.dot(probs.flatten(), log_probs.flatten()) / len(logits), probs.mean(0)


def _wide(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Convert to at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
