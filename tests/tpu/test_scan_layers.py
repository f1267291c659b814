"""Equal layers as one loop on XLA: the plain loop's results, and a refusal for what a loop would get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_xla
from torch import Tensor, nn

from apps.train.__main__ import main
from libs.flags.errors import ExitStatus, run_entry
from libs.flags.runlog import read_events
from libs.model import HybridLM, ModelConfig, preset, scan_layers
from libs.parallel.xla.homogeneous import Run
from libs.parallel.xla.stack import NotLoopable, run_units
from tests.support.mimo import relative_error
from tests.support.own_process import ROOT, fathom
from tests.support.tiny_run import RECIPE

DEVICE = torch_xla.device()
VARIABLE = "FATHOM_XLA_SCAN_LAYERS"


def passes(model: HybridLM) -> dict[str, Tensor]:
    """Loss and every gradient of two rows of packed documents."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (2, 20), generator=generator)
    bounds = torch.tensor([0, 10, 20, 27, 40], dtype=torch.int32)
    model.zero_grad()
    loss = model.loss(tokens.to(DEVICE), tokens.roll(-1, 1).to(DEVICE), cu_seqlens=bounds).loss
    loss.backward()
    torch_xla.sync()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": loss.detach().cpu()}


def test_the_loop_equals_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in the middle of a stack: the loss, and the gradient of every parameter."""
    config = ModelConfig.parse({**preset("cpu_tiny").model_dump(), "pattern": "-MM-"})
    model = HybridLM(config, activation_checkpointing="block")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.to(DEVICE)
    want = passes(model)
    looped = []
    through = scan_layers.run_as_loop
    monkeypatch.setattr(scan_layers, "value_of", lambda _gate: "runs")
    monkeypatch.setattr("libs.model.hybrid.run_as_loop", lambda *given: looped.append(given[1]) or through(*given))
    got = passes(model)
    assert looped == [Run(start=1, unit=1, repeats=2)]
    assert got.keys() == want.keys() == {"loss", *dict(model.named_parameters())}
    for name, u in want.items():
        assert u.abs().max() > 0
        assert relative_error(got[name], u) <= 1e-5, name


class Layer(nn.Module):
    """x * weight, through a kernel of nobody's if asked."""

    def __init__(self, *, kernel: bool) -> None:
        super().__init__()
        self.weight, self.kernel = nn.Parameter(torch.ones(8)), kernel

    def forward(self, x: Tensor, context: None) -> Tensor:
        if self.kernel:
            (x,) = torch_xla._XLAC._xla_tpu_custom_call([x], "kernel", [list(x.shape)], [x.dtype])
        return x * self.weight


def test_a_stack_with_a_custom_call_is_refused() -> None:
    x, run = torch.ones(2, 8).to(DEVICE), Run(0, 1, 2)
    stack = [Layer(kernel=True).to(DEVICE) for _ in range(2)]
    with pytest.raises(NotLoopable, match="tpu_custom_call"):
        run_units(stack, run, x, (), lambda _: None, "scan")
    plain = [Layer(kernel=False).to(DEVICE) for _ in range(2)]
    assert run_units(plain, run, x, (), lambda _: None, "scan").cpu().equal(torch.ones(2, 8))


def recipe(corpus: Path, folder: Path, pattern: str) -> Path:
    text = RECIPE.format(data=corpus).replace('preset = "cpu_tiny"', f'preset = "cpu_tiny"\npattern = "{pattern}"')
    path = folder / "tiny.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("value", "pattern", "checkpointing", "said"),
    [
        ("on", "M-*-", "block", "layer 2, kind: <LayerKind.ATTENTION: '*'>, but <LayerKind.MAMBA: 'M'> in layer 0"),
        ("runs", "M-*", "block", "the stack has none"),
        ("on", "M-M-", "none", "needs activation_checkpointing = block"),
    ],
)
def test_a_run_that_cannot_loop_is_refused_with_the_reason(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    value: str, pattern: str, checkpointing: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(VARIABLE, value)
    words = ["--train.device", "xla", "--train.activation_checkpointing", checkpointing]
    words += ["--recipe", str(recipe(corpus, tmp_path, pattern)), "--run-dir", str(tmp_path / "run")]
    assert run_entry(main, words) == ExitStatus.GATE_REFUSED
    assert said in capsys.readouterr().err


def curve(corpus: Path, folder: Path, gate: str, *words: str) -> list[float]:
    """Losses and gradient norms of a few steps, in a process of its own."""
    folder.mkdir()
    settings = ["--train.steps", "3", "--schedule.warmup_steps", "1", "--schedule.decay_steps", "1"]
    settings += ["--data.windows_per_batch", "4", "--train.eval_every", "100", *words]
    given = ("--recipe", recipe(corpus, folder, "M-M-"), *settings, "--run-dir", folder / "run")
    status, _, err = fathom(ROOT, "train", *given, **{VARIABLE: gate})
    assert status == 0, err[-3000:]
    events = list(read_events(folder / "run"))
    exposed = {event["gate"]: event["value"] for event in events if event["event"] == "gate.exposed"}
    assert exposed.get("xla_scan_layers", "off") == gate
    steps = [event for event in events if event["event"] == "train.step"]
    return [float(step[name]) for step in steps for name in ("loss", "grad_norm")]


@pytest.fixture(scope="module")
def torch_lane(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return curve(corpus, tmp_path_factory.mktemp("one") / "cpu", "off", "--train.device", "cpu")


@pytest.mark.parametrize("mesh", [("--xla.fsdp", "2"), ("--xla.data", "2", "--xla.tensor", "2")])
@pytest.mark.slow
def test_a_looped_stack_trains_as_the_torch_lane_does(
    corpus: Path, tmp_path: Path, torch_lane: list[float], mesh: tuple[str, ...]
) -> None:
    words = ("--train.device", "xla", "--strict-compile", "--train.activation_checkpointing", "block")
    assert curve(corpus, tmp_path / "xla", "on", *words, *mesh) == pytest.approx(torch_lane, rel=2e-4)
