"""Every receipt in the tree keeps the schema: its checks are green, its summaries follow from its samples, and its
folder is named after it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from apps.eval.bench.comm import CommReceipt
from apps.eval.bench.crossover import CrossoverReceipt
from apps.eval.bench.decode import DecodeReceipt
from apps.eval.bench.loss_side import LossSideReceipt
from apps.eval.bench.prefix import PrefixReceipt
from apps.eval.bench.psiv import PsivReceipt
from apps.eval.bench.receipt import FILE_NAME, Receipt
from apps.eval.bench.train_step import StepReceipt

ROOT = Path(__file__).resolve().parents[2]
RECEIPTS = ROOT / "infra" / "receipts"
# Subjects whose receipts say more than the common schema.
SCHEMAS: dict[str, type[Receipt]] = {
    "comm": CommReceipt,
    "crossover": CrossoverReceipt,
    "decode": DecodeReceipt,
    "loss_side": LossSideReceipt,
    "prefix": PrefixReceipt,
    "psiv": PsivReceipt,
    "step": StepReceipt,
}
FOLDERS = sorted(path for path in RECEIPTS.glob("*") if path.is_dir())


def check_folder(folder: Path) -> None:
    """AssertionError or pydantic.ValidationError when the folder holds no valid receipt of its own name."""
    text = (folder / FILE_NAME).read_text(encoding="utf-8")
    schema = SCHEMAS.get(json.loads(text)["subject"], Receipt)
    receipt = schema.model_validate_json(text)
    assert re.fullmatch(re.escape(receipt.directory_name()) + r"(_\d+)?", folder.name), folder.name
    assert receipt.code.git_commit is not None, "a receipt names the commit that it measured"


def test_receipts_keep_the_schema() -> None:
    for folder in FOLDERS:
        check_folder(folder)


def test_nothing_else_lies_among_the_receipts() -> None:
    strays = [path.name for path in RECEIPTS.glob("*") if not path.is_dir() and path.name != "README.md"]
    assert strays == []
    assert [folder.name for folder in FOLDERS if not (folder / FILE_NAME).is_file()] == []


def test_the_rule_sees_what_it_forbids(tmp_path: Path, valid_receipt: dict[str, object]) -> None:
    def folder(name: str, **changed: object) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / FILE_NAME).write_text(json.dumps(valid_receipt | changed))
        return path

    name = "2026-01-02_ops_box"
    check_folder(folder(name))
    check_folder(folder(f"{name}_2"))
    with pytest.raises(AssertionError):
        check_folder(folder("2026-01-03_ops_box"))
    check = {"name": "output", "error": 2.0, "tolerance": 1.0, "passed": True}
    with pytest.raises(ValidationError, match="green correctness gate"):
        check_folder(folder(f"{name}_3", correctness=[check]))
    cuda = dict(valid_receipt["hardware"], device="cuda")  # type: ignore[call-overload]
    with pytest.raises(ValidationError, match="a CUDA receipt names its GPU"):
        check_folder(folder(f"{name}_4", hardware=cuda))


@pytest.fixture
def valid_receipt() -> dict[str, object]:
    return {
        "what": "a test", "subject": "ops", "created": "2026-01-02T03:04:05.000000Z", "command": ["fathom"],
        "code": {
            "version": "0", "git_commit": "0" * 40, "git_dirty": False, "git_dirty_hash": None, "git_reason": None,
        },
        "config": {}, "config_hash": "0", "gates_hash": "0", "gates": {},
        "hardware": {
            "machine": "Box", "device": "cpu", "cpu": "x", "cpu_count": 1, "cpu_affinity": 1, "threads": 1,
            "memory_bytes": 1, "load_before": 0.0,
        },
        "versions": {}, "correctness": [{"name": "output", "error": 0.0, "tolerance": 1.0, "passed": True}],
        "contenders": [
            {"name": "op", "what": "op", "samples_s": [1.0], "n": 1, "mean_s": 1.0, "std_s": None, "min_s": 1.0,
             "flops": None, "warm_up": True},
        ],
        "ratios": [], "memory": [], "aims": [], "left_out": [], "notes": [],
        "decision": {"value": "record", "reason": "a test"},
    }  # fmt: skip
