"""The command line of `fathom train`: a few options, and every setting as --section.key VALUE.

Not for what settings mean (config.py) nor for how layers are laid over each other (origins.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from apps.train.origins import (
    Layer,
    Resolved,
    command_line_layer,
    environment_layer,
    file_layer,
    flat_values,
    recipe_layer,
    recipe_names,
    resolve_config,
    saved_layer,
)
from apps.train.session import Identity, new_identity, saved_run
from libs.flags.environment import fathom_variables
from libs.flags.errors import UserError, nearest

DEFAULT_RECIPE = "cpu_demo"
# What an interrupted run may be told anew: nothing that changes a weight, a loss or the order of data.
RESUMABLE = ("checkpoint.", "log.", "train.stop_after", "train.device_memory", "train.device_name")


class Arguments(NamedTuple):
    """The options, and the words left over, which are settings."""

    recipe: str | None
    config: tuple[str, ...]
    run_dir: str | None
    resume: str | None
    from_step: int | None
    show_config: bool
    dry_run: bool
    accept_gate_change: frozenset[str]
    settings: tuple[str, ...]


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """Split options from settings.

    Raises:
        UserError: options that exclude each other, or a misspelt one. SystemExit: --help, or argparse itself.
    """
    parser = _parser()
    found, rest = parser.parse_known_args(argv)
    options = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        name = word.partition("=")[0]
        if name.startswith("--") and "." not in name:
            close = nearest(name, options)
            hint = f"; did you mean {close}?" if close else "; a setting is given as --section.key VALUE"
            raise UserError(f"unknown option {name}{hint}")
    if found.resume is None and found.from_step is not None:
        raise UserError("--from-step needs --resume RUN")
    if found.resume is None and found.accept_gate_change:
        raise UserError("--accept-gate-change needs --resume RUN: a new run has no gates to differ from")
    for option, value in (("--recipe", found.recipe), ("--run-dir", found.run_dir)):
        if found.resume is not None and value is not None:
            raise UserError(f"{option} {value} cannot go with --resume: the run has its own")
    return Arguments(
        recipe=found.recipe,
        config=tuple(found.config),
        run_dir=found.run_dir,
        resume=found.resume,
        from_step=found.from_step,
        show_config=found.show_config,
        dry_run=found.dry_run,
        accept_gate_change=frozenset(found.accept_gate_change),
        settings=tuple(rest),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fathom train",
        description="Train a model. Later ones win: preset, recipe, --config files, "
        "FATHOM_TRAIN__SECTION__KEY, --section.key VALUE. See --show-config for every setting.",
        allow_abbrev=False,
    )
    names = ", ".join(recipe_names())
    parser.add_argument("--recipe", help=f"a recipe ({names}) or a .toml file; default {DEFAULT_RECIPE}")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="settings in TOML; repeatable")
    parser.add_argument("--run-dir", metavar="DIR", help="default: log.runs_dir/<time>-<recipe>-<random>")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run from its newest committed checkpoint")
    parser.add_argument("--from-step", type=int, metavar="N", help="with --resume: from the checkpoint of step N")
    parser.add_argument("--show-config", action="store_true", help="print every setting and where it came from")
    parser.add_argument("--dry-run", action="store_true", help="print what it needs; 2 when it does not fit")
    parser.add_argument(
        "--accept-gate-change",
        action="append",
        default=[],
        metavar="GATE",
        help="with --resume: go on although this gate differs; recorded; repeatable",
    )
    return parser


def resolve_arguments(arguments: Arguments) -> tuple[Identity, Resolved]:
    """Which run this is, and its settings.

    Raises:
        UserError: a bad setting, or one that a resumed run may not change.
    """
    over: list[Layer] = [file_layer(Path(path)) for path in arguments.config]
    over += [environment_layer(fathom_variables()), command_line_layer(arguments.settings)]
    if arguments.resume is None:
        recipe = arguments.recipe or DEFAULT_RECIPE
        resolved = resolve_config([recipe_layer(recipe), *over])
        return new_identity(resolved.config, recipe, arguments.run_dir), resolved
    identity, saved = saved_run(arguments.resume)
    resolved = resolve_config([saved_layer(saved.config.to_json(), saved.origins), *over])
    _refuse_changes(saved, resolved)
    return identity, resolved


def _refuse_changes(saved: Resolved, resolved: Resolved) -> None:
    before, now = flat_values(saved.config), flat_values(resolved.config)
    changed = [key for key in now if now[key] != before.get(key) and not key.startswith(RESUMABLE)]
    if changed:
        allowed = ", ".join(name + ("*" if name.endswith(".") else "") for name in RESUMABLE)
        lines = [f"  {key}: {before.get(key)!r} in the run, {now[key]!r} ({resolved.origins[key]})" for key in changed]
        raise UserError(
            "a resumed run goes on as it began, bit for bit; these would make it another run:\n"
            + "\n".join(lines)
            + f"\nallowed to change: {allowed}"
        )
