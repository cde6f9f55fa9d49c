"""The 42 published supervised XCiT models, and how to recognise their files.

The facts are in configs/supervised_models.csv. Names, accuracies, parameters, FLOPs, dates and
hashes are from mmpretrain's metafile (open-mmlab/mmpretrain, configs/xcit/metafile.yml), whose
files were converted from facebookresearch/xcit's. full_crop_* is from timm's results-imagenet.csv:
the same weights with timm's and XCiT's own preprocessing.
"""

import csv
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from ssl_xcit.runtime.config import CONFIGS

TABLE = CONFIGS / "supervised_models.csv"


@dataclass(frozen=True)
class ZooModel:
    """One row of the table."""

    name: str  # xcit-SIZE-pPATCH_3rdparty[-dist]_in1k[-384px]
    top1: float  # percent of ImageNet's validation images, with mmpretrain's preprocessing
    top5: float
    full_crop_top1: float  # with the whole short side in the central crop (--full_crop, timm)
    full_crop_top5: float
    params: int  # with the classifier of 1,000 classes
    flops: int  # `ssl_xcit.models.flops` says what is counted
    date: str  # of the file, YYYYMMDD
    sha8: str  # the first 8 hexadecimal digits of the file's sha256

    @property
    def arch(self) -> str:
        """Our name of the architecture: xcit_small_12_p8."""
        return self.name.partition("_")[0].replace("-", "_")

    @property
    def image_size(self) -> int:
        """Side of the images, pixels."""
        return 384 if self.name.endswith("-384px") else 224

    @property
    def distilled(self) -> bool:
        """Whether it was trained with a teacher besides the labels."""
        return "-dist_" in self.name

    @property
    def checkpoint(self) -> str:
        """mmpretrain's file."""
        return f"{self.name}_{self.date}-{self.sha8}.pth"

    @property
    def official_file(self) -> str:
        """The original file of facebookresearch/xcit."""
        return f"{self.arch}_{self.image_size}{'_dist' if self.distilled else ''}.pth"

    @property
    def timm(self) -> str:
        """timm's name and tag."""
        return f"{self.arch}_{self.image_size}.fb_{'dist_' if self.distilled else ''}in1k"

    def published(self, full_crop: bool) -> tuple[float, float]:
        """(top-1, top-5) in percent: timm's figures with `full_crop`, else mmpretrain's."""
        if full_crop:
            return self.full_crop_top1, self.full_crop_top5
        return self.top1, self.top5


@functools.cache
def zoo() -> Mapping[str, ZooModel]:
    """All rows by name, in the order of the table."""
    kinds = {field.name: field.type for field in fields(ZooModel)}
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = [
            ZooModel(**{name: kinds[name](text) for name, text in line.items()})
            for line in csv.DictReader(file)
        ]
    return {row.name: row for row in rows}


def by_hash(sha256: str) -> ZooModel | None:
    """The model whose published file has this sha256, by its first 8 digits."""
    return next((row for row in zoo().values() if row.sha8 == sha256[:8]), None)


def by_file_name(path: str | Path) -> ZooModel | None:
    """The model that a file is named after, in mmpretrain's, XCiT's or timm's convention.

    mmpretrain's date and hash may be missing or differ; any extension will do.
    """
    stem = re.sub(r"\.(pth|pt|bin|safetensors)$", "", Path(path).name)
    stem = re.sub(r"_\d{8}-[0-9a-f]{8}$", "", stem)
    for row in zoo().values():
        if stem in (row.name, row.official_file.removesuffix(".pth"), row.timm):
            return row
    return None
