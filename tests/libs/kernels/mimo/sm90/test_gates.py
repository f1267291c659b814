"""Gates of the catalogue as gates of the kernels: the same words, read where they are in force, and recorded."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from libs.flags import installed
from libs.flags.audit import AuditLog
from libs.flags.audit_record import audit_path, read_audit
from libs.flags.catalog import CATALOG
from libs.flags.facts import Facts
from libs.flags.installed import GatesNotInstalled, GateState, install
from libs.flags.resolve import resolve
from libs.kernels.mimo.sm90.gates import GATES, KernelGates, pass_configs

HOPPER = Facts(
    device="cuda", compute_capability=(9, 0), multiprocessors=132, batch_heads=16, free_memory_bytes=10**12,
    packages={"tilelang": "0.1.15"}, mimo_backend="tilelang", psiv_bytes_per_layer=64 << 20, n_mamba_layers=24,
    psiv_stages=("python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse"),
    two_d_kernels=("fwd", "bwd_fwd", "bwd_bwd"), split_scan_kernels=True,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "_PROCESS", GateState())


def test_fields_and_words_are_those_of_the_catalogue() -> None:
    words = get_type_hints(KernelGates)
    assert [field.name for field in fields(KernelGates)] == list(GATES)
    for field, gate in GATES.items():
        assert set(get_args(words[field])) == set(CATALOG[gate].values)


def test_without_installed_gates_there_is_no_default() -> None:
    with pytest.raises(GatesNotInstalled):
        KernelGates.from_installed()


def test_what_is_installed_is_read_and_exposed_once(tmp_path: Path) -> None:
    environ = {"FATHOM_TMA": "all", "FATHOM_WARP_SPECIALIZATION": "fwd", "FATHOM_PSIV_CACHE": "gmem_pool"}
    audit = AuditLog.open(audit_path(tmp_path), "r", 0, 0)
    install(resolve(environ | {"FATHOM_SPLIT_SCAN": "auto"}, HOPPER), audit)
    for _ in range(2):
        gates = KernelGates.from_installed()
        assert gates == KernelGates("all", "fwd", "auto", "gmem_pool")
    assert (gates.mode("fwd"), gates.mode("bwd")) == ("ws", "tma")
    exposed = [(r["gate"], r["value"]) for r in read_audit(audit_path(tmp_path)) if r["event"] == "exposed"]
    assert exposed == [
        ("tma", "all"), ("warp_specialization", "fwd"), ("split_scan", "auto"), ("psiv_cache", "gmem_pool"),
    ]  # fmt: skip


def test_off_everywhere_is_the_plain_mode() -> None:
    install(resolve({}, Facts()))
    assert KernelGates.from_installed() == KernelGates()
    assert KernelGates().mode("fwd") == "plain"
    assert pass_configs("plain") == {"tl.disable_warp_specialized": True, "tl.disable_tma_lower": True}


def test_no_resolved_set_of_gates_is_refused_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the catalogue lets through, the kernels take: the rules of dependence are the same."""
    taken = 0
    for tma in ("off", "fwd", "all"):
        for specialization in ("off", "fwd", "all"):
            monkeypatch.setattr(installed, "_PROCESS", GateState())
            environ = {"FATHOM_TMA": tma, "FATHOM_WARP_SPECIALIZATION": specialization}
            try:
                gates = resolve(environ, HOPPER)
            except installed.GateRefused:
                with pytest.raises(AssertionError, match="needs tma"):
                    KernelGates(tma, specialization)  # type: ignore[arg-type]
                continue
            install(gates)
            assert KernelGates.from_installed().tma == tma
            taken += 1
    assert taken == 6
