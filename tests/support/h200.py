"""What `libs.parallel.fp8_probe.probe` would say on H200 with transformer-engine, and with neither."""

from __future__ import annotations

from libs.parallel.fp8_probe import Environment

H200 = Environment(
    cuda=True,
    hip=False,
    device_name="NVIDIA H200",
    capability=(9, 0),
    toolkit=(13, 0),
    cudnn=(9, 20),
    te_versions={"transformer-engine": "2.11.0", "transformer-engine-torch": "2.11.0"},
    te_error=None,
    te_recipes={},
    megatron_has_te=True,
    te_adam=True,
    max_connections="1",
)
BARE = Environment(False, False, None, None, None, None, {}, "ImportError: no", {}, False, False, None)
