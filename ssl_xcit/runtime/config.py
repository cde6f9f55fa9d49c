"""The configuration: frozen dataclasses, and how a command fills them.

Precedence, weakest first:
1. the defaults below, which are those of the DINO paper (and of its main_dino.py);
2. the recipe under configs/, such as pretrain/{arch}.yaml;
3. files given by --config: YAML (nested or flat keys), a run's own config.yaml, a DINO args.txt;
4. flags: dotted (--optim.lr) or flat as in DINO (--lr), with - or _.

The string below a field is its text in --help.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal

from ssl_xcit.runtime import options, processor
from ssl_xcit.runtime.errors import UserError, exit_on_user_error, starting
from ssl_xcit.runtime.files import write_text
from ssl_xcit.runtime.options import Config

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = (PACKAGE / "configs").is_dir()  # by a wheel, which packs configs/ into the package
CONFIGS = (PACKAGE if INSTALLED else PACKAGE.parent) / "configs"


# A run folder belongs to one configuration; these settings may change when the run continues. The
# two batch fields may, because a run fixes only their product with the number of ranks.
RUN_KEYS_THAT_MAY_CHANGE = frozenset(
    {
        "out",
        "optim.batch_size_per_gpu",
        "optim.accumulation_steps",
        "run.device",
        "run.num_workers",
        "run.compile",
        "run.activation_checkpointing",
        "crops.crops_in_turn",
        "run.log_every",
        "run.save_every",
        "run.max_bad_steps",
        "run.stall_timeout",
        "run.keep_last",
        "run.saveckp_freq",
        "run.tensorboard",
        "run.wandb",
        "probe.every",
        "probe.probe_train",
        "probe.probe_test",
        "probe.probe_k",
        "probe.probe_resize",
        "probe.probe_crop",
        "probe.probe_limit",
    }
)

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]


# Bounds by their wording in an error message. NaN and infinity satisfy none of them.
BOUNDS = {
    "> 0": lambda number: 0 < number < math.inf,
    ">= 0": lambda number: 0 <= number < math.inf,
    ">= 1": lambda number: 1 <= number < math.inf,
    ">= 2": lambda number: 2 <= number < math.inf,
    "in [0, 0.5]": lambda number: 0 <= number <= 0.5,
    "in [0, 1]": lambda number: 0 <= number <= 1,
    "in [0, 1)": lambda number: 0 <= number < 1,
    "in (0, 1]": lambda number: 0 < number <= 1,
    "in [0, 2^63)": lambda number: 0 <= number < 2**63,
}


def check(section: object, bound: str, *names: str) -> None:
    """Raise UserError unless every named number (every element of a tuple) satisfies `bound`."""
    for name in names:
        value = getattr(section, name)
        if not all(map(BOUNDS[bound], value if isinstance(value, tuple) else (value,))):
            raise UserError(f"{name} must be {bound}, got {options.as_text(value)}")


def check_range(section: object, *names: str) -> None:
    """Raise UserError unless each named pair is (low, high) with low <= high."""
    for name in names:
        low, high = getattr(section, name)
        if low > high:
            raise UserError(f"{name} must be (low, high) with low <= high, got {low}, {high}")


def load_config(
    cls: type[Config], files: Sequence[str] = (), argv: Sequence[str] | None = None
) -> Config:
    """A `cls` filled from its defaults < `files` < --config files < flags (argv, or sys.argv).

    `files` are paths under configs/; "{arch}" in them stands for the architecture that the flags
    or the --config files name. Raises UserError for anything wrong, SystemExit after --help.
    """
    flags, paths, wants_help = options.read_flags(cls, sys.argv[1:] if argv is None else argv)
    given: dict[str, options.Value] = {}
    for path in paths:
        given |= options.read_file(cls, path)
    given |= flags
    values = over_recipes(cls, files, given)
    if wants_help:
        options.build_parser(cls, values.items()).print_help()
        raise SystemExit(0)
    return options.build(cls, values)


def run_command(
    cls: type[Config],
    target: str,
    files: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Read the configuration as `load_config` does, and call `target` ("module:function") with it.

    The target is imported only once the configuration is known to be valid. A UserError becomes
    one line on stderr and exit status 2.
    """
    with exit_on_user_error():
        with starting():
            config = load_config(cls, files, argv)
            processor.prepare()
            run = resolve_name(target)
        run(config)


def over_recipes(
    cls: type, files: Sequence[str], given: dict[str, options.Value]
) -> dict[str, options.Value]:
    """`given` over the values of `files`, see `load_config`."""
    recipe: dict[str, options.Value] = {}
    for name in files:
        if "{arch}" in name and "arch" not in given:
            continue  # no recipe without --arch: --help or an error follows
        path = CONFIGS / name.format_map(given)
        if "{arch}" in name and not path.exists():
            continue  # the configuration refuses this architecture
        recipe |= options.read_file(cls, path)
    return recipe | given


def read_config(cls: type[Config], path: str | Path) -> Config:
    """A `cls` from one file alone over the defaults: no recipe, no flags. Raises UserError."""
    return options.build(cls, options.read_file(cls, Path(path)))


def save_config(config: object, path: str | Path) -> None:
    """Write every setting as YAML that reads back equal, floats to the last bit; atomically."""
    header = "# Every setting of a run. To repeat it: --config THIS_FILE --out ANOTHER_FOLDER\n"
    write_text(Path(path), header + options.to_yaml(config))


def config_differences(old: object, new: object) -> list[str]:
    """The settings that make `new` a different run from `old`: ["optim.lr: 0.0005 -> 0.001", ...].

    Ignores RUN_KEYS_THAT_MAY_CHANGE, and the precision "auto", which is that of the run. The caller
    checks the global batch, since it depends on the number of ranks.
    """
    before, after = options.flat(old), options.flat(new)
    same = RUN_KEYS_THAT_MAY_CHANGE | {
        name for name in ("precision", "run.precision") if after.get(name) == "auto"
    }
    return [
        f"{name}: {options.as_text(before[name])} -> {options.as_text(value)}"
        for name, value in after.items()
        if value != before[name] and name not in same
    ]
