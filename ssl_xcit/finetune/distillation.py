"""Distillation (DeiT, Touvron et al., 2021, section 4): its loss and its teachers."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssl_xcit.checkpoints.formats import Statistics
from ssl_xcit.checkpoints.read import read
from ssl_xcit.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from ssl_xcit.runtime.errors import UserError


def distillation_loss(
    kind: str, logits: Float[Tensor, "b k"], teacher_logits: Float[Tensor, "b k"], temp: float
) -> Float[Tensor, ""]:
    """The distillation loss, a mean over the batch.

    hard: cross-entropy with the teacher's most likely class.
    soft: temp^2 KL(softmax(teacher / temp) || softmax(student / temp)). (DeiT's code divides the
    sum by batch x classes, so its soft term is smaller by the number of classes.)

    As in XCiT, labels and teacher share the same logits.
    """
    if kind == "hard":
        return F.cross_entropy(logits, teacher_logits.argmax(1))
    student, teacher = (F.log_softmax(x / temp, dim=1) for x in (logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temp**2


class Teacher(nn.Module):
    """A frozen classifier that takes images normalised for the student; always in eval mode."""

    def __init__(self, network: nn.Module, own: Statistics, student: Statistics) -> None:
        """`own`, `student`: mean and standard deviation of the images of either."""
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in own)
        student_mean, student_std = (torch.tensor(values).view(-1, 1, 1) for values in student)
        self.register_buffer("scale", student_std / std)
        self.register_buffer("shift", (student_mean - mean) / std)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits."""
        return self.network(images * self.scale + self.shift)


def load_teacher(path: str, arch: str, num_classes: int, student: Statistics) -> Teacher:
    """The classifier in the file or run `path`: torchvision's if `arch` is "torchvision:NAME".

    `student`: mean and standard deviation of the student's images. Raises UserError for a file that
    is no such network, has no classifier, or other classes or channels.
    """
    channels = len(student[0])
    if arch:
        if channels != 3:
            raise UserError(f"{arch} takes images of 3 channels, these have {channels}")
        network = _torchvision(arch.removeprefix("torchvision:"), path, num_classes)
        return Teacher(network, (IMAGENET_MEAN, IMAGENET_STD), student)
    weights = read(path)
    if weights.num_classes != num_classes:
        raise UserError(
            f"the teacher {weights.path} has a classifier of {weights.num_classes} classes, the "
            f"images have {num_classes}: take a teacher that was trained on these classes"
        )
    if weights.in_chans != channels:
        raise UserError(f"the teacher {weights.path} takes images of {weights.in_chans} channels")
    return Teacher(weights.build(), weights.statistics, student)


def _torchvision(name: str, path: str, num_classes: int) -> nn.Module:
    from torchvision import models  # seconds to import, and most runs have no such teacher

    known = models.list_models(module=models)
    if name not in known:
        few = ", ".join(known[:5])
        raise UserError(f"torchvision has no classifier called {name}; it has {few} and others")
    network = models.get_model(name, weights=None, num_classes=num_classes)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for foreign, cut or unsafe files
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path} cannot be read safely as weights: {reason}") from error
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: not the weights of torchvision's {name} for {num_classes} classes: {reason}"
        ) from error
    return network
