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
from apps.train.session import Identity, has_gone_back, is_run, new_identity, run_of_job, saved_run
from libs.flags.environment import Launch, fathom_variables
from libs.flags.errors import UserError, nearest

DEFAULT_RECIPE = "cpu_demo"
# What an interrupted run may be told anew: nothing that changes a weight, a loss or the order of data, but for the
# layout, which is equal up to rounding. Data may have been moved: their fingerprint is compared.
RESUMABLE = (
    "checkpoint.", "log.", "data.dir", "train.stop_after", "train.device_memory", "train.device_name",
    "xla.strict_compile", "parallel.dp", "parallel.cp", "parallel.tp", "parallel.sequence_parallel",
    "parallel.shard_optimizer", "parallel.engine", "parallel.timeout_s",
)  # fmt: skip


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
    aot: str | None
    aot_quick: bool
    settings: tuple[str, ...]

    @property
    def named_recipe(self) -> str:
        """The recipe of a new run, the default one where none was given; an empty name is no recipe."""
        return DEFAULT_RECIPE if self.recipe is None else self.recipe


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """Split options from settings.

    Raises:
        UserError: options that exclude each other, or a misspelt one. SystemExit: --help, or argparse itself.
    """
    parser = build_parser()
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
        aot=found.aot,
        aot_quick=found.aot_quick,
        settings=(*rest, *(("--xla.strict_compile", "true") if found.strict_compile else ())),
    )


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom train`; settings are the words they leave over."""
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
        "--aot", metavar="SLICE", help="compile the step for a TPU slice (v6e-4); 2 when it does not fit"
    )
    parser.add_argument("--aot-quick", action="store_true", help="with --aot: least effort; memory only")
    parser.add_argument("--strict-compile", action="store_true", help="stop when XLA compiles after warm-up")
    parser.add_argument(
        "--accept-gate-change",
        action="append",
        default=[],
        metavar="GATE",
        help="with --resume: go on although this gate differs; recorded; repeatable",
    )
    return parser


def resolve_settings(arguments: Arguments) -> Resolved:
    """The settings alone; nothing is looked up that only one of several ranks may decide.

    Raises:
        UserError: a bad setting, or one that a resumed run may not change.
    """
    return _resolve(arguments)[1]


def resolve_arguments(arguments: Arguments, this: Launch | None = None) -> tuple[Identity, Resolved]:
    """Which run this is, and its settings.

    Raises:
        UserError: a bad setting, or one that a resumed run may not change.
    """
    identity, resolved = _resolve(arguments)
    if identity is None:
        identity = new_identity(resolved.config, arguments.named_recipe, arguments.run_dir, this)
    return identity, resolved


def after_restart(arguments: Arguments, this: Launch) -> Arguments:
    """What the same command line means when torchrun starts it again: go on with the run that it began.

    A run is found by --run-dir, or by the name that `new_identity` gives every attempt of one torchrun job.

    Raises:
        UserError: torchrun may restart processes on several machines, and nothing tells all of them which run it was.
    """
    if this.several_machines and this.max_restarts and arguments.run_dir is None and arguments.resume is None:
        raise UserError(
            f"torchrun may restart this job {this.max_restarts} times on several machines, which know a run without a "
            "name each on its own: give one with --run-dir DIR (or --resume RUN), in a file system they share"
        )
    if this.attempt == 0:
        return arguments
    if arguments.resume is not None:
        # The first attempt has gone back to that step already, or died before it had touched anything.
        step = arguments.from_step
        went_back = step is not None and has_gone_back(Path(arguments.resume), step, this.attempt)
        return arguments._replace(from_step=None) if went_back else arguments
    if arguments.run_dir is not None:
        found: Path | None = Path(arguments.run_dir)
    else:
        runs_dir = resolve_settings(arguments).config.log.runs_dir
        found = run_of_job(runs_dir, arguments.named_recipe, this)
    if found is None:
        return arguments
    if not is_run(found):
        return arguments._replace(run_dir=str(found))
    return arguments._replace(resume=str(found), recipe=None, run_dir=None)


def _resolve(arguments: Arguments) -> tuple[Identity | None, Resolved]:
    over: list[Layer] = [file_layer(Path(path)) for path in arguments.config]
    over += [environment_layer(fathom_variables()), command_line_layer(arguments.settings)]
    if arguments.resume is None:
        return None, resolve_config([recipe_layer(arguments.named_recipe), *over])
    identity, saved = saved_run(arguments.resume)
    resolved = resolve_config([saved_layer(saved.config.to_json(), saved.origins), *over])
    _refuse_changes(saved, resolved)
    return identity, resolved


def _may_change(key: str, before: object, now: object) -> bool:
    # FP8 or not is a gate's value, and accepted by name; from one recipe to another no gate would notice.
    return key.startswith(RESUMABLE) or (key == "parallel.fp8_recipe" and None in (before, now))


def _refuse_changes(saved: Resolved, resolved: Resolved) -> None:
    before, now = flat_values(saved.config), flat_values(resolved.config)
    changed = [key for key in now if now[key] != before.get(key) and not _may_change(key, before.get(key), now[key])]
    if changed:
        allowed = ", ".join(name + ("*" if name.endswith(".") else "") for name in RESUMABLE)
        lines = [f"  {key}: {before.get(key)!r} in the run, {now[key]!r} ({resolved.origins[key]})" for key in changed]
        raise UserError(
            "a resumed run goes on as it began, bit for bit; these would make it another run:\n"
            + "\n".join(lines)
            + f"\nallowed to change: {allowed}"
        )
