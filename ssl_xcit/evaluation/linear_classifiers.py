"""Linear classifiers of features: a grid of them trained at once by SGD, and logistic regression.

A classifier is a weight (c, d) and a bias (c,) for features as the network gives them: its logits
are `features @ weight.T + bias`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_xcit.runtime import distributed, draws

MOMENTUM, INITIAL_STD = 0.9, 0.01  # of DINO's eval_linear.py
CHUNK = 8_192  # rows at a time: bounds the memory for logits
KEPT = 2**27  # up to 1 GiB of float64 is kept standardised: a fit takes 0.6 of the time


def split(
    num_images: int, held_out: float, seed: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
    """(images to learn from, images held out), each in ascending order.

    The images with the smallest hashes of (seed, image) are held out: round(held_out * num_images)
    of them, at least one unless held_out is 0, and never all.
    """
    images = torch.arange(num_images)
    count = min(max(round(held_out * num_images), int(held_out > 0)), num_images - 1)
    order = draws.stream(seed, 0, images, draws.SPLIT).argsort(stable=True)
    return order[count:].sort().values, order[:count].sort().values


class LinearGrid:
    """A classifier for every pair of a kind of feature and a learning rate, trained at once.

    Each learns as it would alone, by SGD without weight decay on the mean cross-entropy of a batch,

        v <- 0.9 v + gradient,    w <- w - lr v,

    starting from biases 0 and weights drawn from N(0, 0.01^2) by `seed`, the same for all learning
    rates of a kind. One that diverges does not touch the others. Ranks share a batch: the gradient
    is the mean of theirs.

    `sizes`: kind of feature -> its length d; labels are below `num_classes`, c. `entries` are the
    (kind, learning rate) of all classifiers. `state` is all that changes: weights (l, c, d) and
    biases (l, c) of each kind for the l learning rates, and their momenta.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        lrs: Sequence[float],
        num_classes: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.entries = [(kind, lr) for kind in sizes for lr in lrs]
        self._lrs = torch.tensor(lrs, dtype=dtype, device=device)
        self._kinds = list(sizes)
        self.state: dict[str, Tensor] = {}
        for kind, size in sizes.items():
            generator = torch.Generator().manual_seed(seed)
            weight = INITIAL_STD * torch.randn(num_classes, size, generator=generator)
            weight = weight.to(device, dtype).repeat(len(lrs), 1, 1)
            bias = torch.zeros(len(lrs), num_classes, dtype=dtype, device=device)
            self.state |= {f"{kind}/weight": weight, f"{kind}/bias": bias}
            for name, parameter in (("weight", weight), ("bias", bias)):
                self.state[f"{kind}/{name}_momentum"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(
        self,
        features: Mapping[str, Float[Tensor, "b _"]],
        labels: Int64[Tensor, " b"],
        decay: float,
    ) -> Float[Tensor, " entries"]:
        """One step of all entries at `decay` times their learning rates; their losses before it."""
        rows = torch.arange(len(labels), device=labels.device)
        losses = []
        for kind in self._kinds:
            weight, bias = self.state[f"{kind}/weight"], self.state[f"{kind}/bias"]
            logits = (features[kind] @ weight.flatten(0, 1).T).unflatten(1, bias.shape) + bias
            log_probs = logits.log_softmax(dim=2)  # (b, l, c)
            losses.append(-log_probs[rows, :, labels].mean(dim=0))
            # The gradient of the cross-entropy by the logits: probability minus truth
            error = log_probs.exp()
            error[rows, :, labels] -= 1
            error /= len(labels)
            gradient = (error.flatten(1).T @ features[kind]).view_as(weight)
            rates = decay * self._lrs
            for name, change, rate in (
                ("weight", gradient, rates[:, None, None]),
                ("bias", error.sum(dim=0), rates[:, None]),
            ):
                momentum = self.state[f"{kind}/{name}_momentum"]
                momentum.mul_(MOMENTUM).add_(distributed.all_reduce_mean(change))
                self.state[f"{kind}/{name}"].sub_(rate * momentum)
        return distributed.all_reduce_mean(torch.cat(losses))

    def classifier(self, entry: int) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
        """Weight and bias of an entry."""
        kind, place = self.entries[entry][0], entry % len(self._lrs)
        return self.state[f"{kind}/weight"][place], self.state[f"{kind}/bias"][place]


class Fit(NamedTuple):
    """A fitted classifier, float64, and how well the fit went."""

    weight: Float[Tensor, "c d"]
    bias: Float[Tensor, " c"]
    iterations: int
    gradient: float  # largest entry of the objective's gradient at the end


class LogisticRegression:
    """Multinomial logistic regression on standardised features, by L-BFGS in float64.

    With z = (x - mean) / std of each of the d features over the n images (std 1 where it is 0),

        minimise over W, b:   mean_i -log softmax(W z_i + b)[y_i]  +  l2 / 2 |W|^2

    which is scikit-learn's objective at C = 1 / (l2 n) behind its StandardScaler. `fit` returns
    the classifier for x itself: W / std and b - W (mean / std).

    Ranks share the images: each passes its own rows, and all get the same fit.
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        num_classes: int,
        device: torch.device,
    ) -> None:
        self._kept = None  # many features stay float32, and are widened a chunk at a time
        self.features, self.labels = features.to(device), labels.to(device)
        self.num_classes = num_classes
        counts = distributed.gather_variable(torch.tensor([len(labels)]))
        self._scale = len(counts) / counts.sum().item()  # makes a mean over ranks one over images
        zeros = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
        self.mean, self.std = zeros, torch.ones_like(zeros)
        self.mean = self._mean(sum((z.sum(dim=0) for z, _ in self._chunks()), zeros))
        std = self._mean(sum((z.square().sum(dim=0) for z, _ in self._chunks()), zeros)).sqrt()
        # Rounding may leave a constant feature a tiny spread, which must not be blown up.
        self.std = torch.where(std > 1e-12 * self.mean.abs(), std, 1.0)
        self._kept = list(self._chunks()) if self.features.numel() <= KEPT else None

    def fit(
        self, l2: float, iterations: int = 300, tolerance: float = 1e-5, start: Fit | None = None
    ) -> Fit:
        """The minimum for `l2`, until no entry of the gradient exceeds `tolerance`.

        Starts from `start`, a fit to the same or similar features, or from zero.
        """
        weight = self.mean.new_zeros(self.num_classes, len(self.mean))
        bias = self.mean.new_zeros(self.num_classes)
        if start is not None:
            weight += start.weight * self.std
            bias += start.bias + start.weight @ self.mean
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=iterations,
            max_eval=10 * iterations,
            tolerance_grad=tolerance,
            tolerance_change=1e-16,
            line_search_fn="strong_wolfe",
        )

        @torch.no_grad()
        def objective() -> Float[Tensor, ""]:
            loss = weight.new_zeros(())
            by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
            for z, labels in self._chunks():
                log_probs = (z @ weight.T + bias).log_softmax(dim=1)
                rows = torch.arange(len(labels), device=labels.device)
                loss -= log_probs[rows, labels].sum()
                error = log_probs.exp_()
                error[rows, labels] -= 1
                by_weight += error.T @ z
                by_bias += error.sum(dim=0)
            loss, by_weight, bias.grad = map(self._mean, (loss, by_weight, by_bias))
            weight.grad = by_weight + l2 * weight
            return loss + l2 / 2 * weight.square().sum()

        optimizer.step(objective)
        objective()
        gradient = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
        raw = weight / self.std
        return Fit(raw, bias - raw @ self.mean, optimizer.state[weight]["n_iter"], gradient)

    def _chunks(self) -> Iterable[tuple[Float[Tensor, "m d"], Int64[Tensor, " m"]]]:
        """(standardised rows, their labels), CHUNK at a time."""
        chunks = zip(self.features.split(CHUNK), self.labels.split(CHUNK), strict=True)
        return self._kept or (((x.double() - self.mean) / self.std, y) for x, y in chunks)

    def _mean(self, total: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The mean over all images of what sums to `total` over this rank's."""
        return distributed.all_reduce_mean(total) * self._scale


def ranked_classes(
    weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"], features: Float[Tensor, "m d"]
) -> Int64[Tensor, "m top"]:
    """The min(5, c) best classes of each image, best first, on the CPU."""
    top = min(5, len(weight))
    parts = [
        (chunk.to(weight.device, weight.dtype) @ weight.T + bias).topk(top, dim=1).indices.cpu()
        for chunk in features.split(CHUNK)
    ]
    return torch.cat(parts)
