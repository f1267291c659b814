"""The reference of the command line in docs/cli.md: every command, its options, its exit status."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from apps.cli import COMMANDS
from apps.docs.blocks import table
from apps.docs.parsers import PARSERS
from libs.flags.errors import ExitStatus

_REPEATED = {"?": "[{0}]", "*": "[{0} ...]", "+": "{0} [{0} ...]"}


def cli_reference(_root: Path) -> str:
    """Every command of `fathom`, in the order of its own help."""
    assert PARSERS.keys() == COMMANDS.keys(), f"no parser, or no command: {sorted(PARSERS.keys() ^ COMMANDS.keys())}"
    return "\n\n".join([_exits(), *(_command(name) for name in COMMANDS)])


def _exits() -> str:
    return table(("exit status", "meaning"), ((str(int(status)), status.meaning) for status in ExitStatus))


def _command(name: str) -> str:
    command = COMMANDS[name]
    sections = [section for build in PARSERS[name] for section in _sections(build())]
    own = "; ".join(f"{status} {meaning}" for status, meaning in command.exits.items())
    exits = f"Exit status as above; here: {own}." if own else "Exit status as above."
    return "\n\n".join([f"## fathom {name}", f"{command.summary[0].upper()}{command.summary[1:]}.", exits, *sections])


def _sections(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The parser's own arguments, or those of each of its subcommands."""
    nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not nested:
        yield _section(parser, parser.description or "")
    for action in nested:
        summaries = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, inner in action.choices.items():
            yield _section(inner, inner.description or summaries[name])


def _section(parser: argparse.ArgumentParser, about: str) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    rows = [(f"`{_name(action)}`", _meaning(parser, action)) for action in actions]
    sentence = about[:1].upper() + about[1:] + ("" if about.endswith(".") else ".")
    parts = [f"### {parser.prog}", sentence, f"    {_usage(parser.prog, actions)}"]
    return "\n\n".join([*parts, *([table(("argument", "meaning"), rows)] if rows else [])])


def _usage(program: str, actions: Sequence[argparse.Action]) -> str:
    """What must be there, in the order in which it is written; the table has the rest."""
    positional = [_REPEATED.get(str(a.nargs), "{0}").format(_name(a)) for a in actions if not a.option_strings]
    required = [_name(action) for action in actions if action.option_strings and action.required]
    rest = ["[OPTION ...]"] if any(action.option_strings and not action.required for action in actions) else []
    return " ".join([program, *positional, *required, *rest])


def _name(action: argparse.Action) -> str:
    """As one writes it: `--seed SEED`, `RUN`."""
    value = ""
    if action.nargs != 0:
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else None
        value = str(action.metavar or choices or action.dest.upper())
    return " ".join(part for part in (", ".join(action.option_strings), value) if part)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Its help, with what argparse alone knows: whether it must be there, and a default that the help does not tell."""
    said = (action.help or "") % {**vars(action), "prog": parser.prog}
    if action.required and action.option_strings:
        said = f"required; {said}" if said else "required"
    default = action.default
    none = default is None or default is False or default in ([], argparse.SUPPRESS)
    told = none or "default" in said or str(default) in said
    return (said if told else f"{said} (default: {default})".strip()).replace("<", "&lt;")
