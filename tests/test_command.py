"""The one command: what it lists, what it calls, and what it says of a word it does not know."""

import resource
import subprocess
import sys

import pytest

from ssl_xcit.__main__ import COMMANDS, GROUPS, Command, main, overview
from ssl_xcit.runtime.references import resolve


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
        assert callable(resolve(f"ssl_xcit.{command.function}"))


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
