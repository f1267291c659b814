"""`fathom serve` as a process: what it prints, how it ends, and what it refuses before it starts."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from apps.eval.serve.__main__ import main
from libs.flags.errors import GateRefused, UserError
from tests.apps.eval.serve.client import Answer, ask, complete

ROOT = Path(__file__).resolve().parents[4]


def start(run_dir: Path, *options: str) -> tuple[subprocess.Popen[str], list[str], int]:
    """The process, its lines up to the address, and its port."""
    command = [sys.executable, "-m", "apps.cli", "serve", "--checkpoint", str(run_dir), "--port", "0"]
    command += ["--max-batch", "2", "--max-tokens", "128", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        found = re.search(r"at http://127\.0\.0\.1:(\d+)", line)
        if found:
            return process, lines, int(found[1])
    raise AssertionError(process.communicate()[1])


def test_it_serves_a_run_and_ends_with_zero_on_a_signal(run_dir: Path, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text("0123456789abcdef")
    process, lines, port = start(run_dir, "--token-file", str(token_file))
    try:
        assert re.match(
            r"memory plan: \d+\.\d MiB \(.*kv_blocks .*\) for 2 requests of up to 128 tokens in 4 blocks of 64",
            lines[0],
        )
        assert lines[1] == "prefix cache: off"
        assert lines[2].startswith("serving cpu_tiny (fp_")
        assert lines[2].endswith("with a bearer token")

        async def use() -> list[Answer]:
            right = {"Authorization": "Bearer 0123456789abcdef"}
            fields = {"prompt": "int main() {", "max_tokens": 8, "temperature": 0, "model": "cpu_tiny"}
            streamed = await ask(port, "/v1/completions", fields | {"stream": True}, headers=right)
            return [await ask(port, "/v1/completions", fields, headers=right), streamed, await complete(port, **fields)]

        whole, streamed, refused = asyncio.run(use())
        assert (whole.status, streamed.status, refused.status) == (200, 200, 401)
        assert whole.text == streamed.text
        assert whole.json["usage"]["prompt_tokens"] == 12
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.wait()


def test_what_cannot_be_served_is_refused_before_anything_starts(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = ["--checkpoint", str(run_dir)]
    with pytest.raises(UserError, match="no such run"):
        main(["--checkpoint", str(tmp_path / "none"), "--port", "0"])
    with pytest.raises(UserError, match="--token-file"):
        main([*checkpoint, "--host", "0.0.0.0"])
    with pytest.raises(UserError, match=r"--max-batch: .*given: 0"):
        main([*checkpoint, "--max-batch", "0"])
    with pytest.raises(UserError, match="4k or 64k"):
        main([*checkpoint, "--max-tokens", "many"])
    with pytest.raises(UserError, match="mtp_speculation"):
        main([*checkpoint, "--port", "0", "--draft-length", "2"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"cannot listen on --host 127.0.0.1 --port {port}"):
            main([*checkpoint, "--port", str(port)])
    monkeypatch.setenv("FATHOM_PREFIX_CACHE", "always")
    with pytest.raises(GateRefused, match="always"):
        main([*checkpoint, "--port", "0"])


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(UserError, match=r"needs uvicorn: .*fathom\[serve\]"):
        main(["--checkpoint", "x"])
