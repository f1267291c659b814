"""The model as a whole: isolation, decode = forward, checkpointing = none, losses, precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from libs.flags.errors import UserError
from libs.model import HybridLM, preset

Build = Callable[..., HybridLM]
PATTERNS = ["M", "*", "-", "M-*-M"]
VOCAB = 64


def ids(tokens: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_changing_one_document_changes_no_logit_of_another(build: Build, pattern: str, backend: str) -> None:
    model = build(pattern, dtype=torch.float64)
    model.request_backends(mimo=backend)
    tokens, cu_seqlens = ids(40), torch.tensor([0, 13, 14, 29, 40], dtype=torch.int32)
    with torch.no_grad():
        before = model.logits(tokens, cu_seqlens=cu_seqlens)
        for start, end in ((0, 13), (13, 14), (14, 29), (29, 40)):
            changed = tokens.clone()
            changed[:, start:end] = (changed[:, start:end] + 1) % VOCAB
            moved = (model.logits(changed, cu_seqlens=cu_seqlens) - before).abs().amax(-1)[0]
            same = moved == 0
            assert same[:start].all()
            assert same[end:].all()
            assert not same[start:end].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_document_equals_the_document_alone(build: Build, pattern: str) -> None:
    model = build(pattern, dtype=torch.float64)
    tokens, bounds = ids(40), [0, 13, 14, 29, 40]
    with torch.no_grad():
        packed = model.logits(tokens, cu_seqlens=torch.tensor(bounds))
        alone = [model.logits(tokens[:, a:b]) for a, b in itertools.pairwise(bounds)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", ["M", "*", "M-*-M"])
def test_without_boundaries_documents_would_leak(build: Build, pattern: str) -> None:
    """The isolation tests can fail: the same model without cu_seqlens does carry context over."""
    model, tokens = build(pattern, dtype=torch.float64), ids(20)
    with torch.no_grad():
        packed = model.logits(tokens, cu_seqlens=torch.tensor([0, 9, 20]))
        whole = model.logits(tokens)
    assert torch.equal(packed[:, :9], whole[:, :9]) or torch.allclose(packed[:, :9], whole[:, :9], atol=1e-9)
    assert (packed[:, 9:] - whole[:, 9:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_logit_depends_on_the_future(build: Build, pattern: str) -> None:
    model, tokens = build(pattern, dtype=torch.float64), ids(19)
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % VOCAB
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :11], after[:, :11], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(before[:, 11:], after[:, 11:])


@pytest.mark.parametrize("changes", [{}, {"mixer__rotary_dim_divisor": 2, "mixer__ngroups": 2}])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_prefill_and_steps_equal_forward(build: Build, pattern: str, changes: dict[str, Any]) -> None:
    model = build(pattern, dtype=torch.float64, mixer__outproj_norm=bool(changes), **changes)
    tokens = ids(24, rows=2)
    with torch.no_grad():
        want = model.logits(tokens)
    for split in (1, 8, 11):
        logits, state = model.prefill(tokens[:, :split])
        got = [logits]
        for t in range(split, 24):
            logits, state = model.step(tokens[:, t], state)
            got.append(logits)
        torch.testing.assert_close(torch.stack(got, 1), want[:, split - 1 :], rtol=1e-9, atol=1e-9)
        assert state.position == 24


def test_a_step_leaves_its_state_valid(build: Build) -> None:
    model = build("M-*-", dtype=torch.float64)
    _, state = model.prefill(ids(7))
    first, _ = model.step(torch.tensor([3]), state)
    model.step(torch.tensor([9]), state)
    again, _ = model.step(torch.tensor([3]), state)
    assert torch.equal(first, again)


@pytest.mark.parametrize("pattern", [*PATTERNS, "M-*-/*-/M"])
def test_activation_checkpointing_changes_nothing(build: Build, pattern: str) -> None:
    tokens, cu_seqlens = ids(33), torch.tensor([0, 12, 33])

    def run(checkpointing: str) -> tuple[Tensor, list[Tensor]]:
        model = build(pattern, checkpointing=checkpointing)
        loss = model.loss(tokens, tokens.roll(-1, 1), cu_seqlens=cu_seqlens).loss
        return loss, list(torch.autograd.grad(loss, list(model.parameters())))

    (loss, grads), (loss_again, grads_again) = run("none"), run("block")
    assert torch.equal(loss, loss_again)
    assert all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_activation_checkpointing_saves_less(build: Build) -> None:
    def saved(checkpointing: str) -> int:
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        model = build("M-*-", checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(ids(64))
        return count

    assert saved("block") < saved("none") / 5


def test_unknown_checkpointing_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"blocks.*did you mean 'block'"):
        build("M", checkpointing="blocks")


@pytest.mark.parametrize("pattern", ["M-*-", "M-*-/*-"])
def test_per_token_nll_is_log_softmax(build: Build, pattern: str) -> None:
    model, tokens = build(pattern, dtype=torch.float64), ids(21)
    labels = tokens.roll(-1, 1)
    labels[0, [4, 20]] = -100
    with torch.no_grad():
        nll = model.per_token_nll(tokens, labels)
        log_probs = model.logits(tokens).log_softmax(-1)
        output = model.loss(tokens, labels)
    for t, label in enumerate(labels[0].tolist()):
        want = 0.0 if label == -100 else -log_probs[0, t, label].item()
        assert nll[0, t].item() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert output.n_tokens.item() == 19
    assert output.main_nll_sum.item() == pytest.approx(nll.sum().item())


def test_loss_is_main_mean_plus_weighted_mean_of_depths(build: Build) -> None:
    model, tokens = build("M-/*-/M", mtp_weight=0.5), ids(21)
    out = model.loss(tokens, tokens.roll(-1, 1))
    main = out.main_nll_sum / out.n_tokens
    depths = [total / count for total, count in zip(out.mtp_nll_sums, out.mtp_n_tokens, strict=True)]
    torch.testing.assert_close(out.loss, main + 0.5 * (depths[0] + depths[1]) / 2)
    out.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_loss_of_nothing_is_zero_not_nan(build: Build) -> None:
    out = build("M-/*-").loss(ids(5), torch.full((1, 5), -100))
    assert out.loss.item() == 0
    assert out.n_tokens.item() == 0


@pytest.mark.parametrize("pattern", ["M-*-/*-", "M-/M-"])
def test_bf16_autocast_is_near_fp32_and_trains_fp32_parameters(build: Build, pattern: str) -> None:
    model, tokens = build(pattern), ids(48)
    exact = model.loss(tokens, tokens.roll(-1, 1)).loss
    with torch.autocast("cpu", torch.bfloat16):
        low = model.loss(tokens, tokens.roll(-1, 1)).loss
    low.backward()
    assert low.dtype == torch.float32
    assert abs(low.item() - exact.item()) < 0.03 * exact.item()
    assert low.item() != exact.item()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}


def test_bf16_model_runs_and_a_plain_cast_is_refused(build: Build) -> None:
    tokens = ids(24)
    model = build("M-*-/*-", dtype=torch.bfloat16)
    model.loss(tokens, tokens.roll(-1, 1)).loss.backward()
    logits, state = model.prefill(tokens)
    assert logits.dtype == torch.bfloat16
    model.step(tokens[:, 0], state)
    with pytest.raises(UserError, match=r"dt_bias.*must stay fp32, got torch\.bfloat16.*cast_model"):
        model.to(torch.bfloat16)(tokens)


def test_choices_name_only_operators_that_run(build: Build) -> None:
    assert set(build("M-").choices) == {"mimo", "loss"}
    assert set(build("*-").choices) == {"attention", "loss"}
    choice = build("M*").choices["mimo"]
    assert choice.value == "chunked"
    assert "auto" in choice.reason
    with pytest.raises(ValueError, match="unknown backend 'sm90'"):
        build("M").request_backends(mimo="sm90")


@pytest.mark.parametrize(
    ("tokens", "bounds"),
    [(ids(8, rows=2), [0, 8]), (ids(8), [0, 4]), (ids(8), [0, 5, 5, 8]), (ids(8), [2, 8]), (ids(8)[0], None)],
)
def test_refuses_boundaries_and_shapes_that_do_not_fit(build: Build, tokens: Tensor, bounds: Any) -> None:
    with pytest.raises(ValueError, match=r"cu_seqlens must rise|tokens must be \(B,S\)"):
        build("-")(tokens, cu_seqlens=None if bounds is None else torch.tensor(bounds))


def test_rows_of_a_batch_are_independent(build: Build) -> None:
    model, tokens = build("M-*-", dtype=torch.float64), ids(17, rows=3)
    with torch.no_grad():
        together = model.logits(tokens)
        apart = torch.cat([model.logits(row[None]) for row in tokens])
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


def test_it_learns_a_repeating_text() -> None:
    model = HybridLM(preset("cpu_tiny"))
    tokens = ids(12).repeat(1, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        out = model.loss(tokens[:, :-1], tokens[:, 1:])
        losses.append((out.main_nll_sum / out.n_tokens).item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
