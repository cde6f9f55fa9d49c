"""Is it learning or collapsing? The numbers that tell; `ssl_xcit.dino.verdict` says it in words.

All but `rankme` follow from means over images, `batch_means`. Averaged over micro-batches and ranks
these are the means of the global batch, so `health` does not depend on how that was split. Nothing
here waits for the device, and nothing is computed in a step that is not logged.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Real
from torch import Tensor

SCALARS = 4  # of `batch_means`: 1, loss, teacher entropy, student entropy
BLOCK_ROWS = 4096  # of features that are in float64 at once


def means_size(k: int, d: int) -> int:
    """Numbers in `batch_means` of `k` prototypes and features of `d` dimensions."""
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
    """What `health` needs of a micro-batch: means over images and views.

    `means_size` numbers, in this order: 1; the loss; the mean entropies of the teacher's
    distributions q and of the student's p, in nats; the mean of q (k); the mean of the features of
    length 1 (d); the mean of their squares (d).

    Logits come view by view and are looked at one by one, which bounds the memory. `center`: the
    one that the loss used. `temperatures`: the student's, the teacher's. `teacher_features`: the
    backbone's.
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
    """The numbers of the log, from the `batch_means` of a step over `images` images.

    teacher_entropy, student_entropy: mean over views and images, nats. 0: each image has one
        prototype; ln k: all k are alike to it.
    kl: the loss is the teacher's entropy and this, the mean of KL(q | p), nats.
    center_norm: length of the centre.
    prototypes: exp(entropy of the mean of q), the number of prototypes that share the batch, if
        all had equal shares. 1: it has only one; k: all.
    prototypes_used: the same as a share of what the batch could need, min(k, images); at most 1.
    feature_std: standard deviation of the teacher's features of length 1, mean over dimensions,
        over 1 / sqrt(d). 1: spread evenly over the sphere; 0: the same for all images.

    All are NaN where `means` are zeros (a step that was skipped), but the length of the centre.
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
    """Effective rank: exp of the entropy of the singular values as shares of their sum.

    Garrido et al. 2023, "RankMe" (arXiv:2210.02885, eq. 4; without its 1e-7, which keeps log 0
    away). Between 1 and min(n, d): so many directions does the cloud of features have, if all were
    of equal length. In float64; the singular values are the roots of the eigenvalues of the d x d
    matrix of inner products, so a far smaller one than 1e-8 of the largest is rounding.
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
    """Mean entropy, and mean, of the rows' distributions softmax(logits / temperature)."""
    log_probs = torch.log_softmax(_wide(logits) / temperature, dim=1)
    probs = log_probs.exp()
    # Not as a product of matrices, which autocast would round
    return -torch.dot(probs.flatten(), log_probs.flatten()) / len(logits), probs.mean(0)


def _wide(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
