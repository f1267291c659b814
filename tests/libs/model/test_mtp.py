"""Multi-token prediction: what each depth predicts, and that nothing crosses a document boundary."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from libs.model import HybridLM
from libs.model.mtp import shift, within_document

Build = Callable[..., HybridLM]
BOUNDS = [0, 6, 7, 9, 20]


def slow_targets(labels: list[int], ahead: int, bounds: list[int]) -> list[int]:
    """Target of depth `ahead` at each position, by walking documents."""
    targets = []
    for i in range(len(labels)):
        end = min(bound for bound in bounds if bound > i)
        targets.append(labels[i + ahead] if i + ahead < end else -100)
    return targets


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("bounds", [BOUNDS, [0, 20], None])
def test_targets_equal_a_walk_over_documents(ahead: int, bounds: list[int] | None) -> None:
    labels = torch.arange(100, 120)[None]
    inside = within_document(20, ahead, bounds, labels.device)
    want = slow_targets(labels[0].tolist(), ahead, bounds or [0, 20])
    assert shift(labels, ahead, inside, -100)[0].tolist() == want


def test_a_document_shorter_than_the_depth_has_no_target() -> None:
    inside = within_document(2, 2, None, torch.device("cpu"))
    assert shift(torch.tensor([[5, 6]]), 2, inside, -100).tolist() == [[-100, -100]]


def packed_labels(tokens: Tensor) -> Tensor:
    labels = tokens.roll(-1, 1)
    labels[:, [bound - 1 for bound in BOUNDS[1:]]] = -100
    return labels


def test_counts_of_each_depth(build: Build) -> None:
    tokens = torch.randint(0, 64, (1, 20))
    out = build("M/*/-").loss(tokens, packed_labels(tokens), cu_seqlens=torch.tensor(BOUNDS))
    assert out.n_tokens.item() == 5 + 0 + 1 + 10
    assert [count.item() for count in out.mtp_n_tokens] == [4 + 0 + 0 + 9, 3 + 0 + 0 + 8]


@pytest.mark.parametrize("pattern", ["M/*-", "-/M/M", "*/*/-"])
def test_loss_of_a_document_does_not_depend_on_its_neighbours(build: Build, pattern: str) -> None:
    """Packed loss sums equal the sums of documents run alone: no input embedding or target crosses."""
    model = build(pattern, dtype=torch.float64)
    tokens = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(1))
    labels = packed_labels(tokens)
    with torch.no_grad():
        packed = model.loss(tokens, labels, cu_seqlens=torch.tensor(BOUNDS))
        alone = [model.loss(tokens[:, a:b], labels[:, a:b]) for a, b in itertools.pairwise(BOUNDS)]
    for depth, got in enumerate(packed.mtp_nll_sums):
        assert got.item() == pytest.approx(sum(out.mtp_nll_sums[depth].item() for out in alone), rel=1e-10)


def test_depth_one_predicts_the_token_after_next_from_the_next(build: Build) -> None:
    """By hand: join the state at i with the embedding of token i + 1, run the depth, score token i + 2."""
    model = build("-/-", dtype=torch.float64)
    tokens = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, 1)
    labels[0, -1] = -100
    with torch.no_grad():
        got = model.loss(tokens, labels).mtp_nll_sums[0].item()
        embedded = model.embedding(tokens)
        context = model.pass_context(tokens, None)
        hidden = model.blocks[0](embedded, context)
        depth = model.mtp[0]
        pair = torch.cat([depth.hidden_norm(hidden[:, :-1]), depth.embedding_norm(embedded[:, 1:])], -1)
        state = depth.final_norm(depth.blocks[0](depth.join_proj(pair), context))
        log_probs = (state @ model.head_weight.T).log_softmax(-1)
    want = -sum(log_probs[0, i, tokens[0, i + 2]].item() for i in range(7))
    assert got == pytest.approx(want, rel=1e-10)
