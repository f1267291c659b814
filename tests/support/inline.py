"""In place of `own_process` of the benchmarks: the same call in this process, which starts no other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from libs.flags.facts import Facts
from libs.flags.installed import install
from libs.flags.resolve import resolve


class Inline:
    """A pool whose worker is the caller, with the gates installed."""

    def __init__(self, gates: Mapping[str, str], facts: Facts, threads: int) -> None:
        install(resolve(gates, facts))
        self._found: Any = None

    def __enter__(self) -> Inline:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function: Callable[..., Any], *args: object) -> Inline:
        self._found = function(*args)
        return self

    def result(self) -> Any:
        return self._found
