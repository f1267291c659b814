"""`fathom train`: from the command line to an exit status.

Not for any of the work: arguments.py, session.py, start.py and loop.py do it, in this order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from apps.train.signals import Interrupted, SignalGuard
from libs.flags.errors import ExitStatus, run_entry


def main(argv: Sequence[str] | None = None) -> int:
    """Train, resume, plan (--dry-run) or show settings (--show-config).

    Raises:
        UserError: unusable input. GateRefused: a gate that cannot be honoured.
    """
    guard = SignalGuard()
    guard.install()  # before the slow imports: a signal during them is answered too
    try:
        return int(_main(argv, guard))
    except Interrupted as error:
        print(f"stopped by {error} during start-up: nothing to save yet", file=sys.stderr)
        return ExitStatus.REQUEUE


def _main(argv: Sequence[str] | None, guard: SignalGuard) -> ExitStatus:
    from apps.train.arguments import parse_arguments, resolve_arguments
    from apps.train.dry_run import dry_run
    from apps.train.origins import describe

    arguments = parse_arguments(argv)
    if arguments.show_config or arguments.dry_run or arguments.aot is not None:
        resolved = resolve_arguments(arguments)[1]
        if arguments.aot is not None:
            from apps.train.aot import aot

            command = ["fathom", "train", *(sys.argv[1:] if argv is None else argv)]
            slice_name, recipe = arguments.aot, arguments.named_recipe
            return aot(resolved.config, recipe, slice_name, command=command, quick=arguments.aot_quick)
        if arguments.dry_run:
            return dry_run(resolved.config)
        print(describe(resolved))
        return ExitStatus.OK
    from apps.train.attempt import run_attempt

    return run_attempt(arguments, guard)


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
