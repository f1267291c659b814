"""The hybrid model with its rows cut over ranks: loss, hidden states, every gradient, MTP targets, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from libs.flags.errors import UserError
from libs.model import HybridLM, hybrid
from libs.parallel.context import ContextShard
from libs.parallel.mesh import Layout
from tests.support.context_parallel import (
    DOCUMENTS,
    check_ranks,
    check_with_tensor_parallel,
    config,
    errors,
    parallel_over,
    share,
)
from tests.support.ranks import run_ranks
from tests.support.threads import ThreadGroup, on_threads


def on_slices(size: int, documents: list[int] | None, **options) -> dict[str, float]:
    shares, _ = on_threads(size, lambda group: share(documents, parallel=parallel_over(group), **options))
    return errors(shares, share(documents, **(options | {"checkpointing": "none"})))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_equals_one_rank(size: int, documents: list[int] | None) -> None:
    found = on_slices(size, documents)
    assert max(found.values()) <= 1e-10, max(found.items(), key=lambda item: item[1])


def test_two_mtp_depths_look_over_the_cut() -> None:
    found = on_slices(4, DOCUMENTS["inside and across"], pattern="M-/*-/M-")
    assert max(found.values()) <= 1e-10, max(found.items(), key=lambda item: item[1])


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, float]]]:
    return run_ranks(check_ranks, Layout(cp=request.param))


def test_processes_agree_with_one_also_through_activation_checkpointing(
    ranks: list[dict[str, dict[str, float]]],
) -> None:
    for rank, cases in enumerate(ranks):
        assert len(cases) == 5
        for case, rows in cases.items():
            tolerance = 1e-10 if "float64" in case else 1e-5
            name, error = max(rows.items(), key=lambda item: item[1])
            assert error <= tolerance, f"rank {rank}, {case}: {name}"


def test_slices_of_rows_and_shards_of_layers_at_once() -> None:
    for rank, found in enumerate(run_ranks(check_with_tensor_parallel, Layout(cp=2, tp=2))):
        name, error = max(found.items(), key=lambda item: item[1])
        assert error <= 1e-9, f"rank {rank}: {name}"


def mtp_inputs_not_taken_from_the_next_rank(patch: pytest.MonkeyPatch) -> None:
    original = hybrid.shift

    def local(values_BS, ahead, inside_S, fill):
        shifted = original(values_BS, ahead, inside_S, fill)
        shifted[:, 71] = fill
        return shifted

    patch.setattr(hybrid, "shift", local)


def positions_count_from_the_slice(patch: pytest.MonkeyPatch) -> None:
    original = ContextShard.cut

    def restarted(self: ContextShard, u: torch.Tensor, dim: int = 1) -> torch.Tensor:
        mine = original(self, u, dim)
        return mine - mine[0] if u.dim() == 1 else mine

    patch.setattr(ContextShard, "cut", restarted)


def gradient_exchange_dropped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ThreadGroup, "reduce_scatter", lambda self, tensor: tensor[self.rank])


@pytest.mark.parametrize(
    "mutant",
    [mtp_inputs_not_taken_from_the_next_rank, positions_count_from_the_slice, gradient_exchange_dropped],
)
def test_each_mutant_is_caught(mutant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = share(None)
    mutant(monkeypatch)
    shares, _ = on_threads(2, lambda group: share(None, parallel=parallel_over(group)))
    assert max(errors(shares, whole).values()) > 1e-4, mutant.__name__


def test_decode_and_short_rows_are_refused() -> None:
    group = ThreadGroup(None, 0, 2, (0, 1), object())
    model = HybridLM(config(), parallel=parallel_over(group))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    for work in (model.logits, model.prefill):
        with pytest.raises(UserError, match=r"whole rows: context parallel size 2.*cp=1"):
            work(tokens)
    with pytest.raises(UserError, match=r"size 2: 8 tokens are only 1 blocks of 8"):
        model(tokens)
