"""How a dataclass of settings is filled from files and flags. Which settings: config.py.

A setting has a dotted name (`optim.lr`) and a flat one, its last part (`lr`, as in DINO); either
may be spelled with - or _. argparse splits the command line and prints --help; flags and files
share one conversion to the settings' types. Nothing here imports torch or numpy, so --help and
mistakes answer at once.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import operator
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import yaml

from ssl_xcit.runtime.errors import UserError

Config = TypeVar("Config")
Value = bool | int | float | str | tuple

# DINO's options that have another name here: without it, `out_dim` is nearest to `output_dir`.
RENAMED = {"data_path": "data", "output_dir": "out", "use_fp16": "precision", "patch_size": "arch"}
# Keys of a DINO args.txt (main_dino.py, run_with_submitit.py) that say where it ran, not what was
# trained. data_path and output_dir are folders of the authors' cluster: --data and --out are asked
# for instead.
IGNORED_DINO_KEYS = frozenset(
    """comment data_path dist_backend dist_url distributed gpu job_dir local_rank ngpus nodes
    output_dir partition patch_size rank timeout use_volta32 world_size""".split()  # noqa: SIM905
)
# Settings of former versions that the config.yaml of an old run may hold. None changed a number.
REMOVED = frozenset({"head.prototype_chunk"})
BOOLEANS = dict.fromkeys(("true", "yes", "on", "1"), True)
BOOLEANS |= dict.fromkeys(("false", "no", "off", "0"), False)


# Names


class Setting(NamedTuple):
    """One setting of a configuration."""

    kind: object
    default: Value | None  # None: it is required
    text: str  # in --help
    section: str  # the heading above it there


@functools.cache
def _settings(cls: type, section: str = "main") -> dict[str, Setting]:
    """Dotted name -> setting, in the order of --help."""
    hints, texts, found = typing.get_type_hints(cls), _documentation(cls), {}
    for item in dataclasses.fields(cls):
        kind, name = hints[item.name], item.name
        if dataclasses.is_dataclass(kind):
            inner = _settings(kind, f"{inspect.getdoc(kind)} (--{name}.*)")
            found |= {f"{name}.{leaf}": setting for leaf, setting in inner.items()}
        else:
            default = None if item.default is dataclasses.MISSING else item.default
            found[name] = Setting(kind, default, texts[name], section)
    return found


def leaves(cls: type) -> dict[str, object]:
    """Dotted name -> type of every setting: {"arch": str, "optim.lr": float, ...}"""
    return {name: setting.kind for name, setting in _settings(cls).items()}


def required(cls: type) -> list[str]:
    """Names of the settings without a default."""
    return [name for name, setting in _settings(cls).items() if setting.default is None]


@functools.cache
def _names(cls: type) -> dict[str, str]:
    """Accepted spelling -> dotted name: {"optim.lr": "optim.lr", "lr": "optim.lr", ...}"""
    return {spelling: name for name in leaves(cls) for spelling in (name, _leaf(name))}


def _leaf(name: str) -> str:
    """The flat name: `optim.lr` -> `lr`."""
    return name.rpartition(".")[2]


def flat(config: object) -> dict[str, Value]:
    """{"arch": "xcit_nano_12_p8", "optim.lr": 0.0005, ...}"""
    return {name: operator.attrgetter(name)(config) for name in leaves(type(config))}


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
    hints, tree = typing.get_type_hints(cls), nested(values)
    return cls(**{k: hints[k](**v) if isinstance(v, dict) else v for k, v in tree.items()})


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
    hint = f"; nearest: {nearest}" if nearest else ""
    raise UserError(f"{where}: unknown key {spelling}{hint}")


# Types


def _convert(kind: object, given: object, where: str = "") -> Value:
    """`given`, a word of the command line or what YAML made of it, as a value of type `kind`.

    A misfit raises UserError that begins with `where`; without it ArgumentTypeError, to which
    argparse adds the option.
    """
    try:
        return _converted(kind, given)
    except ValueError:
        close = difflib.get_close_matches(str(given), map(str, typing.get_args(kind)), n=1)
        nearest = f"; nearest: {close[0]}" if close else ""
        message = f"expected {_describe(kind)}, got {as_text(given)}{nearest}"
        error = UserError(f"{where}: {message}") if where else argparse.ArgumentTypeError(message)
        raise error from None


def _converted(kind: object, given: object) -> Value:
    """`_convert` without its message: ValueError for a misfit."""
    arguments, is_text = typing.get_args(kind), isinstance(given, str)
    if typing.get_origin(kind) is tuple and isinstance(given, str | list):
        # 0.4 1.0 as in DINO, or [0.4,1.0]
        items = re.sub(r"[\[\](),]", " ", given).split() if is_text else given
        kinds = arguments[:1] * len(items) if Ellipsis in arguments else arguments
        return tuple(_converted(*pair) for pair in zip(kinds, items, strict=True))
    if typing.get_origin(kind) is Literal and given in arguments:
        return given
    if kind is bool and is_text:
        given = BOOLEANS.get(given.lower())
    if kind in (int, float) and (is_text or type(given) is int):
        return kind(given)
    if type(given) is kind:
        return given
    raise ValueError


def _describe(kind: object) -> str:
    """A type in words."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(arguments)
    if arguments:
        count = "" if Ellipsis in arguments else f"{len(arguments)} "
        words = {int: "integers", float: "numbers", str: "words"}
        return count + words.get(arguments[0], f"any of {', '.join(typing.get_args(arguments[0]))}")
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

    The last of a repeated flag counts. Raises UserError.
    """
    argv = list(argv)
    words = list(itertools.takewhile(lambda token: token[:1] != "-", argv))
    places = getattr(cls, "POSITIONAL", ())  # settings that may stand first, without their names
    for position, place in reversed(list(enumerate(places[: len(words)]))):
        argv.insert(position, f"--{place}")
    tokens = [re.sub("^--[^=]+", lambda n: "--" + n[0][2:].replace("-", "_"), t) for t in argv]
    try:
        found, strange = build_parser(cls).parse_known_args(tokens)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name.partition('/')[0]}: {error.message}") from None
    if strange:
        option = argv[tokens.index(strange[0])]
        if not option.startswith("--") or option == "--":
            raise UserError(f"unexpected argument {option!r}; options are --name value")
        _resolve(cls, option[2:].partition("=")[0], "--")
    values = vars(found)
    paths, wants_help = values.pop("config", []), values.pop("help", False)
    for name, value in values.items():
        if value in (None, []):
            raise UserError(f"--{name} needs a value: {_describe(leaves(cls)[name])}")
        if isinstance(value, list):
            kind, given = leaves(cls)[name], " ".join(value)
            if name in places:  # paths: any character may be in them
                given = value
            elif typing.get_args(kind)[0] is str:  # names and assignments may have spaces in them
                given = ",".join(value).split(",")
            values[name] = _convert(kind, given, f"--{name}")
    return values, paths, wants_help


def build_parser(cls: type, values: Iterable[tuple[str, Value]] = ()) -> argparse.ArgumentParser:
    """The parser of `cls`: an argument for every setting, a group for every section.

    --help shows `values`, pairs of a dotted name and a value, instead of those settings' defaults.
    """
    shown = {name: setting.default for name, setting in _settings(cls).items()} | dict(values)
    usage = "".join(f"--{name} {name.upper()} " for name in required(cls))
    dotted = next((name for name in leaves(cls) if "." in name), None)
    flat_names = (
        f"Every --section.name is also --name: --{dotted} is --{_leaf(dotted)}. " if dotted else ""
    )
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        usage=f"%(prog)s {usage}[--config FILE] [--OPTION VALUE ...]",
        description=inspect.getdoc(cls),
        epilog=f"{flat_names}Names may be written with - or _. Booleans take true or false; alone "
        "they mean true. Flags win over --config, which wins over the recipe in configs/, which "
        "wins over the built-in defaults.",
        formatter_class=_HelpFormatter,
        argument_default=argparse.SUPPRESS,
        exit_on_error=False,
        allow_abbrev=False,
        add_help=False,
    )
    parser._negative_number_matcher = re.compile(r"-[.\d]")  # argparse's does not know -1e-3
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    groups = {"main": parser.add_argument_group("main")}
    groups["main"].add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        action="append",
        help="Settings from a file: YAML, a run's config.yaml, or a DINO args.txt.",
    )
    for name, (kind, _, text, section) in _settings(cls).items():
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        value = "required" if shown[name] is None else f"default: {as_text(shown[name])}"
        groups[section].add_argument(
            *dict.fromkeys((f"--{name}", f"--{_leaf(name)}")),
            dest=name,
            nargs="*" if typing.get_origin(kind) is tuple else "?",
            const="true" if kind is bool else None,
            type=None if typing.get_origin(kind) is tuple else functools.partial(_convert, kind),
            choices=typing.get_args(kind) if typing.get_origin(kind) is Literal else None,
            metavar=_metavar(kind),
            help=f"{text} [{value}]".replace("%", "%%"),
        )
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Shows one name of each option: what the other one is, the epilog says."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {action.metavar}"


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


# Files


class _Loader(yaml.SafeLoader):
    """Plain YAML whose keys must be unique. 5e-4 is text to it, but a number to `_convert`."""

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
    text, values = _read_text(path), {}
    is_dino = path.suffix == ".txt"
    pairs = _read_dino_args(text, path) if is_dino else _open_sections(cls, _tree(text, path))
    for spelling, value in pairs:
        if spelling in REMOVED:
            continue
        name = _resolve(cls, spelling, str(path))
        if name in values:
            raise UserError(f"{path}: {name} is given twice (again as {spelling})")
        values[name] = _convert(leaves(cls)[name], value, f"{path}: {name}")
    return values


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


def _read_dino_args(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """(name, value) of the "key: value" lines of a DINO args.txt.

    patch_size counts only for an arch without _p16 or _p8 in its name, as in DINO. What is ignored
    or translated is printed as one line.
    """
    given: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        key, colon, value = line.partition(":")
        if line.strip() and not colon:
            raise UserError(f"{path}, line {number}: expected 'key: value', got {line.strip()}")
        if line.strip():
            given[key.strip()] = value.strip()
    ignored = ", ".join(key for key in given if key in IGNORED_DINO_KEYS)
    kept = {key: value for key, value in given.items() if key not in IGNORED_DINO_KEYS}
    translated = ""
    if "use_fp16" in kept:
        kept["precision"] = "auto" if kept.pop("use_fp16") == "True" else "fp32"
        translated = f"; use_fp16 {given['use_fp16']} becomes precision {kept['precision']}"
    if "arch" in kept and "patch_size" in given and not re.search(r"_p\d+$", kept["arch"]):
        kept["arch"] += f"_p{given['patch_size']}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: ignored {ignored or 'nothing'}{translated}")
    yield from kept.items()
