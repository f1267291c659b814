"""What the backends offer to the gates, read from the kernels: also from kernels that were changed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from libs.flags.errors import GateRefused, UserError
from libs.flags.facts import Facts
from libs.flags.resolve import resolve
from libs.kernels.mimo.capabilities import HOPPER, NOTHING, Capabilities, Geometry, capabilities, shared_rank
from libs.kernels.mimo.sm90 import bwd_bwd, kernel_set
from libs.kernels.mimo.sm90.dialect import CudaDialect
from libs.kernels.mimo.sm90.fwd import make_forward
from libs.kernels.mimo.sm90.gates import KernelGates
from libs.kernels.mimo.sm90.inspect import tma_ranks
from libs.kernels.mimo.sm90.launch import compile_cuda
from libs.kernels.mimo.sm90.spec import ScanSpec
from libs.kernels.mimo.sm90.tiles import TileShape

ROOT = Path(__file__).resolve().parents[5]
REFERENCE = Geometry(H=16, G=1, R=4, N=64, P=64, C=16, divisor=4, norm=False)
STAGES = ("python_precompute", "gmem_pool", "bwd_fwd_reuse", "bwd_bwd_reuse")


def _facts(offers: Capabilities, backend: str = HOPPER) -> Facts:
    """An H200 on which `backend` is chosen."""
    return Facts(
        device="cuda", device_name="H200", compute_capability=(9, 0), multiprocessors=132, batch_heads=16,
        free_memory_bytes=10**12, packages={"tilelang": "0.1.15"}, mimo_backend=backend, psiv_bytes_per_layer=64 << 20,
        n_mamba_layers=24, psiv_stages=offers.psiv_stages, two_d_kernels=offers.two_d_kernels,
        split_scan_kernels=offers.split_kernels,
    )  # fmt: skip


@pytest.fixture(scope="module")
def offers() -> Capabilities:
    return capabilities(HOPPER, REFERENCE)


def test_the_hopper_kernels_offer_everything(offers: Capabilities) -> None:
    assert offers == Capabilities(STAGES, ("fwd", "bwd_fwd", "bwd_bwd"), True)
    asked = {"FATHOM_TMA": "all", "FATHOM_WARP_SPECIALIZATION": "all", "FATHOM_SPLIT_SCAN": "auto"}
    gates = resolve(asked | {"FATHOM_PSIV_CACHE": "bwd_bwd_reuse"}, _facts(offers))
    assert [gates.is_enabled(gate) for gate in ("tma", "warp_specialization", "split_scan", "psiv_cache")] == [True] * 4


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_the_torch_backends_offer_nothing(backend: str) -> None:
    assert capabilities(backend, REFERENCE) == NOTHING
    for variable, value, said in (
        ("FATHOM_TMA", "fwd", f"scan backend {backend} has no kernel with rank-2 shared tiles"),
        ("FATHOM_PSIV_CACHE", "gmem_pool", f"scan backend {backend} has no stage gmem_pool; the stages it has: none"),
        ("FATHOM_SPLIT_SCAN", "auto", f"scan backend {backend} has no split-scan kernels"),
    ):
        with pytest.raises(GateRefused) as caught:
            resolve({variable: value}, _facts(NOTHING, backend))
        assert said in str(caught.value)


def test_a_shape_outside_the_table_is_refused() -> None:
    with pytest.raises(UserError, match=r"N=96, P=64, R=4, C=16; nearest: .*mimo_backend=chunked"):
        capabilities(HOPPER, REFERENCE._replace(N=96))


# Keys as upstream has them, (tokens, ranks, state), through a tile of three dimensions.
RANK_3 = (
    ("bwd_inputs(spec) | bwd_outputs", 'bwd_inputs(spec) | {"k": (True, (B, spec.S, R, G, N))} | bwd_outputs'),
    ("            v_sh = T.alloc", "            k3_sh = T.alloc_shared((C, R, N), T.bf16)\n            v_sh = T.alloc"),
    (
        "T.load(k[bb, t0 * R : t0 * R + F, bh // heads_per_group, 0:N], k_sh)",
        "T.load(k[bb, t0 : t0 + C, 0:R, bh // heads_per_group, 0:N], k3_sh)\n"
        "                for i, n in T.Parallel(F, N):\n"
        "                    k_sh[i, n] = k3_sh[i // R, i % R, n]",
    ),
)


@pytest.fixture(scope="module")
def rank_3(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`bwd_bwd` with its keys forced back to a rank-3 tile. TileLang reads sources from files."""
    source = Path(str(bwd_bwd.__file__)).read_text()
    for old, new in RANK_3:
        assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
        source = source.replace(old, new)
    path = tmp_path_factory.mktemp("rank3") / "bwd_bwd_rank3.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    changed: Callable[..., Any] = module.bwd_bwd
    return changed


def test_tma_for_all_is_refused_when_one_kernel_has_a_rank_3_tile(
    monkeypatch: pytest.MonkeyPatch, rank_3: Callable[..., Any]
) -> None:
    monkeypatch.setitem(kernel_set.MAKE, "bwd_bwd", rank_3)
    found = capabilities(HOPPER, REFERENCE)
    assert found.two_d_kernels == ("fwd", "bwd_fwd")
    with pytest.raises(GateRefused) as caught:
        resolve({"FATHOM_TMA": "all"}, _facts(found))
    assert "needs rank-2 shared tiles, which these kernels of tilelang lack: bwd_bwd" in str(caught.value)
    assert resolve({"FATHOM_TMA": "fwd"}, _facts(found)).value("tma") == "fwd"


@pytest.mark.slow
def test_a_rank_3_tile_is_what_the_compiler_makes_a_rank_3_box_of(rank_3: Callable[..., Any]) -> None:
    """What is read from the traced kernel is what TMA is told."""
    problem = kernel_set.Problem(TileShape(64, 64, 4, 16), 1, 32, 16, 4, 1)
    gates = KernelGates(tma="all", warp_specialization="all")
    func, dialect = kernel_set.traced("bwd_bwd", gates, problem)
    assert shared_rank(func) == 2
    assert set(tma_ranks(dialect.lower(func))) == {2}
    changed = rank_3(dialect, kernel_set.spec_of("bwd_bwd", gates, problem))
    assert shared_rank(changed) == 3
    assert 3 in tma_ranks(dialect.lower(changed))


@pytest.mark.slow
def test_a_kernel_that_asks_for_too_much_shared_memory_is_refused() -> None:
    """Lowering, nvcc and ptxas let it through; the way to every launch does not."""
    dialect = CudaDialect("ws")
    func = make_forward(dialect, ScanSpec(1, 128, 16, 1, 4, 64, 64, 16, stages=8))
    with pytest.raises(UserError, match=r"fwd needs 2\d{5} bytes of shared memory a block, Hopper has 232448"):
        compile_cuda(func, dialect, "fwd")


def test_tilelang_is_imported_only_for_the_hopper_backend() -> None:
    """What a CPU run imports and asks for must work where TileLang is not installed."""
    code = (
        "import sys, torch\n"
        "from libs.kernels.mimo.capabilities import Geometry, capabilities, compiled_kernels\n"
        "from libs.kernels.mimo.selftest import gates_in_force, self_test\n"
        "shape = Geometry(2, 1, 1, 8, 8, 4, 4, False)\n"
        "self_test(shape, 'chunked', torch.device('cpu'), torch.float32, gates_in_force('chunked'))\n"
        "print(capabilities('chunked', shape)[0], compiled_kernels('chunked'), 'tilelang' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "() () False", done.stderr
