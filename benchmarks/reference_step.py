"""DINO's training step for an XCiT, written from the equations: a test oracle and a baseline.

It executes the official code of 2021 operation for operation: normalised copies of queries and
keys, a projection of every token in the class attention, one log-softmax per pair of teacher and
student view, and clipping and teacher updates that loop over tensors and synchronise for each norm.
It imports nothing from `ssl_xcit`. Parameters have the same names, so weights can be exchanged with
`strict=True`.

tests/test_train_step.py compares ssl_xcit's step with it; benchmarks/train_step.py times both.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = {  # name: embed_dim, depth, heads, LayerScale init, norm2 on all tokens
    "xcit_nano_12": (128, 12, 4, 1.0, False),
    "xcit_tiny_12": (192, 12, 4, 1.0, True),
    "xcit_tiny_24": (192, 24, 4, 1e-5, True),
    "xcit_small_12": (384, 12, 8, 1.0, True),
    "xcit_small_24": (384, 24, 8, 1e-5, True),
    "xcit_medium_24": (512, 24, 8, 1e-5, True),
    "xcit_large_24": (768, 24, 16, 1e-5, True),
}


class DropPath(nn.Module):
    """Drops the branch of a sample with probability `rate`; scales the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        mask = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * mask.div_(1 - self.rate)


class Positions(nn.Module):
    """Fourier features from cumulative sums of a full mask, for every image of every batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(64, dim, 1)

    def forward(self, b: int, rows: int, columns: int) -> Tensor:
        ones = torch.ones(b, rows, columns, device=self.token_projection.weight.device)
        y, x = ones.cumsum(1), ones.cumsum(2)
        y = y / (y[:, -1:, :] + 1e-6) * 2 * math.pi
        x = x / (x[:, :, -1:] + 1e-6) * 2 * math.pi
        index = torch.arange(32, dtype=torch.float32, device=ones.device)
        wavelength = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / 32)
        parts = []
        for place in (y, x):
            angle = place[..., None] / wavelength
            pair = torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4)
            parts.append(pair.flatten(3))
        features = torch.cat(parts, dim=3).permute(0, 3, 1, 2)
        return self.token_projection(features.to(self.token_projection.weight.dtype))


class CrossCovariance(nn.Module):
    """XCA: softmax(q_hat k_hat^T * temperature) v per head, over channels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3)  # (b, heads, d/heads, n)
        q, k = F.normalize(q, dim=3), F.normalize(k, dim=3)
        weights = ((q @ k.transpose(2, 3)) * self.temperature).softmax(dim=3)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(b, n, d))


class LocalInteraction(nn.Module):
    """LPI: two depthwise convolutions over the tokens, reshaped to an image and back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        b, n, d = x.shape
        x = x.permute(0, 2, 1).reshape(b, d, rows, columns)
        x = self.conv2(self.bn(F.gelu(self.conv1(x))))
        return x.reshape(b, d, n).permute(0, 2, 1)


class Perceptron(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """x + gain * branch(norm(x)), three times: XCA, LPI, MLP."""

    def __init__(self, dim: int, heads: int, eta: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.gamma1, self.gamma2, self.gamma3 = (
            nn.Parameter(eta * torch.ones(dim)) for _ in range(3)
        )
        self.attn = CrossCovariance(dim, heads)
        self.local_mp = LocalInteraction(dim)
        self.mlp = Perceptron(dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        x = x + self.drop_path(self.gamma1 * self.attn(self.norm1(x)))
        x = x + self.drop_path(self.gamma3 * self.local_mp(self.norm3(x), rows, columns))
        return x + self.drop_path(self.gamma2 * self.mlp(self.norm2(x)))


class ClassAttention(nn.Module):
    """Class attention that computes q, k and v of all tokens but uses only the first query."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q[:, :, :1] * k).sum(dim=3) * (d // self.heads) ** -0.5).softmax(dim=2)
        cls = (weights[:, :, None] @ v).transpose(1, 2).reshape(b, 1, d)
        return torch.cat((self.proj(cls), x[:, 1:]), dim=1)


class ClassBlock(nn.Module):
    """Class-attention block with the residuals of the published weights (tokens are doubled)."""

    def __init__(self, dim: int, heads: int, eta: float, tokens_norm: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.gamma1, self.gamma2 = (nn.Parameter(eta * torch.ones(dim)) for _ in range(2))
        self.attn = ClassAttention(dim, heads)
        self.mlp = Perceptron(dim)
        self.tokens_norm = tokens_norm

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        if self.tokens_norm:
            x = self.norm2(x)
        else:
            x = torch.cat((self.norm2(x[:, :1]), x[:, 1:]), dim=1)
        return x + torch.cat((self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]), dim=1)


class Backbone(nn.Module):
    """XCiT `arch` without a head; the output is the cls token."""

    def __init__(self, arch: str, drop_path: float) -> None:
        super().__init__()
        name, _, patch_size = arch.rpartition("_p")
        dim, depth, heads, eta, tokens_norm = WIDTHS[name]
        halvings = int(math.log2(int(patch_size)))
        widths = [3, *(dim // 2**i for i in reversed(range(halvings)))]
        layers = []
        for i in range(halvings):
            convolution = nn.Conv2d(widths[i], widths[i + 1], 3, 2, 1, bias=False)
            layers += [nn.Sequential(convolution, nn.BatchNorm2d(widths[i + 1])), nn.GELU()]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Sequential(*layers[:-1])
        self.pos_embeder = Positions(dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, eta, drop_path) for _ in range(depth))
        self.cls_attn_blocks = nn.ModuleList(
            ClassBlock(dim, heads, eta, tokens_norm) for _ in range(2)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.embed_dim = dim

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x)
        b, d, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = x + self.pos_embeder(b, rows, columns).reshape(b, d, -1).permute(0, 2, 1)
        for block in self.blocks:
            x = block(x, rows, columns)
        x = torch.cat((self.cls_token.expand(b, -1, -1), x), dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x)[:, 0]


class Prototypes(nn.Module):
    """Weight-normed linear layer, g v / |v|, renormalised in each forward pass."""

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


class Head(nn.Module):
    """Projection head: three Linear layers, L2 normalisation, prototypes."""

    def __init__(self, dim: int, out_dim: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = Prototypes(bottleneck, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=1))


class Network(nn.Module):
    """Runs the backbone once per view size, and the head once on all views."""

    def __init__(
        self, arch: str, out_dim: int, hidden: int, bottleneck: int, drop_path: float
    ) -> None:
        super().__init__()
        self.backbone = Backbone(arch, drop_path)
        self.head = Head(self.backbone.embed_dim, out_dim, hidden, bottleneck)

    def forward(self, views: list[Tensor]) -> Tensor:
        sizes = torch.tensor([view.shape[-1] for view in views])
        counts = torch.unique_consecutive(sizes, return_counts=True)[1].cumsum(0).tolist()
        output, start = torch.empty(0, device=views[0].device), 0
        for end in counts:
            output = torch.cat((output, self.backbone(torch.cat(views[start:end]))))
            start = end
        return self.head(output)


class ReferenceStep:
    """Student, teacher, centre and AdamW; a call is one step.

    `views`: the two global views, then the local ones, (n, 3, side, side) each.
    """

    def __init__(
        self,
        arch: str,
        *,
        out_dim: int = 65536,
        hidden: int = 2048,
        bottleneck: int = 256,
        drop_path: float = 0.1,
        clip_grad: float = 3.0,
        momentum: float = 0.996,
        student_temp: float = 0.1,
        teacher_temp: float = 0.04,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.student = Network(arch, out_dim, hidden, bottleneck, drop_path)
        self.teacher = Network(arch, out_dim, hidden, bottleneck, 0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.center = torch.zeros(1, out_dim)
        self.clip_grad, self.momentum = clip_grad, momentum
        self.temperatures = student_temp, teacher_temp
        self.autocast = autocast
        self.optimizer = torch.optim.AdamW(self.groups())

    def groups(self) -> list[dict]:
        """Return parameter groups: weight decay for all but biases and vectors."""
        decayed, plain = [], []
        for name, parameter in self.student.named_parameters():
            if parameter.requires_grad:
                exempt = name.endswith(".bias") or parameter.ndim == 1
                (plain if exempt else decayed).append(parameter)
        return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]

    def to(self, target: torch.device | torch.dtype) -> "ReferenceStep":
        """Move to a device, or convert to another precision."""
        self.student.to(target)
        self.teacher.to(target)
        self.center = self.center.to(target)
        return self

    def load(self, student: dict, teacher: dict) -> None:
        """Load the weights of another pair of networks."""
        self.student.load_state_dict(student)
        self.teacher.load_state_dict(teacher)

    def __call__(self, views: list[Tensor], lr: float = 1e-3, weight_decay: float = 0.04) -> float:
        """Run one step; return the loss."""
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = lr
            if i == 0:
                group["weight_decay"] = weight_decay
        device = views[0].device.type
        with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            teacher_logits = self.teacher(views[:2])
            student_logits = self.student(views)
            loss = self.loss(student_logits, teacher_logits, len(views))
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the loss is not finite")
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.student.parameters():
            if parameter.grad is not None:
                norm = parameter.grad.norm(2)
                norm.item()
                factor = self.clip_grad / (norm + 1e-6)
                if factor < 1:
                    parameter.grad.mul_(factor)
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
            for theirs, ours in pairs:
                ours.mul_(self.momentum).add_((1 - self.momentum) * theirs)
        return loss.item()

    def loss(self, student_logits: Tensor, teacher_logits: Tensor, views: int) -> Tensor:
        """Mean of -q log p over pairs of different views; updates the centre immediately."""
        student_temp, teacher_temp = self.temperatures
        student = (student_logits / student_temp).chunk(views)
        teacher = F.softmax((teacher_logits - self.center) / teacher_temp, dim=-1)
        total, terms = torch.zeros((), device=teacher.device), 0
        for t, q in enumerate(teacher.detach().chunk(2)):
            for v, logits in enumerate(student):
                if v != t:
                    total = total + (-q * F.log_softmax(logits, dim=-1)).sum(dim=-1).mean()
                    terms += 1
        with torch.no_grad():
            mean = teacher_logits.sum(0, keepdim=True) / len(teacher_logits)
            self.center = self.center * 0.9 + mean.to(self.center.dtype) * 0.1
        return total / terms
