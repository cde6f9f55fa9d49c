"""Features of a dataset, kept in a folder as they are made, so that a killed evaluation continues.

A folder holds, for each dataset (`train`, `test`), files of about PART images:

    train-00000000.safetensors    features of each kind, labels, indices; metadata: what made them
    features.json                 written last: what an evaluation needs to know about all of it
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ssl_xcit.checkpoints.tensor_file import checksum, read_tensors
from ssl_xcit.data.datasets import Images
from ssl_xcit.evaluation.features import Extraction, Features
from ssl_xcit.runtime import distributed
from ssl_xcit.runtime.errors import UserError
from ssl_xcit.runtime.files import make_folder, new_file
from ssl_xcit.runtime.sealed import read_sealed, seal, unseal

PART = 65_536  # images: minutes of a GPU, and at 384 float32 each 100 MB


def cached_features(
    extraction: Extraction,
    images: Images,
    kinds: Sequence[str],
    folder: Path | None = None,
    name: str = "",
) -> dict[str, Features]:
    """`extraction.features` of all images, on every rank.

    With `folder`, each part is stored there under `name` as soon as it is complete, and a part that
    is there already is read: after a kill the same folder continues. The ranks must see one
    filesystem. Raises UserError if the folder holds other features, or cannot be written.
    """
    subject, view = extraction.subject, extraction.view
    facts = {
        "subject": None if subject is None else fingerprint(subject.backbone.state_dict()),
        "images": [images.num_samples, None if folder is None else images.fingerprint()],
        "view": [view.resize, view.crop, view.interpolation],
        "statistics": None if subject is None else [*subject.mean, *subject.std],
        "kinds": ["pixels"] if subject is None else list(kinds),
        "precision": extraction.config.precision,
        "part": PART,
    }
    parts = []
    # Equal parts, so that the last one has images for every rank, too
    count = max(1, round(images.num_samples / PART))
    for subset in np.array_split(np.arange(images.num_samples), count):
        file = None if folder is None else folder / f"{name}-{subset[0]:08d}.safetensors"
        # Every rank does what rank 0 sees
        if file and distributed.gather_variable(torch.tensor([int(file.exists())]))[0]:
            parts.append(_read(file, facts))
            continue
        parts.append(extraction.features(images, kinds, subset))
        if file is not None and extraction.ranks.rank == 0:
            _write(file, parts[-1], facts)
    distributed.barrier()
    return _joined(parts)


def load_facts(folder: Path) -> dict:
    """The content of features.json. Raises UserError if the features are not complete."""
    try:
        facts = read_sealed(folder / "features.json")
        facts["features"], facts["train"]["images"], facts["test"]["images"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no complete features ({error}): make them with "
            f"--save-features {folder}"
        ) from error
    if isinstance(facts["features"], str):  # older folders hold one kind
        facts["features"] = [facts["features"]]
    return facts


def load_features(folder: Path, name: str) -> dict[str, Features]:
    """All features of the dataset `name` in a folder. Raises UserError for damaged files."""
    files = sorted(folder.glob(f"{name}-*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no features of {name}")
    found = _joined([_read(file, None) for file in files])
    count, wanted = len(next(iter(found.values())).labels), load_facts(folder)[name]["images"]
    if count != wanted:
        raise UserError(f"{folder} holds features of {count:,} of the {wanted:,} images of {name}")
    return found


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and values: tells one network from another."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _write(file: Path, found: dict[str, Features], facts: dict) -> None:
    tensors = {kind: features.features for kind, features in found.items()}
    one = next(iter(found.values()))
    tensors |= {"labels": one.labels, "indices": one.indices}
    make_folder(file.parent)
    try:
        with new_file(file) as opened:
            # In one entry: of several, safetensors draws the order, and the bytes would differ
            sealed = seal({**facts, "checksum": checksum(tensors, {})})
            save_file(tensors, opened.name, {"facts": json.dumps(sealed)})
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be written: {error}") from error


def _read(file: Path, facts: dict | None) -> dict[str, Features]:
    """One part. Raises UserError if it is damaged, or was not made as `facts` say (None: any)."""
    try:
        tensors, metadata = read_tensors(file)
        stored = unseal(json.loads(metadata.get("facts", "{}")))
        if stored.pop("checksum", None) not in (None, checksum(tensors, {})):
            raise ValueError("its checksum differs from its content")
        labels, indices = tensors.pop("labels"), tensors.pop("indices")
    except (ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged ({error}): remove it to make it again") from error
    if facts is not None and stored != facts:
        odd = [key for key in facts if stored.get(key) != facts[key]]
        raise UserError(
            f"{file} holds other features (different: {', '.join(odd)}): choose another folder, or "
            "remove this one"
        )
    return {kind: Features(rows, labels, indices) for kind, rows in tensors.items()}


def _joined(parts: list[dict[str, Features]]) -> dict[str, Features]:
    if len(parts) == 1:
        return parts[0]  # not copied
    columns = {kind: zip(*(part[kind] for part in parts), strict=True) for kind in parts[0]}
    return {kind: Features(*map(torch.cat, columns[kind])) for kind in columns}
