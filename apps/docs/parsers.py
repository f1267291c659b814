"""The argument parser of every `fathom` command, this one's included.

Not for what they mean (their own modules) nor for how they are shown (commands.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

import apps.doctor.__main__
import apps.eval.__main__
import apps.eval.bench.__main__
import apps.eval.generate
import apps.eval.report.__main__
import apps.eval.serve.__main__
import apps.train.arguments
import apps.train.checkpoint.__main__
import apps.train.data.__main__
import apps.watch.__main__
from apps.eval.report.pages_command import PAGES
from libs.flags import cli, fleet_cli


def build_parser() -> argparse.ArgumentParser:
    """The options of `fathom docs`."""
    parser = argparse.ArgumentParser(
        "fathom docs", description="Renew the parts of the documents that are made from the code.", allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say which files are stale")
    return parser


PARSERS: Mapping[str, tuple[Callable[[], argparse.ArgumentParser], ...]] = {
    "data": (apps.train.data.__main__.build_parser,),
    "train": (apps.train.arguments.build_parser,),
    "checkpoint": (apps.train.checkpoint.__main__.build_parser,),
    "eval": (apps.eval.__main__.build_parser,),
    "serve": (apps.eval.serve.__main__.build_parser,),
    "generate": (apps.eval.generate.build_parser,),
    "report": (
        apps.eval.report.__main__.build_parser,
        apps.eval.report.__main__.compare_parser,
        apps.eval.report.__main__.site_parser,
        *(page.build_parser for page in PAGES.values()),
    ),
    "bench": (apps.eval.bench.__main__.build_parser,),
    "flags": (cli.flags_parser,),
    "runs": (fleet_cli.build_parser,),
    "watch": (apps.watch.__main__.build_parser,),
    "doctor": (apps.doctor.__main__.build_parser,),
    "docs": (build_parser,),
    "log": (cli.log_parser,),
}
