"""House rules that a linter does not know. Layers and import rules are `lint-imports`, in `make check`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from libs.flags import CATALOG

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(p for top in ("apps", "libs") for p in (ROOT / top).rglob("*.py"))
MAX_LINES = 400


def _lines_matching(pattern: str, files: list[Path]) -> list[str]:
    compiled = re.compile(pattern)
    found = []
    for path in files:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if compiled.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    return found


def _committed() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_only_flags_reads_the_process_environment() -> None:
    outside = [p for p in SHIPPED if "flags" not in p.relative_to(ROOT).parts[:2]]
    assert _lines_matching(r"os\.environ|os\.getenv|\bgetenv\(", outside) == []


def test_no_mocks_in_shipped_code() -> None:
    assert _lines_matching(r"unittest\.mock|MagicMock", SHIPPED) == []


def test_a_handler_for_every_error_raises_again() -> None:
    """`except BaseException:` may clean up; it may not swallow."""
    swallowed = []
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            broad = node.type is None or ast.unparse(node.type) in ("Exception", "BaseException")
            if broad and not isinstance(node.body[-1], ast.Raise):
                swallowed.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert swallowed == []


def test_nothing_unfinished_in_shipped_code() -> None:
    assert _lines_matching(r"\b(TODO|FIXME|XXX)\b|NotImplementedError|pragma: no cover", SHIPPED) == []


# The places that may import an optional framework when they are themselves imported.
HOMES = {
    "tilelang": ("libs/kernels/mimo/sm90/",),
    "torch_xla": ("libs/kernels/attention/pallas/", "libs/kernels/mimo/xla/", "libs/parallel/xla/"),
    "jax": ("libs/kernels/attention/pallas/", "libs/parallel/xla/"),
}


def test_optional_frameworks_are_imported_where_they_are_used() -> None:
    """At module level only inside the backend that needs them."""
    optional = r"^(import|from) (tilelang|transformer_engine|liger_kernel|torch_xla|jax|wandb)\b"
    found = _lines_matching(optional, SHIPPED)
    strays = [
        line
        for line in found
        if not any(line.startswith(homes) and f" {name}" in line for name, homes in HOMES.items())
    ]
    assert strays == []


def test_programs_start_without_optional_frameworks() -> None:
    """A machine that trains on a CPU needs none of them, and pays for none of them."""
    program = (
        "import sys, apps.cli, apps.train.attempt, apps.eval.run\n"
        "names = {'tilelang', 'transformer_engine', 'liger_kernel', 'torch_xla', 'jax', 'wandb'}\n"
        "print(*sorted(names & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_say_what_they_are_for_and_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "a module begins with its docstring: what it is for and what not"
    assert len(text.splitlines()) <= MAX_LINES


def test_records_named_by_gates_exist() -> None:
    for gate in CATALOG.values():
        for path in (*gate.evidence, *([gate.decision] if gate.decision else [])):
            assert (ROOT / path).is_file(), f"{gate.name}: {path} is missing"


def test_no_path_of_a_private_machine_is_committed() -> None:
    private = re.compile(r"(?<![\w.])/(root|home/\w+|work|tmp)/")
    found = []
    for path in _committed():
        if path.suffix in {".png", ".svg", ".gz"} or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if private.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    assert found == []
