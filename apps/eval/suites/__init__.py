"""The registry of suites: one file each, found by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from apps.eval.suites.callgraph import CALLGRAPH
from apps.eval.suites.completion import COMPLETION
from apps.eval.suites.loss_by_position import LOSS_BY_POSITION
from apps.eval.suites.needle import NEEDLE
from apps.eval.suites.scope import SCOPE
from apps.eval.suites.suite import Suite

SUITES: Mapping[str, Suite] = MappingProxyType(
    {suite.name: suite for suite in (LOSS_BY_POSITION, NEEDLE, SCOPE, CALLGRAPH, COMPLETION)}
)
