"""The formats of XCiT weights: how to tell them apart, and their names for the same tensors.

    official     facebookresearch/xcit's names, which are this project's own
    dino         the official names after `backbone.`, and a projection head after `head.`
    timm         `pos_embed.` instead of `pos_embeder.`; class attention has q, k, v one by one
    mmpretrain   `backbone.`, OpenMMLab's names for the layers, q, k, v one by one, `head.fc.`

These are functions of dictionaries of tensors; `ssl_xcit.checkpoints.read` reads the files and
`ssl_xcit.checkpoints.convert` writes them. A tensor that no rule knows keeps its name, and
`ssl_xcit.checkpoints.read.check_tensors` finds it: nothing is dropped silently.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ssl_xcit.runtime.errors import UserError

StateDict = dict[str, Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]

CLASSIFIER = ("head.weight", "head.bias")

# Names of the networks in training files -> ours. The first of a family is read by default.
FAMILIES = (
    {"teacher": "teacher", "student": "student"},  # DINO
    {"model": "model", "model_ema": "model_ema"},  # XCiT
    {"state_dict": "model", "state_dict_ema": "model_ema"},  # mmpretrain, timm, DINO's linear probe
)
# Other entries of such files, useless without the training that wrote them.
EXTRAS = {
    *("optimizer", "lr_scheduler", "scheduler", "param_schedulers", "epoch", "args", "meta"),
    *("model_ema", "scaler", "fp16_scaler", "amp_scaler", "loss_scaler", "dino_loss", "best_acc"),
    *("message_hub", "ema_state_dict", "arch", "version", "metric"),
    # Lightning's
    *("optimizer_states", "lr_schedulers", "callbacks", "loops", "native_amp_scaling_state"),
    *("MixedPrecision", "hyper_parameters", "hparams_name", "pytorch-lightning_version"),
}

# Parts of keys, official -> mmpretrain. Each key matches at most one rule for its start and one for
# its layer; in this order the rules also work backwards.
MMPRETRAIN = (
    (".pos_embeder.token_projection.", ".pos_embed.token_projection.conv."),
    (".blocks.", ".xca_layers."),
    (".cls_attn_blocks.", ".ca_layers."),
    (".mlp.fc1.", ".ffn.layers.0.0."),
    (".mlp.fc2.", ".ffn.layers.1."),
    (".local_mp.conv1.", ".local_mp.conv1.conv."),
    (".local_mp.conv2.", ".local_mp.conv2.conv."),
    (".local_mp.bn.", ".local_mp.conv1.bn."),
)
# The newer weight norm's names -> the older one's, which are ours.
WEIGHT_NORM = {
    "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
    "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
}


class Contents(NamedTuple):
    """What a file holds, before its names are examined."""

    networks: dict[str, StateDict]  # by role; the first is the default
    center: Tensor | None  # DINO's
    ignored: list[str]  # known entries that are not used here
    ours: bool = False  # written by this project
    step: int | None = None  # of a checkpoint
    statistics: Statistics | None = None  # mean and standard deviation of the images


class Named(NamedTuple):
    """One network under the official names."""

    format: str
    state: StateDict  # with the classifier if there is one, and with unknown tensors
    dino_head: StateDict  # under `ssl_xcit.dino.head.DINOHead`'s names; empty without


# Containers


def unwrap(content: object, path: object, prefix: str = "") -> Contents:
    """The networks in the content of a .pth: a state dict, or a dictionary of one or two of them.

    `prefix`: only tensors whose names begin with it belong to the network, see `_under`. Raises
    UserError (naming `path`) for anything else, and for unknown entries that hold tensors.
    """
    if not isinstance(content, dict) or not content or not all(isinstance(k, str) for k in content):
        raise UserError(f"{path} holds no state dict but a {type(content).__name__}")
    if prefix:
        inner, others = _under(content, prefix, path)
        found = unwrap(inner, f"{prefix} of {path}")
        return found._replace(ignored=[*found.ignored, *others])
    if all(isinstance(value, Tensor) for value in content.values()):
        networks, ignored = _without_wrappers("", _tensors(content, path), path)
        return Contents(networks, None, ignored)
    families = [family for family in FAMILIES if next(iter(family)) in content]
    families = families or [family for family in FAMILIES if family.keys() & content.keys()]
    if len(families) != 1:
        raise UserError(
            f"{path} holds {'no' if not families else 'more than one kind of'} network: its "
            f"entries are {listing(content)}; expected one of teacher, student, model, state_dict"
            f"{_advice(content)}"
        )
    networks, ignored = {}, []
    for key, role in families[0].items():
        if content.get(key) is not None:
            state = _tensors(content[key], f"{key} of {path}")
            found, others = _without_wrappers(role, state, f"{key} of {path}")
            networks |= found
            ignored += others
    if not networks:
        raise UserError(f"{path} holds no network: its {listing(families[0])} are empty")
    others = content.keys() - families[0].keys()
    unknown = sorted(key for key in others - EXTRAS if _holds_tensors(content[key]))
    if unknown:
        raise UserError(
            f"{path} has tensors in entries that are not known here: {listing(unknown)}; "
            f"remove them, or save the network alone{_advice(content)}"
        )
    loss = content.get("dino_loss")
    center = loss.get("center") if isinstance(loss, dict) else None
    center = center if isinstance(center, Tensor) else None
    pair = content.get("mean"), content.get("std")  # written by `convert`
    known = all(isinstance(values, list) and values for values in pair)
    ignored += sorted(others - ({"mean", "std"} if known else set()))
    statistics = tuple(map(tuple, pair)) if known else None
    return Contents(networks, center, ignored, statistics=statistics)


def _without_wrappers(
    role: str, state: StateDict, where: object
) -> tuple[dict[str, StateDict], list[str]]:
    """({role: network}, what else there was), without the names of the modules around a network.

    torch.compile puts `_orig_mod.` before a module's names, other programs `model.`, `encoder.` or
    `student_backbone.`. An XCiT is where a cls_token is. Of two, as of a student and its teacher,
    each gets its role. Raises UserError if there are more, or if it is not clear which is which.
    """
    state = _rename(state, lambda key: key.replace("_orig_mod.", ""), where)
    places = _places(state)
    # DINO's own names and those of DistributedDataParallel are no wrappers, see `to_official`
    outer = [re.sub(r"^(module\.)?(.*?)(backbone\.)?$", r"\2", place) for place in places]
    if outer in ([], [""]):
        classifier = any(re.search(r"^(module\.)?head\.(fc\.)?weight$", key) for key in state)
        return {role or ("model" if classifier else "backbone"): state}, []
    roles = dict.fromkeys(places, role or "backbone")
    if len(places) > 1:
        words = re.compile("teacher|momentum|ema|target")
        roles = {place: "teacher" if words.search(place) else "student" for place in places}
        if sorted(roles.values()) != ["student", "teacher"]:
            raise UserError(
                f"{where} holds {len(places)} networks, {listing(places, 20)}, and no name says "
                f"which is the teacher{_choose(places[0])}"
            )
    # Of a `backbone` among others its head may be wanted, too
    prefixes = {re.sub(r"(?<=\.)backbone\.$", "", place): roles[place] for place in places}
    networks = {
        name: {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        for prefix, name in prefixes.items()
    }
    left = {key.rpartition(".")[0] for key in state if not key.startswith(tuple(prefixes))}
    return networks, sorted(left)


def _under(content: dict, prefix: str, path: object) -> tuple[dict, list[str]]:
    """(the content with only what has names under `prefix`, without it; the other networks).

    The prefix stands within the entries that hold networks, or begins with an entry's name. Raises
    UserError if nothing has such a name, with those that networks have.
    """
    start = f"{prefix.replace('_orig_mod.', '').rstrip('.')}."

    def within(tensors: StateDict) -> StateDict:
        return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}

    entries = [entry for family in FAMILIES for entry in family if entry in content]
    found = {entry: within(_flat(content[entry])) for entry in entries}
    found = {entry: tensors for entry, tensors in found.items() if tensors}
    # What stands beside the networks without tensors says no more than it did
    beside = {key: value for key, value in content.items() if not _holds_tensors(value)}
    beside |= {key: content[key] for key in ("dino_loss",) if key in content}
    whole = _flat(content)
    inner = found | beside if found else within(whole)
    places = _places(whole)
    if not inner:
        known = f"its names are {listing(whole)}"
        if places:
            known = f"its networks are under {listing(places, 20)}"
        raise UserError(f"{path} has no tensor under --prefix {prefix}: {known}")
    taken = (start, *(f"{entry}.{start}" for entry in found))
    return inner, [place for place in places if not place.startswith(taken)]


def _flat(value: object, name: str = "") -> StateDict:
    """All tensors in nested dictionaries, by their dotted names, without torch.compile's part."""
    if isinstance(value, Tensor):
        return {name.replace("_orig_mod.", ""): value}
    parts = value.items() if isinstance(value, Mapping) else ()
    flat: StateDict = {}
    for key, part in parts:
        flat |= _flat(part, f"{name}.{key}" if name else str(key))
    return flat


def _places(names: Iterable[str]) -> list[str]:
    """What stands before the names of each XCiT."""
    return [key.removesuffix("cls_token") for key in names if re.search(r"(^|\.)cls_token$", key)]


def _advice(content: dict) -> str:
    """How to choose, for the end of a message; empty where there is no network to choose."""
    places = [place for place in _places(_flat(content)) if place]
    if not places:
        return ""
    return f"{_choose(places[0])}; there are {listing(places, 20)}"


def _choose(place: str) -> str:
    return f": choose by --prefix, such as --prefix {place} (--init_prefix for --init_from)"


def _tensors(network: object, where: object) -> StateDict:
    if not isinstance(network, dict) or not network:
        raise UserError(f"{where} is no state dict but a {type(network).__name__}")
    odd = [str(key) for key, value in network.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{where} holds entries that are no tensors: {listing(odd)}")
    return {key: value.detach() for key, value in network.items()}


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def choose(contents: Contents, role: str, path: object) -> str:
    """The role to read when `role` is asked for; "" asks for the first.

    "teacher" and "student" name a self-distilled pair: a file of other networks gives its first one
    for either.
    """
    if role in contents.networks:
        return role
    pair = {"teacher", "student"}
    if not role or (role in pair and not pair & contents.networks.keys()):
        return next(iter(contents.networks))
    raise UserError(f"{path} holds {' and '.join(contents.networks)}, not {role}")


# Names


def to_official(state: StateDict, path: object) -> Named:
    """One network under the official names, from any format.

    Raises UserError when no format has these names, or when two tensors would get the same name.
    """
    if all(key.startswith("module.") for key in state):  # DistributedDataParallel
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    if _any_starts(state, "backbone.xca_layers.", "backbone.ca_layers."):
        return Named("mmpretrain", from_mmpretrain(state, path), {})
    if state.keys() <= {"linear.weight", "linear.bias"}:
        raise UserError(f"{path} holds a linear classifier of features and no XCiT to make them")
    dino = _any_starts(state, "backbone.", "head.mlp.", "head.last_layer.")
    state = _rename(state, lambda key: key.removeprefix("backbone."), path)
    state, head = _split_dino_head(state)
    timm = any(key.startswith("pos_embed.") or _one_of_qkv(key) for key in state)
    if not timm and not _any_starts(state, "blocks.", "cls_attn_blocks.", "cls_token"):
        raise UserError(
            f"{path} is no XCiT: no format has the names of its {len(state)} tensors "
            f"({listing(state)})"
        )
    if dino:  # DINO may have trained timm's model
        return Named("dino", from_timm(state, path) if timm else state, head)
    if timm:
        return Named("timm", from_timm(state, path), {})
    return Named("official" if "head.weight" in state else "dino_backbone", state, {})


def from_timm(state: StateDict, path: object = "the state dict") -> StateDict:
    """timm's names -> the official ones."""
    layer = re.compile(r"^pos_embed(?=\.token_projection\.)")
    return _join_qkv(_rename(state, lambda key: layer.sub("pos_embeder", key), path))


def to_timm(state: StateDict) -> StateDict:
    """The official names -> timm's."""
    return _rename(_split_qkv(state), lambda key: re.sub(r"^pos_embeder\.", "pos_embed.", key))


def from_mmpretrain(state: StateDict, path: object = "the state dict") -> StateDict:
    """mmpretrain's names (`backbone.*`, `head.fc.*`) -> the official ones."""

    def name(key: str) -> str:
        if not key.startswith("backbone."):
            return re.sub(r"^head\.fc\.(weight|bias)$", r"head.\1", key)
        key = key.removeprefix("backbone.")
        if found := re.fullmatch(r"patch_embed\.proj\.(\d+)\.(conv|bn)\.(\w+)", key):
            # the official stem also counts the activations between its layers
            return f"patch_embed.proj.{2 * int(found[1])}.{int(found[2] == 'bn')}.{found[3]}"
        key = f".{key}"
        for official, theirs in MMPRETRAIN:
            key = key.replace(theirs, official, 1)
        return key[1:]

    return _join_qkv(_rename(state, name, path))


def to_mmpretrain(state: StateDict) -> StateDict:
    """The official names -> mmpretrain's."""

    def name(key: str) -> str:
        if key in CLASSIFIER:
            return key.replace("head.", "head.fc.")
        if found := re.fullmatch(r"patch_embed\.proj\.(\d+)\.([01])\.(\w+)", key):
            layer = ("conv", "bn")[int(found[2])]
            return f"backbone.patch_embed.proj.{int(found[1]) // 2}.{layer}.{found[3]}"
        key = f".{key}"
        for official, theirs in MMPRETRAIN:
            key = key.replace(official, theirs, 1)
        return f"backbone{key}"

    return _rename(_split_qkv(state), name)


def _any_starts(state: StateDict, *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in state)


def _rename(
    state: StateDict, name: Callable[[str], str], path: object = "the state dict"
) -> StateDict:
    renamed: StateDict = {}
    for key, tensor in state.items():
        if name(key) in renamed:
            raise UserError(f"{path} has two tensors for {name(key)}: one of them is {key}")
        renamed[name(key)] = tensor
    return renamed


def _split_dino_head(state: StateDict) -> tuple[StateDict, StateDict]:
    """(backbone and unknown tensors, projection head without `head.`)."""
    rest, head = {}, {}
    for key, tensor in state.items():
        layer = key.removeprefix("head.")
        layer = WEIGHT_NORM.get(layer, layer)
        known = re.fullmatch(r"mlp\.(\d+\.)?\w+|last_layer\.weight_[gv]", layer)
        if key.startswith("head.") and known and layer not in head:
            head[layer] = tensor
        else:
            rest[key] = tensor
    return rest, head


def _one_of_qkv(key: str) -> re.Match[str] | None:
    return re.fullmatch(r"cls_attn_blocks\.(\d+)\.attn\.[qkv]\.(weight|bias)", key)


def _join_qkv(state: StateDict) -> StateDict:
    """Class attention's q, k and v stacked into qkv, where all three exist and match."""
    joined: StateDict = {}
    used: set[str] = set()
    for key, tensor in state.items():
        if found := _one_of_qkv(key):
            names = [f"cls_attn_blocks.{found[1]}.attn.{x}.{found[2]}" for x in "qkv"]
            whole = f"cls_attn_blocks.{found[1]}.attn.qkv.{found[2]}"
            parts = [state[name] for name in names if name in state]
            alike = {(part.shape, part.dtype) for part in parts}
            if len(parts) == 3 and len(alike) == 1 and tensor.ndim > 0 and whole not in state:
                used.update(names)
                if key == names[0]:
                    joined[whole] = torch.cat(parts)
        if key not in used:
            joined[key] = tensor
    return joined


def _split_qkv(state: StateDict) -> StateDict:
    """The reverse of `_join_qkv`; each part owns its memory, as files require."""
    split: StateDict = {}
    for key, tensor in state.items():
        found = re.fullmatch(r"(cls_attn_blocks\.\d+\.attn\.)qkv(\.weight|\.bias)", key)
        if found:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                split[f"{found[1]}{letter}{found[2]}"] = part.clone()
        else:
            split[key] = tensor
    return split


def listing(names: Iterable[str], most: int = 3) -> str:
    """The first `most` names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
