"""The one command: `ssl-xcit COMMAND ...`, also as `python -m ssl_xcit COMMAND ...`."""

import difflib
import sys
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import NamedTuple

from ssl_xcit.runtime.errors import UserError, exit_on_user_error, starting


class Command(NamedTuple):
    """What a command is for, and what runs it: both are imported when it is called."""

    help: str
    function: str  # "module:function" below ssl_xcit
    words: tuple[str, ...] = ()  # stand before what the user has typed
    config: str = ""  # the class of the settings that the function takes; else it gets the words
    recipes: tuple[str, ...] = ()

    def __call__(self, words: Sequence[str]) -> None:
        """Run it with the words after its name."""
        function = f"ssl_xcit.{self.function}"
        if not self.config:
            with starting():
                run = resolve_name(function)
            run([*self.words, *words])
            return
        with starting():
            from ssl_xcit.runtime.config import run_command  # takes longer than all that is above

            config = resolve_name(f"ssl_xcit.{self.config}")
        run_command(config, function, self.recipes, words)


RECIPES = ("pretrain/{arch}.yaml",)
GROUPS = {
    "to begin with": {
        "doctor": Command("check this machine: what it has, what is missing", "doctor:main"),
        "demo": Command("all of it on Fashion-MNIST, in minutes", "demo:main"),
        "completion": Command("print a script that completes commands", "__main__:completion"),
    },
    "data": {
        "data write": Command("store images in one .beton file", "data.command:main", ("write",)),
        "data info": Command("print what a .beton file holds", "data.command:main", ("info",)),
        "data verify": Command("check every image of a file", "data.command:main", ("verify",)),
        "data preview": Command("draw images and the views of a training", "report.preview:main"),
    },
    "training": {
        "plan": Command(
            "memory, time and cost of a pretraining",
            "dino.plan:print_plan",
            config="dino.config:PlanConfig",
            recipes=RECIPES,
        ),
        "pretrain": Command(
            "pretrain an XCiT with DINO",
            "dino.train:train",
            config="dino.config:TrainConfig",
            recipes=RECIPES,
        ),
        "finetune": Command(
            "train all weights on labelled images",
            "finetune.train:finetune",
            config="finetune.config:FinetuneConfig",
        ),
        "submit": Command("submit any of these to SLURM", "slurm.command:main"),
    },
    "a run": {
        "runs": Command("list the runs in a folder", "report.runs:main"),
        "verdict": Command("say whether a pretraining works", "report.runs:verdict_main"),
        "report": Command("write a run as one HTML page", "report.gather:main"),
        "replay": Command("find where the numbers broke", "report.replay:main"),
    },
    "evaluation": {
        "knn": Command(
            "k-NN accuracy of frozen features",
            "evaluation.knn:evaluate_knn",
            config="evaluation.config:KnnConfig",
        ),
        "linear": Command(
            "linear probe of frozen features",
            "evaluation.linear:evaluate_linear",
            config="evaluation.config:LinearConfig",
        ),
        "supervised": Command(
            "accuracy of supervised models",
            "evaluation.supervised:evaluate_supervised",
            config="evaluation.config:SupervisedConfig",
        ),
        "visualize": Command(
            "draw what a network looks at",
            "report.visualize:visualize",
            config="report.config:VisualizeConfig",
        ),
    },
    "weights": {
        "checkpoint info": Command(
            "print what a checkpoint holds", "checkpoints.convert:main", ("info",)
        ),
        "checkpoint convert": Command(
            "write weights in another format", "checkpoints.convert:main", ("convert",)
        ),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


# The script knows the names of commands. Only an option, a word that begins with -, starts Python.
COMPLETION = """\
_ssl_xcit() {
    local word="${COMP_WORDS[COMP_CWORD]}" words="" part command=()
    case "${COMP_WORDS[*]:1:$((COMP_CWORD - 1))}" in
@CASES@
    esac
    if [[ "$word" == -* ]]; then
        for part in "${COMP_WORDS[@]:1}"; do
            [[ "$part" == -* ]] && break
            command+=("$part")
        done
        words=$(ssl-xcit "${command[@]}" --help 2>/dev/null)
        words=$(grep -o -- '--[A-Za-z][A-Za-z0-9_.-]*' <<<"$words" | sort -u)
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _ssl_xcit ssl-xcit"""
ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"  # zsh plays bash


def overview() -> str:
    """All commands, in the order of work."""
    lines = ["usage: ssl-xcit COMMAND ...    (ssl-xcit COMMAND --help: its options)"]
    for title, group in GROUPS.items():
        lines += ["", title, *(f"  {name:<20}{command.help}" for name, command in group.items())]
    return "\n".join(lines)


def completion(words: Sequence[str]) -> None:
    """Print the script by which bash or zsh completes commands and options."""
    import argparse  # no other command's start waits for it

    parser = argparse.ArgumentParser(
        prog="ssl-xcit completion",
        description="Print a script that completes commands and options. Your ~/.bashrc loads it "
        "by the line: source <(ssl-xcit completion bash)",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    shell = parser.parse_args(words).shell
    following: dict[str, list[str]] = {}
    for first, _, second in (name.partition(" ") for name in COMMANDS):
        if first not in following.setdefault("", []):
            following[""].append(first)
        if second:
            following.setdefault(first, []).append(second)
    cases = (f'        "{typed}") words="{" ".join(n)}" ;;' for typed, n in following.items())
    print((ZSH if shell == "zsh" else "") + COMPLETION.replace("@CASES@", "\n".join(cases)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word or two name; exit status 2 if there is none."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return
    with exit_on_user_error():
        for count in (1, 2):
            name = " ".join(words[:count])
            if name in COMMANDS:
                sys.argv = [f"ssl-xcit {name}", *words[count:]]
                COMMANDS[name](words[count:])
                return
        near = difflib.get_close_matches(" ".join(words[:2]), COMMANDS, cutoff=0.3)
        raise UserError(
            f"no command {words[0]!r}: see ssl-xcit --help"
            + (f"; nearest: {', '.join(near)}" if near else "")
        )


if __name__ == "__main__":
    main()
