"""Tests of the XLA lane: they need its environment (`make test-tpu`), so `make test` leaves them out and says so."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

HAVE_XLA = importlib.util.find_spec("torch_xla") is not None
collect_ignore_glob = [] if HAVE_XLA else ["test_*.py"]

if HAVE_XLA:
    from libs.flags.environment import choose_xla_platform, compile_without_a_tpu

    # Both before torch_xla and jax are imported: this process has one device, and compiles for one chip besides.
    choose_xla_platform("CPU", 1)
    compile_without_a_tpu()


def pytest_report_header() -> str:
    return "" if HAVE_XLA else "tests/tpu is left out: torch_xla is not installed here (make test-tpu)"


@pytest.fixture(scope="session", autouse=True)
def _no_gates() -> Iterator[None]:
    """No FATHOM_ variables from outside, and every gate off, as in a program that asks for none."""
    from libs.flags import Facts, install, resolve

    for name in [name for name in os.environ if name.upper().startswith("FATHOM_")]:
        del os.environ[name]
    install(resolve({}, Facts(device="xla", mimo_backend="xla")))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory, bytes as tokens."""
    from tests.support.tiny_run import build_corpus

    return build_corpus(tmp_path_factory.mktemp("corpus"))
