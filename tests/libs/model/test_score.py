"""Scoring documents: equal to log_softmax, in any order and batch; bits per byte by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from libs.model import HybridLM
from libs.model.score import DocumentScore, bits_per_byte, score_documents

Build = Callable[..., HybridLM]
TOKEN_BYTES = np.arange(64) % 5  # ids 0, 5, 10 ... stand for no byte
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(0, 64, size=n).astype(np.int32) for n in (9, 2, 1, 30, 17, 0, 5)]


@pytest.fixture
def model(build: Build) -> HybridLM:
    return build("M-*-/*-", dtype=torch.float64)


def score(model: HybridLM, documents: list[np.ndarray], **options: int) -> list[DocumentScore]:
    return list(score_documents(model, documents, TOKEN_BYTES, **{"max_tokens": 20, **options}))


def test_equals_log_softmax_of_each_document(model: HybridLM) -> None:
    for result, document in zip(score(model, DOCUMENTS, max_tokens=64), DOCUMENTS, strict=True):
        assert result.n_tokens == len(document)
        if len(document) < 2:
            assert result.excluded == f"{len(document)} tokens: no target"
            continue
        tokens = torch.from_numpy(document.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = model.logits(tokens).log_softmax(-1)[0]
        want = [-log_probs[i, document[i + 1]].item() / math.log(2) for i in range(len(document) - 1)]
        np.testing.assert_allclose(result.nll_bits, want, rtol=1e-9)
        assert result.n_bytes.tolist() == TOKEN_BYTES[document[1:]].tolist()
        assert result.byte_offset.tolist() == [TOKEN_BYTES[document[:i]].sum() for i in range(1, len(document))]


def test_over_long_documents_are_listed_not_truncated(model: HybridLM) -> None:
    results = score(model, DOCUMENTS)
    assert [result.position for result in results] == list(range(7))
    assert results[3].excluded == "30 tokens, more than max_tokens=20"
    assert len(results[3].nll_bits) == 0
    total = bits_per_byte(results)
    assert (total.n_documents, total.n_excluded) == (4, 3)


def test_scores_do_not_depend_on_order(model: HybridLM) -> None:
    forward, backward = score(model, DOCUMENTS), score(model, DOCUMENTS[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        assert one.nll_bits.tobytes() == other.nll_bits.tobytes()


@pytest.mark.parametrize("batch", [2, 8])
def test_packing_several_documents_gives_the_same_scores(model: HybridLM, batch: int) -> None:
    for one, packed in zip(score(model, DOCUMENTS), score(model, DOCUMENTS, batch_documents=batch), strict=True):
        assert one.position == packed.position
        np.testing.assert_allclose(packed.nll_bits, one.nll_bits, rtol=1e-9)


def test_a_pass_never_holds_more_than_max_tokens(model: HybridLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    original = HybridLM.per_token_nll

    def watch(self: HybridLM, tokens: torch.Tensor, labels: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        lengths.append(tokens.shape[1])
        return original(self, tokens, labels, **options)

    monkeypatch.setattr(HybridLM, "per_token_nll", watch)
    score(model, DOCUMENTS, batch_documents=8)
    assert max(lengths) <= 20
    assert len(lengths) < 5


def test_bits_per_byte_by_hand() -> None:
    def document(bits: list[float], sizes: list[int]) -> DocumentScore:
        n_bytes = np.array(sizes)
        return DocumentScore(0, 4, np.array(bits), n_bytes, np.cumsum(n_bytes) - n_bytes, None)

    total = bits_per_byte([document([4.0, 2.0, 100.0], [2, 1, 0]), document([6.0], [3])])
    assert total.nll_bits == 12.0  # the special token's 100 bits are in neither sum
    assert total.n_bytes == 6
    assert total.bpb == 2.0
    assert math.isnan(bits_per_byte([]).bpb)
