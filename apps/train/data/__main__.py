"""`fathom data build` and `fathom data inspect`: the command line of the data pipeline.

Arguments only; the work is in `build` and `inspect`.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from apps.train.data.interrupt import held_back
from apps.train.data.options import INSTALLED, BuildOptions, Mix, validated
from libs.flags.errors import run_entry

_INTERRUPTED = 128 + signal.SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    arguments = build_parser().parse_args(argv)
    return _build(arguments) if arguments.command == "build" else _inspect(arguments)


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom data build` and `fathom data inspect`."""
    defaults = BuildOptions()
    parser = argparse.ArgumentParser(prog="fathom data", description="C++ source to training documents.")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="build a data directory", allow_abbrev=False)
    make.add_argument("--source", default=INSTALLED, metavar="DIR|installed", help="default: %(default)s")
    make.add_argument("--out", required=True, type=Path, metavar="DIR")
    make.add_argument("--force", action="store_true", help="replace another build in --out")
    make.add_argument("--quiet", action="store_true", help="no progress, no summary")
    make.add_argument("--workers", type=int, default=2, help="processes that parse; default: %(default)s")
    make.add_argument(
        "--window", type=int, default=1024, help="refuse when a split has fewer tokens; default: %(default)s"
    )
    make.add_argument("--mix", metavar="file=F,callgraph=C,unit=U", help=f"default: {_shown(defaults.mix)}")
    make.add_argument("--valid-packages", metavar="A,B", help="hold out these; default: chosen by --valid-share")
    for name, text in _OPTIONS.items():
        default = getattr(defaults, name)
        make.add_argument(f"--{name.replace('_', '-')}", default=default, help=f"{text}; default: {default}")
    show = commands.add_parser("inspect", help="show what is in a data directory", allow_abbrev=False)
    show.add_argument("directory", type=Path, help="of `fathom data build`")
    show.add_argument("--json", action="store_true", help="print JSON")
    show.add_argument("--split", choices=("train", "valid"), default="train", help="of the example")
    show.add_argument(
        "--example",
        nargs="?",
        type=int,
        const=-1,
        metavar="N",
        help="show document N (default: a telling one)",
    )
    return parser


_OPTIONS = {
    "tokenizer": "bpe:SIZE, bytes, or the path of a tokenizer.json",
    "layout": "auto, repositories (each sub-directory is one) or repository",
    "max_bytes": "source text to use at most, shared fairly by the packages",
    "max_file_bytes": "larger files are left out",
    "max_line_bytes": "files with a longer line are left out",
    "document_tokens": "longest document",
    "duplicate_threshold": "Jaccard similarity from which a file is a near-duplicate",
    "valid_share": "share of the text to hold out",
    "tokenizer_bytes": "training text shown to the BPE trainer",
    "seed": "of every seeded choice",
}


def _shown(mix: Mix) -> str:
    return ",".join(f"{name}={value:g}" for name, value in mix.model_dump().items())


def _options(arguments: argparse.Namespace) -> BuildOptions:
    values = {"source": arguments.source, **{name: getattr(arguments, name) for name in _OPTIONS}}
    if arguments.mix is not None:
        values["mix"] = Mix.parse(arguments.mix)
    if arguments.valid_packages is not None:
        values["valid_packages"] = tuple(arguments.valid_packages.split(","))
    return validated(BuildOptions, values, "fathom data build")


def _build(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        # Inside, because these imports take seconds in which a signal may come.
        with held_back():
            from apps.train.data.build import build
            from apps.train.data.summary import print_built

        built = build(
            options,
            arguments.out,
            window=arguments.window,
            workers=arguments.workers,
            force=arguments.force,
            quiet=arguments.quiet,
        )
    except KeyboardInterrupt as interrupt:
        print(f"interrupted: {str(interrupt) or f'{arguments.out} is as it was'}", file=sys.stderr)
        return _INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
    if built.up_to_date:
        print(f"{arguments.out}: up to date")
    elif not arguments.quiet:
        print_built(arguments.out, built.manifest)
    return 0


def _terminated(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM as Ctrl-C, so that what was written aside is removed."""
    raise KeyboardInterrupt


def _inspect(arguments: argparse.Namespace) -> int:
    from apps.train.data.inspect import inspect

    inspect(arguments.directory, split=arguments.split, example=arguments.example, as_json=arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry(main))
