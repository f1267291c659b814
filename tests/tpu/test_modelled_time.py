"""What the compiler's estimate is worth: programs for one v6e chip whose operations and bytes are known by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from libs.kernels.chunk_loop import Tensors, chunk_loop
from libs.parallel.xla.aot import Argument, Compiled, compile_for, lower, placeholder
from libs.parallel.xla.topology import V6E, MeshShape, topology

N, TRIPS = 4096, 8
PRODUCT = 2 * N**3


def compiled(given: list[Tensor], made: Tensor) -> Compiled:
    arguments = [Argument(u, "given", (None,) * u.dim()) for u in given]
    return compile_for(lower(arguments, [made], MeshShape()), topology("v6e-1"))


def modelled_seconds(found: Compiled) -> float:
    return found.modelled.cycles / V6E.clock


@pytest.fixture(scope="module")
def product() -> Compiled:
    a, b = (placeholder((N, N), torch.bfloat16) for _ in range(2))
    return compiled([a, b], a @ b)


def test_a_large_product_is_modelled_near_the_peak(product: Compiled) -> None:
    """137 GFLOP are 0.150 ms at 918 TFLOP/s; the compiler expects 0.172."""
    assert product.counted.flops == PRODUCT == product.flops
    assert product.counted.hbm_bytes == 3 * N * N * 2
    assert product.counted.seconds(V6E) == PRODUCT / V6E.peak_bf16
    assert 1.0 <= modelled_seconds(product) / product.counted.seconds(V6E) <= 1.3


def test_a_loop_counts_as_often_as_it_runs(product: Compiled) -> None:
    """XLA's own count has a loop's body once. Beside the product the loop copies its state inside the chip, which is
    estimated at more than the product."""
    a, b = (placeholder((N, N), torch.bfloat16) for _ in range(2))
    numbers = placeholder((TRIPS,), torch.int32)

    def body(constants: Tensors, carry: Tensors, x: Tensors) -> tuple[Tensors, Tensors]:
        return (carry[0] @ constants[0],), ()

    with torch.no_grad():
        (last,), _ = chunk_loop(body, (b,), (a,), (numbers,), "scan")
    found = compiled([a, b, numbers], last)
    assert [loop.trips for loop in found.modelled.loops] == [TRIPS]
    assert found.modelled.unknown == ()
    assert found.counted.flops == TRIPS * PRODUCT
    assert found.flops < 1.1 * PRODUCT
    assert found.modelled.cycles == pytest.approx(TRIPS * found.modelled.loops[0].cycles, rel=0.2)
    assert 0.9 <= modelled_seconds(found) / (TRIPS * modelled_seconds(product)) <= 2.3


def test_streaming_is_modelled_near_the_data_sheet() -> None:
    """128 MiB read and as much written: 0.164 ms at 1,638 GB/s; the compiler expects 0.203."""
    size = (2**15, 2**10)
    a = placeholder(size, torch.float32)
    found = compiled([a], a * 2 + 1)
    assert found.counted.flops == 0
    assert found.counted.hbm_bytes == pytest.approx(2 * 2**27, rel=1e-6)
    assert found.counted.seconds(V6E) == pytest.approx(2 * 2**27 / V6E.bandwidth, rel=1e-6)
    assert 1.0 <= modelled_seconds(found) / found.counted.seconds(V6E) <= 1.6
