"""Parameter groups, optimisers, gradient clipping and last-layer freezing, as in DINO."""

from collections.abc import Callable, Collection, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


def parameter_groups(
    model: nn.Module,
    undecayed: Collection[str] = (),
    lr_scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict]:
    """Split the trainable parameters into [decayed, not decayed], as DINO's `get_params_groups`.

    Not decayed: names that end in ".bias" and vectors (LayerNorm, BatchNorm, LayerScale). All
    others are decayed, including XCiT's `cls_token` (1, 1, d) and `temperature` (h, 1, 1) and the
    head's `weight_g` (K, 1) if it is trained. Upstream's XCiT has a `no_weight_decay` for
    supervised training, which exempts the cls token. DINO ignores it: the published models were
    trained with the rule above, and so are ours. `undecayed` names further exemptions.

    `lr_scale` maps a parameter's name to the factor on its learning rate. There are two groups per
    factor, in the order of the factors' first parameters.

    The first group has no "weight_decay" of its own (`set_hyperparameters` sets it every step), the
    second has 0. "param_names" holds the names, under the key that torch itself uses.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = []
    for scale in dict.fromkeys(map(lr_scale, trainable)) or [1.0]:
        decayed, plain = {}, {}
        for name, parameter in trainable.items():
            if lr_scale(name) == scale:
                exempt = name.endswith(".bias") or parameter.ndim == 1 or name in undecayed
                (plain if exempt else decayed)[name] = parameter
        for named, facts in ((decayed, {"decayed": True}), (plain, {"weight_decay": 0.0})):
            facts = {"decayed": False, "lr_scale": scale} | facts
            groups.append({"params": list(named.values()), "param_names": list(named), **facts})
    covered = [id(p) for group in groups for p in group["params"]]
    assert sorted(covered) == sorted({id(p) for p in model.parameters() if p.requires_grad})
    return groups


def layer_scales(depth: int, decay: float) -> Callable[[str], float]:
    """Layer-wise learning-rate decay of an XCiT with `depth` blocks, for `parameter_groups`.

    The factor is decay^(depth + 3 - layer). The stem (patch embedding, positions, cls token) is
    layer 0, block i is layer i + 1, class-attention block j is layer depth + 1 + j, the final
    LayerNorm belongs to the last of these, and the head is layer depth + 3 (Bao et al., "BEiT",
    2022, appendix; layers numbered as timm does for XCiT).
    """
    first = {"blocks": 1, "cls_attn_blocks": depth + 1, "norm": depth + 2, "head": depth + 3}

    def scale(name: str) -> float:
        part, number, *_ = f"{name}.".split(".")
        layer = first.get(part, 0) + (int(number) if part.endswith("blocks") else 0)
        return decay ** (depth + 3 - layer)

    return scale


def build_optimizer(name: Literal["adamw", "sgd", "lars"], groups: list[dict]) -> Optimizer:
    """Build the optimiser `name` for `parameter_groups`.

    AdamW has torch's betas (0.9, 0.999) and eps 1e-8; SGD and LARS have momentum 0.9. Learning
    rate and weight decay are 0 until `set_hyperparameters`, which is called before every step.
    AdamW and SGD are torch's fused versions, on the CPU too (there six times faster than the
    foreach versions). All three skip a step completely if their attribute `found_inf`, a tensor on
    the device, is 1.
    """
    if name == "adamw":
        return AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)
    if name == "sgd":
        optimizer = SGD(groups, lr=0.0, momentum=0.9, fused=True)
        # Zeros give the same first step. The fused kernel would leave the buffers uninitialised if
        # the first step is a bad one.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    return LARS(groups, lr=0.0)


class LARS(Optimizer):
    """SGD with momentum whose update is rescaled, tensor by tensor, to the size of the weights.

    You et al. 2017, in the form of Barlow Twins (Zbontar et al. 2021), which DINO took over:

        u = grad + weight_decay p
        u = eta |p| / |u| u          (skipped if either norm is 0)
        mu = momentum mu + u
        p = p - lr mu

    Vectors (biases, norm layers) get neither weight decay nor rescaling, whatever their group.
    """

    def __init__(self, params: Iterable, lr: float, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": 0.9, "eta": 0.001}
        super().__init__(params, defaults)
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for vectors in (True, False):
                self._update([p for p in parameters if (p.ndim == 1) == vectors], group, vectors)

    def _update(self, parameters: list[nn.Parameter], group: dict, vectors: bool) -> None:
        if not parameters:
            return
        updates = [p.grad for p in parameters]
        if not vectors:
            updates = torch._foreach_add(updates, parameters, alpha=group["weight_decay"])
            sizes = torch.stack(torch._foreach_norm(parameters))
            lengths = torch.stack(torch._foreach_norm(updates))
            scales = torch.where(
                (sizes > 0) & (lengths > 0), group["eta"] * sizes / lengths, torch.ones_like(sizes)
            )
            updates = torch._foreach_mul(updates, scales.unbind())
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momenta = [self.state[p]["momentum_buffer"] for p in parameters]
        moved = torch._foreach_mul(momenta, group["momentum"])
        torch._foreach_add_(moved, updates)
        steps = torch._foreach_mul(moved, -group["lr"])
        if self.found_inf is not None:  # a bad step: NaN times 0 would still be NaN
            skip = self.found_inf > 0
            moved = [torch.where(skip, *pair) for pair in zip(momenta, moved, strict=True)]
            steps = [torch.where(skip, 0.0, step) for step in steps]
        torch._foreach_copy_(momenta, moved)
        torch._foreach_add_(parameters, steps)


def set_hyperparameters(optimizer: Optimizer, lr: float, weight_decay: float) -> None:
    """Set the learning rate of all groups and the weight decay of the decayed ones."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if group["decayed"]:
            group["weight_decay"] = weight_decay


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    clip: float,
    mode: Literal["parameter", "global"] = "parameter",
) -> Float[Tensor, ""]:
    """Clip the gradients in place to a norm of at most `clip`; 0 or less turns clipping off.

    "parameter" is DINO's `clip_gradients`: each tensor has its own norm and its own factor
    min(1, clip / (norm + 1e-6)). "global" uses one norm and one factor for all tensors, which clips
    far more at the same `clip` (XCiT-S12 has 341 tensors, each allowed the whole norm).

    Returns the global norm before clipping, as a tensor, so nothing waits for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    total = torch.linalg.vector_norm(norms)
    if clip > 0:
        limited = norms if mode == "parameter" else total.expand_as(norms)
        factors = (clip / (limited + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, factors.unbind())
    return total


def freeze_last_layer(model: nn.Module) -> None:
    """Drop the gradients of the head's last layer so that the optimiser skips it.

    It then gets no update, no weight decay and no moments, as in DINO's first epochs. Call this
    after clipping.
    """
    for name, parameter in model.named_parameters():
        if "last_layer" in name:
            parameter.grad = None
