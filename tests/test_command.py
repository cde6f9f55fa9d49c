"""The one command: what it lists, what it calls, and what it says of a word it does not know."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
from conftest import heed_interrupts

from ssl_xcit.__main__ import COMMANDS, GROUPS, Command, main, overview


def test_help_lists_every_command_in_the_order_of_work(capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert printed == overview() + "\n"
    places = [printed.index(f"\n  {name} ") for group in GROUPS.values() for name in group]
    assert places == sorted(places)
    for command in COMMANDS.values():
        assert printed.count(f" {command.help}\n") == 1
    main([])
    assert capsys.readouterr().out == printed


def test_help_is_quick_and_imports_nothing_that_takes_time():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", "-m", "ssl_xcit", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout == overview() + "\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "numpy", "yaml", "submitit"}
    # Processor time, so that a busy machine does not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_its_own_help(name, capsys, monkeypatch):
    with pytest.raises(SystemExit) as left:
        main([*name.split(), "--help"])
    assert left.value.code in (0, None)
    assert capsys.readouterr().out.startswith(f"usage: ssl-xcit {name}")


def test_what_a_command_names_exists():
    for command in COMMANDS.values():
        assert callable(resolve_name(f"ssl_xcit.{command.function}"))


def test_a_command_gets_the_words_after_its_name(monkeypatch):
    calls = []
    monkeypatch.setattr("ssl_xcit.report.runs.main", calls.append)
    monkeypatch.setattr("ssl_xcit.data.command.main", calls.append)
    monkeypatch.setattr(sys, "argv", ["ssl-xcit", "runs", "folder"])
    main()
    main(["data", "info", "a.beton"])
    assert calls == [["folder"], ["info", "a.beton"]]
    assert sys.argv == ["ssl-xcit data info", "a.beton"]
    assert Command("", "report.runs:main", ("x",))(["y"]) is None
    assert calls[2] == ["x", "y"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lineer"], "no command 'lineer': see ssl-xcit --help; nearest: linear"),
        (["data"], "no command 'data': see ssl-xcit --help; nearest: data"),
        (["--version"], "no command '--version': see ssl-xcit --help"),
        (["checkpoint", "convrt"], "nearest: checkpoint convert"),
    ],
)
def test_an_unknown_command_is_one_line_that_names_the_nearest(words, message, capsys):
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


# Completion


def completed(line: str, folder: Path) -> list[str]:
    """What bash offers for the last word of `line`, by the printed script.

    Programs are looked for in `folder` alone, but for those of the system.
    """
    words = line.split(" ")
    ask = f"""
        source <("{sys.executable}" -m ssl_xcit completion bash)
        COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
        complete -p ssl-xcit >/dev/null && _ssl_xcit; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", ask], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ssl-xcit ", list(dict.fromkeys(name.split()[0] for name in COMMANDS))),
        ("ssl-xcit re", ["report", "replay"]),
        ("ssl-xcit data ", ["write", "info", "verify", "preview"]),
        ("ssl-xcit checkpoint c", ["convert"]),
        ("ssl-xcit knn ", []),  # then bash offers files
        ("ssl-xcit data write s", []),
    ],
)
def test_bash_completes_commands_without_starting_python(tmp_path, line, offered):
    (tmp_path / "ssl-xcit").write_text("#!/bin/sh\necho started >&2\n")
    (tmp_path / "ssl-xcit").chmod(0o755)
    assert completed(line, tmp_path) == offered


def test_bash_completes_the_options_of_a_command(tmp_path):
    program = f'#!/bin/sh\nexec "{sys.executable}" -m ssl_xcit "$@"\n'
    (tmp_path / "ssl-xcit").write_text(program)
    (tmp_path / "ssl-xcit").chmod(0o755)
    assert completed("ssl-xcit knn --temp", tmp_path) == ["--temperature"]
    assert completed("ssl-xcit data write images out.beton --sho", tmp_path) == ["--short-side"]
    found = completed("ssl-xcit submit --arch xcit_nano_12_p8 --optim.", tmp_path)
    assert {"--optim.lr", "--optim.epochs"} <= set(found)


def test_completion_of_another_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        main(["completion", "fish"])
    assert left.value.code == 2
    assert "invalid choice: 'fish' (choose from" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_takes_the_script(tmp_path):
    ask = f"""
        source <("{sys.executable}" -m ssl_xcit completion zsh)
        echo $_comps[ssl-xcit]
        emulate ksh  # as zsh does around such a function
        COMP_WORDS=(ssl-xcit data ""); COMP_CWORD=2; _ssl_xcit; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["zsh", "-fec", ask],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    registered, offered = done.stdout.splitlines()
    assert "_ssl_xcit" in registered
    assert offered.split() == ["write", "info", "verify", "preview"]


# Python imports this when it starts. It interrupts the process at the import of a module.
INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    "module",
    ["ssl_xcit.runtime.options", "yaml", "torch", "numpy._core.multiarray", "ssl_xcit.dino"],
)
def test_an_interrupt_while_a_command_starts_ends_it_without_a_traceback(tmp_path, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-m", "ssl_xcit", "plan", "--arch", "xcit_nano_12_p16"],
        env=os.environ | {"PYTHONPATH": paths, "INTERRUPTED_AT": module},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=heed_interrupts,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
