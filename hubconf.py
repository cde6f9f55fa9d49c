"""torch.hub entry points: one for each architecture, by the names of `ssl_xcit.models.xcit`.

    load = functools.partial(torch.hub.load, "path/to/this/repository", source="local")
    load("xcit_small_12_p16")                                        the architecture, untrained
    load("xcit_small_12_p16", pretrained="file.pth")          a file in any format, a run folder
    load("xcit_small_12_p16", pretrained="file.pth", num_classes=0)       without its classifier

Nothing is downloaded.
"""

# Names without underscore would be listed as entry points.
from ssl_xcit.models.variants import ARCHITECTURES as _ARCHITECTURES
from ssl_xcit.models.xcit import XCiT as _XCiT

dependencies = ["torch", "safetensors", "jaxtyping"]


def _entry_point(arch: str) -> object:
    def build(
        pretrained: str = "",
        num_classes: int | None = None,
        role: str = "teacher",
        drop_path_rate: float = 0.0,
        prefix: str = "",
    ) -> _XCiT:
        from ssl_xcit.checkpoints.read import read
        from ssl_xcit.models.xcit import build_xcit
        from ssl_xcit.runtime.errors import UserError

        if isinstance(pretrained, bool) and pretrained:
            raise UserError("nothing is downloaded: pretrained must be the path of a file or run")
        if not pretrained:
            classes = 1000 if num_classes is None else num_classes
            return build_xcit(arch, num_classes=classes, drop_path_rate=drop_path_rate)
        weights = read(pretrained, role, arch, prefix)
        if num_classes not in (None, 0, weights.num_classes):
            raise UserError(
                f"{weights.path} has {weights.num_classes or 'no'} classes, not {num_classes}: "
                "take the backbone by num_classes=0 and put your own classifier into its `head`"
            )
        return weights.build(classifier=num_classes != 0, drop_path_rate=drop_path_rate)

    build.__name__ = build.__qualname__ = arch
    build.__doc__ = f"""{arch}, untrained or with the weights in `pretrained`.

    Args:
        pretrained: path of a run, or of a file in any format that `ssl_xcit.checkpoints` knows.
        num_classes: 0 for the cls token instead of logits; otherwise the classes of the file, or
            without a file any number (1000).
        role: which network of a file with several.
        drop_path_rate: for training on.
        prefix: what the names of the network begin with, in a file of several.

    Returns the network in evaluation mode with `pretrained`, in training mode without. Raises
    UserError for a file that is not exactly this architecture.
    """
    return build


globals().update({_arch: _entry_point(_arch) for _arch in _ARCHITECTURES})
