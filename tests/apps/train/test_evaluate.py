"""Validation: the same documents every time, long ones counted, the score that the slow way gives."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.train.config import DataSection, TrainSection
from apps.train.evaluate import BATCH_DOCUMENTS, _in_rounds, choose_documents, validate
from apps.train.lane import Lane, choose_lane
from apps.train.signals import Interrupted, Received, SignalGuard
from libs.flags.errors import UserError
from libs.model import HybridLM, ModelConfig, preset
from libs.model.score import DocumentScore
from libs.model.text.shards import DataDir
from libs.parallel.mesh import single


@pytest.fixture
def lane() -> Lane:
    return choose_lane(TrainSection(device="cpu", precision="fp32"))


def test_bpb_is_that_of_one_document_at_a_time(corpus: Path, lane: Lane) -> None:
    data = DataDir.open(corpus)
    chosen = choose_documents(data, DataSection(valid_tokens=1500, valid_document_tokens=900))
    model = HybridLM(ModelConfig.parse({**preset("cpu_tiny").model_dump(), "vocab_size": 272}))
    found = validate(model, chosen, lane, SignalGuard())
    nats = n_bytes = 0.0
    for index in chosen.indices:
        ids = torch.from_numpy(data.documents("valid")[index].astype("int64"))
        nll = -torch.log_softmax(model.logits(ids[None])[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        sizes = torch.from_numpy(data.tokenizer.token_bytes)[ids[1:]]
        nats += float(nll.detach()[sizes > 0].sum())
        n_bytes += float(sizes.sum())
    assert found.bpb == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert found.n_documents == len(chosen.indices) > 1
    assert choose_documents(data, DataSection(valid_tokens=1500, valid_document_tokens=900)).indices == chosen.indices


def test_long_documents_are_left_out_and_counted(corpus: Path) -> None:
    data = DataDir.open(corpus)
    lengths = data.documents("valid").lengths
    limit = int(sorted(lengths)[len(lengths) // 2])
    chosen = choose_documents(data, DataSection(valid_tokens=10**9, valid_document_tokens=limit))
    assert chosen.excluded == int((lengths > limit).sum()) > 0
    assert sorted(chosen.indices) == [i for i, n in enumerate(lengths) if n <= limit]
    with pytest.raises(UserError, match="held-out"):
        choose_documents(data, DataSection(valid_document_tokens=2))


def test_ranks_look_for_signals_together_every_few_documents() -> None:
    """As many looks whatever a rank's share holds, and no document after a signal that was there at the look."""
    guard, looks = SignalGuard(), 3
    scores = [DocumentScore(n, 2, np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64), None) for n in range(20)]
    for share in (scores, scores[:3], []):
        assert list(_in_rounds(iter(share), looks, guard, single())) == share
    watched = _in_rounds(iter(scores), looks, guard, single())
    assert list(itertools.islice(watched, BATCH_DOCUMENTS - 3)) == scores[: BATCH_DOCUMENTS - 3]
    guard.received = Received("SIGTERM", "evaluation")
    assert list(itertools.islice(watched, 3)) == scores[BATCH_DOCUMENTS - 3 : BATCH_DOCUMENTS]
    with pytest.raises(Interrupted, match="a signal to rank 0"):
        next(watched)


def test_a_signal_ends_the_evaluation(corpus: Path, lane: Lane) -> None:
    guard = SignalGuard()
    guard.received = Received("SIGTERM", "evaluation")
    model = HybridLM(ModelConfig.parse({**preset("cpu_tiny").model_dump(), "vocab_size": 272}))
    with pytest.raises(Interrupted):
        validate(model, choose_documents(DataDir.open(corpus), DataSection()), lane, guard)
