"""Gates, run log, audit chain, environment: what a run was asked to do, and a record of it.

Imports no torch; the only reader of the process environment. See README.md.
"""

from __future__ import annotations

from libs.flags.audit import AuditLog
from libs.flags.audit_record import Anchor, audit_path
from libs.flags.catalog import CATALOG
from libs.flags.compare import GateChange, agreement, compare_for_resume
from libs.flags.environment import CONFIG_PREFIX, Launch, fathom_variables, launch
from libs.flags.errors import ExitStatus, GateRefused, Refusal, RunRefused, UserError, nearest, run_entry
from libs.flags.facts import Facts
from libs.flags.gateset import GateSet, Resolution
from libs.flags.installed import (
    GatesNotInstalled,
    exposed,
    includes,
    install,
    installed_gates,
    is_enabled,
    record_changes,
    record_refusals,
    refuse_if_gated,
    scaffold_status,
    value_of,
)
from libs.flags.registry import GateSpec, GateValue, Outcome, Stage
from libs.flags.resolve import resolve
from libs.flags.runlog import RunLog, log_path, next_attempt, read_events
from libs.flags.verify import VerifyResult, verify_chain

__all__ = [
    "CATALOG",
    "CONFIG_PREFIX",
    "Anchor",
    "AuditLog",
    "ExitStatus",
    "Facts",
    "GateChange",
    "GateRefused",
    "GateSet",
    "GateSpec",
    "GateValue",
    "GatesNotInstalled",
    "Launch",
    "Outcome",
    "Refusal",
    "Resolution",
    "RunLog",
    "RunRefused",
    "Stage",
    "UserError",
    "VerifyResult",
    "agreement",
    "audit_path",
    "compare_for_resume",
    "exposed",
    "fathom_variables",
    "includes",
    "install",
    "installed_gates",
    "is_enabled",
    "launch",
    "log_path",
    "nearest",
    "next_attempt",
    "read_events",
    "record_changes",
    "record_refusals",
    "refuse_if_gated",
    "resolve",
    "run_entry",
    "scaffold_status",
    "value_of",
    "verify_chain",
]
