"""How a dataclass of settings is filled from files and flags. Which settings: config.py.

A setting has a dotted name (`optim.lr`) and a flat one, its last part (`lr`, as in DINO); either
may be spelled with - or _. jsonargparse checks the types and prints --help. Nothing here imports
torch or numpy, so --help and mistakes answer at once.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import jsonargparse
import yaml

from ssl_xcit.runtime.errors import UserError

Config = TypeVar("Config")
Value = bool | int | float | str | tuple

# DINO's options that are called something else here, so that the nearest to `output_dir` is not
# `out_dim`.
RENAMED = {
    "data_path": "data",
    "output_dir": "out",
    "use_fp16": "precision",
    "patch_size": "arch",
}
# Keys of a DINO args.txt (main_dino.py, run_with_submitit.py) that say where and on what machines
# it ran, not what was trained. data_path and output_dir are an image folder and a place on the
# authors' cluster: --data and --out are asked for instead.
IGNORED_DINO_KEYS = frozenset(
    """comment data_path dist_backend dist_url distributed gpu job_dir local_rank ngpus nodes
    output_dir partition patch_size rank timeout use_volta32 world_size""".split()  # noqa: SIM905
)


# Names


@functools.cache
def leaves(cls: type) -> dict[str, object]:
    """Dotted name -> type of every setting: {"arch": str, "optim.lr": float, ...}"""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{leaf}": kind for leaf, kind in leaves(hint).items()}
        else:
            found[name] = hint
    return found


@functools.cache
def _names(cls: type) -> dict[str, str]:
    """Accepted spelling -> dotted name: {"optim.lr": "optim.lr", "lr": "optim.lr", ...}"""
    return {spelling: name for name in leaves(cls) for spelling in (name, _leaf(name))}


def _leaf(name: str) -> str:
    """The flat name: `optim.lr` -> `lr`."""
    return name.rpartition(".")[2]


def flat(config: object) -> dict[str, Value]:
    """{"arch": "xcit_nano_12_p8", "optim.lr": 0.0005, ...}"""
    values = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            values |= {f"{item.name}.{leaf}": inner for leaf, inner in flat(value).items()}
        else:
            values[item.name] = value
    return values


def nested(values: Mapping[str, object]) -> dict:
    """{"optim.lr": 0.0005} -> {"optim": {"lr": 0.0005}}"""
    tree: dict = {}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[leaf] = value
    return tree


def build(cls: type[Config], values: Mapping[str, Value]) -> Config:
    """A `cls` of typed values by dotted name, the rest defaults.

    Raises UserError when a required setting is missing, or from the classes' own checks.
    """
    missing = [f"--{name}" for name in required(cls) if name not in values]
    if missing:
        raise UserError(f"missing {', '.join(missing)} (--help describes every option)")
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: hints[name](**value) if dataclasses.is_dataclass(hints[name]) else value
            for name, value in nested(values).items()
        }
    )


def required(cls: type) -> list[str]:
    """Names of the settings without a default."""
    return [
        item.name
        for item in dataclasses.fields(cls)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]


def _resolve(cls: type, spelling: str, where: str) -> str:
    """The dotted name of a setting; UserError with the nearest one when there is none.

    `where` is "--" for flags, else the file.
    """
    names, name = _names(cls), spelling.replace("-", "_")
    if name in names:
        return names[name]
    leaf = _leaf(name)
    candidates = [RENAMED.get(leaf), leaf, *difflib.get_close_matches(leaf, names, n=1)]
    nearest = next((names[candidate] for candidate in candidates if candidate in names), None)
    if where == "--":
        hint = f"nearest: --{nearest}" if nearest else "--help lists them all"
        raise UserError(f"unknown option --{spelling}; {hint}")
    raise UserError(
        f"{where}: unknown key {spelling}" + (f"; nearest: {nearest}" if nearest else "")
    )


# Types


def typed(cls: type, values: Mapping[str, object], where: str) -> dict[str, Value]:
    """`values` by dotted name, converted to their settings' types.

    Raises UserError that names the first misfit; `where` is "--" for flags, else the file.
    """
    parser, result = _parser(cls), {}
    for name, value in values.items():
        try:
            if value is None:
                raise jsonargparse.ArgumentError(None, "no value")
            result[name] = parser.parse_object(nested({name: value}), defaults=False)[name]
        except jsonargparse.ArgumentError:
            kind = leaves(cls)[name]
            key = f"--{name}" if where == "--" else f"{where}: {name}"
            message = f"{key}: expected {_describe(kind)}, got {as_text(value)}"
            close = difflib.get_close_matches(str(value), map(str, typing.get_args(kind)), n=1)
            raise UserError(f"{message}; nearest: {close[0]}" if close else message) from None
    return result


def _describe(kind: object) -> str:
    """A type in words."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(arguments)
    if arguments:
        count = "" if Ellipsis in arguments else f"{len(arguments)} "
        return f"{count}{'integers' if arguments[0] is int else 'numbers'}"
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


def as_text(value: object) -> str:
    """A value as flags and files spell it."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(as_text, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "nothing" if value in (None, "") else str(value)


# Flags


def read_flags(cls: type, argv: Sequence[str]) -> tuple[dict[str, Value], list[Path], bool]:
    """The flags' values by dotted name, the --config files, and whether --help was asked for.

    Splits and names; jsonargparse does the typing. The last of a repeated flag counts. Raises
    UserError.
    """
    flags: dict[str, str | list[str]] = {}
    paths: list[Path] = []
    wants_help = False
    tokens = list(argv)
    if places := getattr(cls, "POSITIONAL", ()):  # settings that may stand first, without a name
        words = _take(tokens, len(tokens))
        flags |= dict(zip(places[:-1], words, strict=False))
        flags |= {places[-1]: rest} if (rest := words[len(places) - 1 :]) else {}
    while tokens:
        token = tokens.pop(0)
        if token in ("-h", "--help"):
            wants_help = True
            continue
        if not token.startswith("--") or token == "--":
            raise UserError(f"unexpected argument {token!r}; options are --name value")
        spelling, equals, inline = token[2:].partition("=")
        name = "config" if spelling == "config" else _resolve(cls, spelling, "--")
        kind = str if name == "config" else leaves(cls)[name]
        many = typing.get_origin(kind) is tuple
        values = [inline] if equals else _take(tokens, len(tokens) if many else 1)
        if kind is bool and not values:
            values = ["true"]
        if not values:
            raise UserError(f"--{spelling} needs a value: {_describe(kind)}")
        if name == "config":
            paths.append(Path(values[0]))
        elif many:  # 0.4 1.0 as in DINO, or [0.4,1.0]
            flags[name] = re.sub(r"[\[\](),]", " ", " ".join(values)).split()
        elif kind is bool:  # DINO's own also say 1 and 0
            flags[name] = {"1": "true", "0": "false"}.get(values[0], values[0])
        else:
            flags[name] = values[0]
    return typed(cls, flags, "--"), paths, wants_help


def _take(tokens: list[str], most: int) -> list[str]:
    """Pop up to `most` values: what comes before the next option (-1 is a value)."""
    values = list(itertools.takewhile(lambda t: not re.match("--|-[a-zA-Z]", t), tokens[:most]))
    del tokens[: len(values)]
    return values


# Files


class _Loader(yaml.SafeLoader):
    """Plain YAML whose keys must be unique. It reads 5e-4 as text, which `typed` takes care of."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def to_yaml(config: object) -> str:
    """Every setting as YAML; `read_file` gives back equal values, floats to the last bit."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in flat(config).items()}
    return yaml.safe_dump(nested(values), sort_keys=False, default_flow_style=None, width=10**6)


def read_file(cls: type, path: Path) -> dict[str, Value]:
    """Values by dotted name from a YAML file, its keys nested or not, or a DINO args.txt.

    Raises UserError.
    """
    text = _read_text(path)
    if path.suffix == ".txt":
        return typed(cls, _read_dino_args(cls, text, path), str(path))
    values: dict[str, object] = {}
    for spelling, value in _open_sections(cls, _tree(text, path)):
        name = _resolve(cls, spelling, str(path))
        if name in values:
            raise UserError(f"{path}: {name} is given twice (again as {spelling})")
        values[name] = value
    return typed(cls, values, str(path))


def read_tree(path: Path) -> dict:
    """A YAML file as it stands, whatever configuration it is of. Raises UserError."""
    return _tree(_read_text(path), path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"cannot read the configuration {path}: {reason}") from error


def _tree(text: str, path: Path) -> dict:
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise UserError(f"{place}: {getattr(error, 'problem', error)}") from error
    if not isinstance(tree, dict | None):
        raise UserError(f"{path}: expected 'key: value' lines, got {as_text(tree)}")
    return tree or {}


def _open_sections(cls: type, tree: Mapping) -> Iterator[tuple[str, object]]:
    """(dotted or flat name, value) of a mapping whose sections may be nested."""
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if dataclasses.is_dataclass(hints.get(key)) and isinstance(value, dict | None):
            yield from ((f"{key}.{leaf}", inner) for leaf, inner in (value or {}).items())
        else:
            yield str(key), value


def _read_dino_args(cls: type, text: str, path: Path) -> dict[str, object]:
    """Values by dotted name from the "key: value" lines of a DINO args.txt (Python literals).

    patch_size counts only for an arch without _p16 or _p8 in its name, as in DINO. What is ignored
    or translated is printed as one line.
    """
    given: dict[str, object] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, colon, value = line.partition(":")
        if line.strip() and not colon:
            raise UserError(f"{path}, line {number}: expected 'key: value', got {line.strip()}")
        if line.strip():
            given[key.strip()] = _literal(value.strip())
    ignored = ", ".join(key for key in given if key in IGNORED_DINO_KEYS)
    kept = {key: value for key, value in given.items() if key not in IGNORED_DINO_KEYS}
    translated = ""
    if "use_fp16" in kept:
        kept["precision"] = "auto" if kept.pop("use_fp16") else "fp32"
        translated = f"; use_fp16 {given['use_fp16']} becomes precision {kept['precision']}"
    if "arch" in kept and "patch_size" in given and not re.search(r"_p\d+$", str(kept["arch"])):
        kept["arch"] = f"{kept['arch']}_p{given['patch_size']}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: ignored {ignored or 'nothing'}{translated}")
    return {_resolve(cls, key, str(path)): value for key, value in kept.items()}


def _literal(text: str) -> object:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# Help


def print_help(cls: type, values: Mapping[str, Value]) -> None:
    """Print every option of `cls`, with `values` in the place of the defaults they replace."""
    _parser(cls, tuple(values.items())).print_help()


@functools.cache
def _parser(cls: type, values: tuple[tuple[str, Value], ...] = ()) -> jsonargparse.ArgumentParser:
    """jsonargparse's view of `cls`: an argument for every setting, a group for every section."""
    usage = "".join(f"--{name} {name.upper()} " for name in required(cls))
    dotted = next((name for name in leaves(cls) if "." in name), None)
    flat_names = (
        f"Every --section.name is also --name: --{dotted} is --{_leaf(dotted)}. " if dotted else ""
    )
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        usage=f"%(prog)s {usage}[--config FILE] [--OPTION VALUE ...]",
        description=inspect.getdoc(cls),
        epilog=f"{flat_names}Names may be written with - or _. Booleans take true or false; alone "
        "they mean true. Flags win over --config, which wins over the recipe in configs/, which "
        "wins over the built-in defaults.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=100),
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    groups = {"": parser.add_argument_group("main")}
    groups[""].add_argument(
        "--config",
        metavar="FILE",
        help="Settings from a file: YAML, a run's config.yaml, or a DINO args.txt.",
    )
    defaults = dict.fromkeys(required(cls)) | _defaults(cls) | dict(values)
    for name, kind in leaves(cls).items():
        section, _, leaf = name.rpartition(".")
        owner = typing.get_type_hints(cls)[section] if section else cls
        if section not in groups:
            groups[section] = parser.add_argument_group(f"{inspect.getdoc(owner)} (--{section}.*)")
        shown = "required" if defaults[name] is None else f"default: {as_text(defaults[name])}"
        groups[section].add_argument(
            f"--{name}",
            type=kind,
            metavar=_metavar(kind),
            help=f"{_documentation(owner)[leaf]} [{shown}]".replace("%", "%%"),
        )
    return parser


def _defaults(cls: type) -> dict[str, Value]:
    """Dotted name -> default of every setting that has one."""
    values = {}
    for item in dataclasses.fields(cls):
        if item.default is not dataclasses.MISSING:
            values[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            section = flat(item.default_factory())
            values |= {f"{item.name}.{leaf}": value for leaf, value in section.items()}
    return values


def _metavar(kind: object) -> str:
    """What stands for an option's value in --help."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "{" + ",".join(arguments) + "}"
    if arguments:
        return "X ..." if Ellipsis in arguments else " ".join("X" for _ in arguments)
    return {int: "N", float: "X", bool: "{true,false}", str: "TEXT"}[kind]


@functools.cache
def _documentation(cls: type) -> dict[str, str]:
    """Setting -> the string below it in the source of `cls` or of a class that it extends."""
    texts = {}
    for owner in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        body = ast.parse(inspect.getsource(owner)).body[0].body
        for statement, below in itertools.pairwise(body):
            match statement, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(text)):
                    texts[name] = " ".join(text.split())
    return texts
