"""Linear classifiers of features: a grid of them trained at once by SGD, and logistic regression.

A classifier is a weight (c, d) and a bias (c,) for features as they come from the network: its
logits are `features @ weight.T + bias`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ssl_xcit.runtime import distributed, draws

MOMENTUM, INITIAL_STD = 0.9, 0.01  # of DINO's eval_linear.py
CHUNK = 8_192  # rows that are looked at together: bounds the memory for logits
KEPT = 2**27  # numbers, 1 GiB, that are kept wide and standardised, not made again at each look


def split(
    num_images: int, held_out: float, seed: int
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " m"]]:
    """(images to learn from, images held out), each in ascending order.

    Those with the smallest hashes of (seed, image) are held out: round(held_out * num_images) of
    them, at least one unless held_out is 0, and never all.
    """
    images = torch.arange(num_images)
    count = min(max(round(held_out * num_images), int(held_out > 0)), num_images - 1)
    order = draws.stream(seed, 0, images, draws.SPLIT).argsort(stable=True)
    return order[count:].sort().values, order[:count].sort().values


class LinearGrid:
    """A classifier for every pair of a kind of feature and a learning rate, trained at once.

    Each does what it would do alone: SGD on the mean cross-entropy of a batch,

        v <- 0.9 v + gradient,    w <- w - lr v,

    without weight decay, from weights drawn from N(0, 0.01^2) by `seed` and biases 0, so those of
    one kind all start alike. One that diverges leaves the others as they are. Ranks share a batch:
    the gradient is the mean of theirs.

    Args:
        sizes: kind of feature -> its length d.
        lrs: learning rates, the same for every kind.
        num_classes: c; labels are 0 .. c - 1.
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
        self._weights, self._biases = {}, {}  # kind -> (l, c, d) and (l, c)
        for kind, size in sizes.items():
            generator = torch.Generator().manual_seed(seed)
            weight = INITIAL_STD * torch.randn(num_classes, size, generator=generator)
            self._weights[kind] = weight.to(device, dtype).repeat(len(lrs), 1, 1)
            self._biases[kind] = torch.zeros(len(lrs), num_classes, dtype=dtype, device=device)
        self._momenta = {
            kind: (torch.zeros_like(self._weights[kind]), torch.zeros_like(self._biases[kind]))
            for kind in sizes
        }

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
        for kind, weight in self._weights.items():
            log_probs = self._logits(kind, features[kind]).log_softmax(dim=2)  # (b, l, c)
            losses.append(-log_probs[rows, :, labels].mean(dim=0))
            # The gradient by the logits of a softmax's cross-entropy: probability minus truth
            error = log_probs.exp()
            error[rows, :, labels] -= 1
            error /= len(labels)
            gradient = (error.flatten(1).T @ features[kind]).view_as(weight)
            rates = decay * self._lrs
            for parameter, momentum, change, rate in (
                (weight, self._momenta[kind][0], gradient, rates[:, None, None]),
                (self._biases[kind], self._momenta[kind][1], error.sum(dim=0), rates[:, None]),
            ):
                momentum.mul_(MOMENTUM).add_(distributed.all_reduce_mean(change))
                parameter.sub_(rate * momentum)
        return distributed.all_reduce_mean(torch.cat(losses))

    def ranked(self, features: Mapping[str, Float[Tensor, "m _"]]) -> list[Int64[Tensor, "m top"]]:
        """For each entry the up to five best classes of each image, best first, on the CPU."""
        return [
            ranked_classes(*self.classifier(entry), features[kind])
            for entry, (kind, _) in enumerate(self.entries)
        ]

    def classifier(self, entry: int) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
        """Weight and bias of an entry."""
        kind, place = self.entries[entry][0], entry % len(self._lrs)
        return self._weights[kind][place], self._biases[kind][place]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that changes."""
        return {
            f"{kind}/{name}": tensor
            for kind, momenta in self._momenta.items()
            for name, tensor in zip(
                ("weight", "bias", "weight_momentum", "bias_momentum"),
                (self._weights[kind], self._biases[kind], *momenta),
                strict=True,
            )
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `state`."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def _logits(self, kind: str, features: Float[Tensor, "b d"]) -> Float[Tensor, "b l c"]:
        weight, bias = self._weights[kind], self._biases[kind]
        return (features @ weight.flatten(0, 1).T).unflatten(1, bias.shape) + bias


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

    Ranks share the images: each gives rows of its own, and all get the same fit.
    """

    def __init__(
        self,
        features: Float[Tensor, "n d"],
        labels: Int64[Tensor, " n"],
        num_classes: int,
        device: torch.device,
    ) -> None:
        # Where there are many, float32 is kept as it is, and only a chunk at a time is wider.
        self._kept = None
        self.features, self.labels = features.to(device), labels.to(device)
        self.num_classes = num_classes
        counts = distributed.gather_variable(torch.tensor([len(labels)]))
        self._scale = len(counts) / counts.sum().item()  # makes a mean over ranks one over images
        zeros = torch.zeros(features.shape[1], dtype=torch.float64, device=device)
        self.mean, self.std = zeros, torch.ones_like(zeros)
        self.mean = self._mean(sum((z.sum(dim=0) for z, _ in self._chunks()), zeros))
        std = self._mean(sum((z.square().sum(dim=0) for z, _ in self._chunks()), zeros)).sqrt()
        # Of a constant feature rounding may leave a little, which must not be blown up.
        self.std = torch.where(std > 1e-12 * self.mean.abs(), std, 1.0)
        self._kept = list(self._chunks()) if self.features.numel() <= KEPT else None

    def fit(
        self, l2: float, iterations: int = 300, tolerance: float = 1e-5, start: Fit | None = None
    ) -> Fit:
        """The minimum for `l2`, until no entry of the gradient exceeds `tolerance`.

        Begins at `start`, a fit of the same or of similar features, or at zero.
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
            loss, weight.grad, bias.grad = self._objective(weight, bias, l2)
            return loss

        optimizer.step(objective)
        objective()
        gradient = max(weight.grad.abs().max().item(), bias.grad.abs().max().item())
        raw = weight / self.std
        return Fit(raw, bias - raw @ self.mean, optimizer.state[weight]["n_iter"], gradient)

    def _objective(
        self, weight: Float[Tensor, "c d"], bias: Float[Tensor, " c"], l2: float
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "c d"], Float[Tensor, " c"]]:
        """The objective and its gradients."""
        loss = torch.zeros((), dtype=weight.dtype, device=weight.device)
        by_weight, by_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for z, labels in self._chunks():
            log_probs = (z @ weight.T + bias).log_softmax(dim=1)
            rows = torch.arange(len(labels), device=labels.device)
            loss -= log_probs[rows, labels].sum()
            error = log_probs.exp_()
            error[rows, labels] -= 1
            by_weight += error.T @ z
            by_bias += error.sum(dim=0)
        loss, by_weight, by_bias = map(self._mean, (loss, by_weight, by_bias))
        return loss + l2 / 2 * weight.square().sum(), by_weight + l2 * weight, by_bias

    def _chunks(self) -> Iterator[tuple[Float[Tensor, "m d"], Int64[Tensor, " m"]]]:
        """(standardised rows, their labels), CHUNK at a time."""
        if self._kept is not None:
            yield from self._kept
            return
        for x, y in zip(self.features.split(CHUNK), self.labels.split(CHUNK), strict=True):
            yield (x.double() - self.mean) / self.std, y

    def _mean(self, total: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The mean over all ranks' images of what sums up to `total` over this rank's."""
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
