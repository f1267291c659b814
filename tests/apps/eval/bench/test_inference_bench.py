"""`fathom bench prefix` and `decode`, small: receipts with the right counts, and red gates when tokens differ."""

from __future__ import annotations

import json

import pytest

from apps.eval.bench import decode, prefix
from apps.eval.bench.__main__ import main
from apps.eval.bench.decode import DecodeReceipt
from apps.eval.bench.decode_job import DecodePlan
from apps.eval.bench.ops import RedGate
from apps.eval.bench.prefix import PUBLISHED, Account, PrefixPlan, PrefixReceipt, run_prefix
from libs.flags.errors import UserError

SMALL = PrefixPlan("cpu_tiny", 3, 200, 4, (64, 16), 1, 1, 0)


@pytest.fixture(scope="module")
def receipt() -> PrefixReceipt:
    return run_prefix(SMALL, command=["fathom"], machine="test")


def test_prefix_counts(receipt: PrefixReceipt) -> None:
    by = {(account.mode, account.block_size): account for account in receipt.accounts}
    # 203 tokens are kept: 4 blocks of 64 (3 shared), 13 of 16 (12 shared).
    assert [by[mode, 64].peak_blocks for mode in prefix.MODES] == [12, 6, 6]
    assert [by[mode, 16].peak_blocks for mode in prefix.MODES] == [39, 15, 15]
    assert [by[mode, 16].prefill_tokens for mode in prefix.MODES] == [600, 600, 600 - 2 * 192]
    assert by["snapshots", 16].repeat_skipped == pytest.approx(192 / 200)
    assert by["off", 64].published_peak == 13
    assert all(account.mean_blocks <= account.peak_blocks for account in receipt.accounts)
    assert receipt.aims == []
    assert PrefixReceipt.model_validate_json(receipt.model_dump_json()) == receipt


def test_the_published_workload_has_aims(receipt: PrefixReceipt) -> None:
    plan = PrefixPlan("cpu_demo", *PUBLISHED, (256,), 1, 1, 0)
    account = receipt.accounts[0].model_dump()
    accounts = {
        (mode, 256): Account(**{**account, "mode": mode, "peak_blocks": peak, "repeat_skipped": 0.8})
        for mode, peak in (("off", 30), ("memory_only", 12), ("snapshots", 12))
    }
    saved, skipped = prefix._aims(plan, accounts)
    assert (saved.measured, saved.met) == (pytest.approx(0.6), True)
    assert not skipped.met


def test_other_tokens_are_a_red_gate(receipt: PrefixReceipt) -> None:
    ran = prefix._Ran(1.0, (((1,), (0.5,)),), receipt.accounts[0])
    last = {f"{mode}_block{block}": ran for mode in prefix.MODES for block in SMALL.blocks}
    assert all(outcome.passed for outcome in prefix._check(SMALL, last))
    last["snapshots_block16"] = ran._replace(found=(((1,), (0.25,)),))
    assert not all(outcome.passed for outcome in prefix._check(SMALL, last))
    last["snapshots_block16"] = ran
    last["memory_only_block64"] = ran._replace(account=ran.account.model_copy(update={"prefill_tokens": 1}))
    assert not all(outcome.passed for outcome in prefix._check(SMALL, last))


def test_decode_quick(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", "--quick", "--json", "--n", "1", "--threads", "1"]) == 0
    shown = DecodeReceipt.model_validate(json.loads(capsys.readouterr().out))
    sizes = {(at.model, at.tokens): at for at in shown.contexts}
    assert sizes["twin", 512].kv_bytes == 2 * sizes["hybrid", 512].kv_bytes == 8 * sizes["twin", 128].kv_bytes / 2
    assert sizes["twin", 512].state_bytes == 0 < sizes["hybrid", 512].state_bytes
    replay, snapshot = shown.speculation
    assert (replay.rollback, snapshot.rollback) == ("replay", "snapshot")
    assert 0 < replay.rollback_bytes < snapshot.rollback_bytes
    assert replay.drafted == snapshot.drafted > 0
    assert all(check.error == 0 for check in shown.correctness)


def test_a_draft_that_changes_a_token_is_a_red_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pool:
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *_: object) -> Pool:
            return self

        def result(self) -> object:
            return type("M", (), {"differing": {"replay": 1}})()

    monkeypatch.setattr(decode, "own_process", lambda *_: Pool())
    plan = DecodePlan("cpu_tiny", (64,), 1, 64, "cpu_tiny", 1, 1, 1, 4, 64, 1, 0)
    with pytest.raises(RedGate, match="replay"):
        decode.run_decode(plan, command=["fathom"], machine="test")


@pytest.mark.parametrize("options", [["--n", "0"], ["--threads", "0"]])
def test_options_out_of_range(options: list[str]) -> None:
    for command in ("prefix", "decode"):
        with pytest.raises(UserError, match=options[0]):
            main([command, "--quick", *options])
