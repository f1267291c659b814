"""The suite against slow paths: one token at a time for the scores, one target at a time for the buckets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.eval.suites.ablation import choose_contexts, key_tokens
from apps.eval.suites.loss_by_position import bucket_edges, bucket_scores, run
from apps.eval.suites.suite import SuiteInput, SuiteOutput
from libs.flags.errors import UserError
from libs.model.score import DocumentScore
from tests.apps.eval.suites.questions_support import OPTIONS, inputs_of


@pytest.fixture
def inputs(data_dir: Path) -> SuiteInput:
    return inputs_of(data_dir)._replace(drawn=list(range(12)))


def scored(output: SuiteOutput) -> list[int]:
    return [int(str(item["document"])) for item in output.items]


def score(inputs: SuiteInput, **changes: object) -> SuiteOutput:
    return run(inputs, OPTIONS._replace(**changes), lambda _label, _done, _total: None)


def test_bpb_is_that_of_logits_one_document_at_a_time(inputs: SuiteInput) -> None:
    output = score(inputs._replace(drawn=[3, 1]))
    bits = n_bytes = 0.0
    for document in (1, 3):
        ids = torch.from_numpy(inputs.documents[document].astype(np.int64))
        with torch.no_grad():
            log_p = torch.log_softmax(inputs.model.logits(ids[None])[0].double(), -1)
        for position in range(len(ids) - 1):
            size = int(inputs.tokenizer.token_bytes[ids[position + 1]])
            if size:
                bits -= float(log_p[position, ids[position + 1]]) / math.log(2)
                n_bytes += size
    assert output.details.bpb.value == pytest.approx(bits / n_bytes, rel=1e-5)
    assert output.details.scored_bytes == n_bytes
    assert output.metrics["bpb"] == output.details.bpb.value


def test_scores_do_not_depend_on_batch_or_order(inputs: SuiteInput) -> None:
    alone = score(inputs)
    reversed_order = score(inputs._replace(drawn=list(range(11, -1, -1))))
    assert reversed_order.details == alone.details  # bit for bit, one document per pass
    packed = score(inputs, batch_documents=8)
    assert [b.model_dump(exclude={"bpb"}) for b in packed.details.buckets] == [
        b.model_dump(exclude={"bpb"}) for b in alone.details.buckets
    ]
    for one, other in zip(packed.details.buckets, alone.details.buckets, strict=True):
        assert one.bpb.value == pytest.approx(other.bpb.value, rel=1e-5)
        assert one.bpb.low == pytest.approx(other.bpb.low, rel=1e-5)


def test_too_long_is_excluded_and_listed_never_cut(inputs: SuiteInput) -> None:
    lengths = [len(inputs.documents[i]) for i in range(12)]
    output = score(inputs, max_tokens=1200)
    expected = {i for i, n in enumerate(lengths) if n > 1200}
    assert expected
    assert {item.document for item in output.excluded} == expected
    assert all(str(lengths[item.document]) in item.reason for item in output.excluded)
    assert set(scored(output)) == set(range(12)) - expected
    assert output.scored == 12 - len(expected)
    assert output.details.scored_tokens == sum(lengths[i] - 1 for i in scored(output))
    with pytest.raises(UserError, match="nothing to score"):
        score(inputs, max_tokens=10)


def test_buckets_against_one_target_at_a_time() -> None:
    rng = np.random.default_rng(0)
    scores = []
    for position, n in enumerate((700, 2500, 9000)):
        size = rng.integers(0, 4, n)
        scores.append(
            DocumentScore(position, n + 1, rng.gamma(2, 1, n), size.astype(np.int64), np.cumsum(size) - size, None)
        )
    buckets = {(b.start, b.end): b for b in bucket_scores(scores, seed=0)}
    slow: dict[tuple[int, int], list[tuple[int, float, int]]] = {}
    for s in scores:
        for bits, size, offset in zip(s.nll_bits, s.n_bytes, s.byte_offset, strict=True):
            if size:
                start = 0 if offset < 1024 else 1024 * 2 ** int(math.log2(offset // 1024))
                slow.setdefault((start, max(1024, 2 * start)), []).append((s.position, float(bits), int(size)))
    assert buckets.keys() == slow.keys()
    for key, rows in slow.items():
        assert buckets[key].tokens == len(rows)
        assert buckets[key].bytes == sum(size for _, _, size in rows)
        assert buckets[key].documents == len({position for position, _, _ in rows})
        assert buckets[key].bpb.value == pytest.approx(sum(b for _, b, _ in rows) / sum(s for _, _, s in rows))
    assert buckets[(8192, 16384)].bpb.low is None  # one document reaches it: no interval


def test_bucket_edges_double_and_reach_the_last_offset() -> None:
    assert bucket_edges(0) == [0, 1024]
    assert bucket_edges(1023) == [0, 1024]
    assert bucket_edges(1024) == [0, 1024, 2048]
    assert bucket_edges(131_071)[-3:] == [32768, 65536, 131072]


def test_ablation_scores_the_same_span_with_less_context(inputs: SuiteInput) -> None:
    output = score(inputs, contexts=(2, 700), ablation_documents=3)
    ablation = output.details.ablation
    room = [i for i in range(12) if len(inputs.documents[i]) >= 764]
    assert ablation.documents == room[:3]
    assert ablation.not_used == room[3:]
    assert set(ablation.too_short) == set(range(12)) - set(room)
    for point in ablation.points:
        bits = n_bytes = 0.0
        for document in ablation.documents:
            ids = inputs.documents[document].astype(np.int64)[-(point.context + 64) :]
            with torch.no_grad():
                log_p = torch.log_softmax(inputs.model.logits(torch.from_numpy(ids)[None])[0].double(), -1)
            for position in range(len(ids) - 65, len(ids) - 1):
                size = int(inputs.tokenizer.token_bytes[ids[position + 1]])
                if size:
                    bits -= float(log_p[position, ids[position + 1]]) / math.log(2)
                    n_bytes += size
        assert point.bpb.value == pytest.approx(bits / n_bytes, rel=1e-5)
    short, longest = ablation.points
    assert longest.gain.value == longest.gain.low == longest.gain.high == 0.0
    assert short.gain.value == pytest.approx(short.bpb.value - longest.bpb.value)
    assert short.gain.value != 0.0


def test_contexts_are_chosen_with_a_reason_or_refused() -> None:
    lengths = [40, 200, *[600] * 8]
    found = choose_contexts(lengths, OPTIONS)
    assert found.lengths == (64, 128, 256, 512)
    assert "powers of two" in found.reason
    assert choose_contexts([600] * 7, OPTIONS).lengths == ()
    with pytest.raises(UserError, match="longest context is 536"):
        choose_contexts(lengths, OPTIONS._replace(contexts=(64, 1024)))
    with pytest.raises(UserError, match="max-tokens"):
        choose_contexts(lengths, OPTIONS._replace(contexts=(64, 8192), max_tokens=4096))


def test_no_curve_is_said_not_hidden(inputs: SuiteInput) -> None:
    ablation = score(inputs._replace(drawn=[0, 1, 2])).details.ablation
    assert ablation.points == []
    assert ablation.reason is not None
    assert ablation.reason.startswith("no curve")
    assert ablation.too_short == [0, 1, 2]


def test_a_span_of_special_tokens_alone_has_no_bits_per_byte(inputs: SuiteInput) -> None:
    """The last token of every document ends it and stands for no byte: no curve, with the reason."""
    output = score(inputs, contexts=(64, 128), span_tokens=1)
    ablation = output.details.ablation
    lengths = [len(inputs.documents[i]) for i in range(12)]
    assert (ablation.points, ablation.documents, ablation.key_tokens) == ([], [], None)
    assert ablation.reason == "no curve: the last 1 tokens of no document stand for a byte"
    assert ablation.no_bytes == [i for i, n in enumerate(lengths) if n >= 129]
    assert ablation.too_short == [i for i, n in enumerate(lengths) if n < 129]


def test_a_document_without_a_byte_in_the_span_is_left_out_and_listed(inputs: SuiteInput) -> None:
    """As if it had not been drawn; the next one takes its place."""
    ends = int(inputs.documents[0][-1])
    assert inputs.tokenizer.token_bytes[ends] == 0
    changed = [np.array(inputs.documents[i]) for i in range(12)]
    changed[5][-64:] = ends
    room = [i for i, ids in enumerate(changed) if len(ids) >= 764]
    assert 5 in room[:3]
    ablation = score(inputs._replace(documents=changed), contexts=(2, 700), ablation_documents=3).details.ablation
    others = [i for i in room if i != 5]
    assert (ablation.no_bytes, ablation.documents, ablation.not_used) == ([5], others[:3], others[3:])
    without = inputs._replace(documents=changed, drawn=[i for i in range(12) if i != 5])
    assert score(without, contexts=(2, 700), ablation_documents=3).details.ablation.points == ablation.points


def test_contexts_that_cannot_be_had_are_named_when_other_suites_use_them_too() -> None:
    lengths = [40, 200, *[600] * 8]
    lenient = OPTIONS._replace(strict_contexts=False)
    found = choose_contexts(lengths, lenient._replace(contexts=(64, 256, 1024)))
    assert found.lengths == (64, 256)
    assert "[1024]" in found.reason
    assert choose_contexts(lengths, lenient._replace(contexts=(64, 1024))).lengths == ()
    with pytest.raises(UserError, match="two or more"):
        choose_contexts(lengths, OPTIONS._replace(contexts=(64,)))


def test_key_tokens_against_one_target_at_a_time() -> None:
    rng = np.random.default_rng(0)
    bits = rng.gamma(2, 2, (3, 4, 50))
    sizes = rng.integers(0, 3, (4, 50)).astype(float)
    sizes[3], bits[:, 3] = 1.0, 5.0  # a document in which context changes nothing
    bits[:, sizes == 0] = 0.0
    found = key_tokens((64, 256, 1024), bits, sizes, seed=0)
    keys = []
    for document in range(4):
        for target in range(50):
            short, longest = (float(bits[row, document, target]) * math.log(2) for row in (0, 2))
            if sizes[document, target] and -longest - -short > 2.0 and -longest > -2.0:
                keys.append((document, target))
    assert 5 < len(keys) < 150
    assert found.tokens == len(keys)
    assert found.documents == len({document for document, _ in keys}) == 3
    assert found.of_tokens == int((sizes > 0).sum())
    for row, point in enumerate(found.points):
        expected = sum(bits[row][key] for key in keys) / sum(sizes[key] for key in keys)
        assert point.bpb.value == pytest.approx(expected)
    assert found.points[0].bpb.value > found.points[-1].bpb.value


def test_no_key_tokens_is_said_not_guessed() -> None:
    bits, sizes = np.ones((2, 3, 5)), np.ones((3, 5))
    found = key_tokens((64, 128), bits, sizes, seed=0)
    assert (found.tokens, found.documents, found.points) == (0, 0, [])
