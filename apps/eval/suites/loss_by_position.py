"""Suite `loss_by_position`: bits per byte of whole held-out documents, by byte offset, with intervals.

Beside it the context-ablation curve (ablation.py) and general compressors (compression.py) on the same bytes.
Not for validation during training, which scores a fixed sample with the same scorer (apps.train.evaluate).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import JsonValue

from apps.eval.results import Ablation, Bucket, Compression, Estimate, Excluded, LossByPosition
from apps.eval.suites.ablation import run_ablation
from apps.eval.suites.compression import compress
from apps.eval.suites.suite import Documents, OnProgress, Suite, SuiteInput, SuiteOptions, SuiteOutput
from libs.flags.errors import UserError
from libs.model.score import DocumentScore, score_documents

FIRST_EDGE = 1024  # bytes; each further bucket is twice as wide in offset: 0-1k, 1k-2k, 2k-4k, ...


def bucket_edges(longest_offset: int) -> list[int]:
    """0, 1024, 2048, 4096, ... up to the first edge above `longest_offset` (bytes)."""
    edges = [0, FIRST_EDGE]
    while edges[-1] <= longest_offset:
        edges.append(2 * edges[-1])
    return edges


def run(inputs: SuiteInput, options: SuiteOptions, on_progress: OnProgress) -> SuiteOutput:
    """Score the drawn documents.

    Raises:
        UserError: every drawn document is excluded, or the contexts asked for do not exist.
    """
    scores: dict[int, DocumentScore] = {}
    excluded: list[Excluded] = []
    in_order = (inputs.documents[index] for index in inputs.drawn)
    for score in score_documents(
        inputs.model,
        in_order,
        inputs.tokenizer.token_bytes,
        max_tokens=options.max_tokens,
        batch_documents=options.batch_documents,
    ):
        document = inputs.drawn[score.position]
        reason = score.excluded or (None if score.n_bytes.any() else "no target stands for a byte")
        if reason is None:
            scores[document] = score
        else:
            excluded.append(Excluded(document=document, tokens=score.n_tokens, reason=reason))
        on_progress("documents", score.position + 1, len(inputs.drawn))
    if not scores:
        reasons = "; ".join(sorted({item.reason for item in excluded})[:4])
        raise UserError(f"nothing to score: all {len(excluded)} drawn documents are excluded ({reasons})")

    lengths = {document: score.n_tokens for document, score in scores.items()}
    ablation = run_ablation(inputs, lengths, options, lambda done, total: on_progress("context ablation", done, total))
    # In document order from here on, so that neither the draw's order nor batching can move an interval.
    ordered = {document: scores[document] for document in sorted(scores)}
    details = LossByPosition(
        bpb=_overall(list(ordered.values()), options.seed),
        scored_tokens=sum(len(score.nll_bits) for score in ordered.values()),
        scored_bytes=sum(int(score.n_bytes.sum()) for score in ordered.values()),
        buckets=bucket_scores(list(ordered.values()), seed=options.seed),
        ablation=ablation,
        compression=_compression(inputs, ordered, on_progress),
        trained_window=inputs.trained_window,
    )
    return SuiteOutput(
        scored=len(ordered),
        available=len(inputs.documents),
        excluded=tuple(sorted(excluded, key=lambda item: item.document or 0)),
        prompt_sha256=prompt_hash(inputs.documents, list(ordered)),
        metrics=_metrics(details),
        items=tuple(_line(document, score) for document, score in ordered.items()),
        details=details,
    )


def prompt_hash(documents: Documents, scored: Sequence[int]) -> str:
    """sha256 over index, length and ids (little-endian int32) of the documents, in ascending order."""
    digest = hashlib.sha256()
    for document in sorted(scored):
        ids = documents[document]
        digest.update(f"{document} {len(ids)}\n".encode() + ids.astype("<i4").tobytes())
    return digest.hexdigest()


def _line(document: int, score: DocumentScore) -> dict[str, JsonValue]:
    """What the item file says of a document."""
    bits, size = float(score.nll_bits[score.n_bytes > 0].sum()), int(score.n_bytes.sum())
    return {"document": document, "tokens": score.n_tokens, "bytes": size, "bits": bits, "bpb": bits / size}


def bucket_scores(scores: Sequence[DocumentScore], *, seed: int) -> list[Bucket]:
    """Bits per byte per geometric bucket of byte offset; buckets without a byte are left out.

    Targets without bytes (special tokens) count in neither sum. Only documents that reach a bucket are
    resampled for its interval.
    """
    longest = max(int(score.byte_offset.max()) for score in scores)
    edges = np.array(bucket_edges(longest))
    shape = (len(scores), len(edges) - 1)
    bits_DB, bytes_DB, tokens_DB = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=np.int64)
    for row, score in enumerate(scores):
        counted = score.n_bytes > 0
        bucket = np.searchsorted(edges, score.byte_offset[counted], side="right") - 1
        np.add.at(bits_DB[row], bucket, score.nll_bits[counted])
        np.add.at(bytes_DB[row], bucket, score.n_bytes[counted])
        np.add.at(tokens_DB[row], bucket, 1)
    found: list[Bucket] = []
    for column in range(shape[1]):
        here = bytes_DB[:, column] > 0
        if here.any():
            found.append(
                Bucket(
                    start=int(edges[column]),
                    end=int(edges[column + 1]),
                    documents=int(here.sum()),
                    tokens=int(tokens_DB[:, column].sum()),
                    bytes=int(bytes_DB[:, column].sum()),
                    bpb=Estimate.of_ratio(bits_DB[here, column], bytes_DB[here, column], seed=seed),
                )
            )
    return found


def _overall(scores: Sequence[DocumentScore], seed: int) -> Estimate:
    bits_D = np.array([float(score.nll_bits[score.n_bytes > 0].sum()) for score in scores])
    bytes_D = np.array([float(score.n_bytes.sum()) for score in scores])
    return Estimate.of_ratio(bits_D, bytes_D, seed=seed)


def _compression(inputs: SuiteInput, scores: Mapping[int, DocumentScore], on_progress: OnProgress) -> Compression:
    texts = [inputs.tokenizer.decode(inputs.documents[document]) for document in scores]
    scored_bytes = sum(int(score.n_bytes.sum()) for score in scores.values())
    on_progress("zlib and lzma", 0, 1)
    compression = compress(texts, unscored_bytes=sum(map(len, texts)) - scored_bytes)
    on_progress("zlib and lzma", 1, 1)
    return compression


def _metrics(details: LossByPosition) -> dict[str, float]:
    metrics = {"bpb": details.bpb.value}
    if details.bpb.low is not None and details.bpb.high is not None:
        metrics |= {"bpb_low": details.bpb.low, "bpb_high": details.bpb.high}
    for bucket in details.buckets:
        metrics[f"bpb_bytes_{bucket.start}_{bucket.end}"] = bucket.bpb.value
    for compressor in details.compression.compressors:
        name = compressor.name.replace("-", "")
        metrics[f"{name}_per_document_bpb"] = compressor.per_document_bpb
        metrics[f"{name}_one_stream_bpb"] = compressor.one_stream_bpb
    metrics |= _gains(details.ablation)
    return metrics


def _gains(ablation: Ablation) -> dict[str, float]:
    gains = {f"gain_context_{point.context}": point.gain.value for point in ablation.points}
    keys = [] if ablation.key_tokens is None else ablation.key_tokens.points
    return gains | {f"key_token_bpb_context_{point.context}": point.bpb.value for point in keys}


LOSS_BY_POSITION = Suite(
    name="loss_by_position",
    version=1,
    summary="bits per byte by byte offset, with the context-ablation curve and general compressors beside it",
    run=run,
)
