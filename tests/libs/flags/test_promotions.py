"""A gate rises by a receipt and by nothing else; what was written down is what the catalogue then says."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from libs.flags import cli, promotions
from libs.flags.catalog import CATALOG
from libs.flags.errors import UserError, run_entry
from libs.flags.promotions import Promotion, promote, raised, read_promotions
from libs.flags.registry import GateSpec, Kind, Stage, build_catalog
from tests.libs.flags.receipts import receipt, write

ROOT = Path(__file__).resolve().parents[3]
MakeSpec = Callable[..., GateSpec]
STAGES = ("off", "python_precompute", "gmem_pool", "bwd_fwd_reuse")


@pytest.fixture
def psiv(spec: MakeSpec) -> GateSpec:
    return spec("psiv_cache", kind=Kind.STAGES, values=STAGES, value_stages={"bwd_fwd_reuse": "scaffold"})


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "promotions.json"
    path.write_text('{"format": 1, "promotions": []}')
    return path


def test_a_value_rises_and_the_others_stay(psiv: GateSpec, file: Path, tmp_path: Path) -> None:
    path = write(receipt(), tmp_path)
    done = promote(psiv, None, path, root=tmp_path, file=file)
    assert (done.gate, done.value) == ("psiv_cache", "gmem_pool")
    (risen,) = raised([psiv], read_promotions(file))
    assert risen.stage is Stage.MEASURED
    assert {value: risen.stage_of(value) for value in STAGES[1:]} == {
        "python_precompute": Stage.EXPERIMENTAL,
        "gmem_pool": Stage.MEASURED,
        "bwd_fwd_reuse": Stage.SCAFFOLD,
    }
    assert risen.evidence == ("infra/receipts/2026-01-02_step_psiv_cache_box/receipt.json",)
    assert risen.default == "off"
    assert risen.preconditions == psiv.preconditions
    assert build_catalog([risen])["psiv_cache"].spec_hash != psiv.spec_hash
    with pytest.raises(UserError, match="it has risen already"):
        promote(risen, None, path, root=tmp_path, file=file)


def test_a_second_value_of_the_same_gate(psiv: GateSpec, file: Path, tmp_path: Path) -> None:
    promote(psiv, None, write(receipt(), tmp_path), root=tmp_path, file=file)
    other = write(receipt(comparison={"value": "python_precompute"}), tmp_path, "2026-01-03_step_psiv_cache_box")
    promote(psiv, "python_precompute", other, root=tmp_path, file=file)
    (risen,) = raised([psiv], read_promotions(file))
    assert len(risen.evidence) == 2
    assert risen.stage_of("python_precompute") is Stage.MEASURED


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"comparison": {"scope": "forward"}}, "a gain that does not move the whole step is no gain"),
        ({"decision": {"value": "noise"}}, "not kept"),
        ({"comparison": {"value": "bwd_fwd_reuse"}}, "is scaffold and does not rise by a receipt"),
        ({"comparison": {"value": "no_such_stage"}}, "unknown value of psiv_cache"),
    ],
)
def test_refusals_write_nothing(
    psiv: GateSpec, file: Path, tmp_path: Path, changed: dict[str, object], said: str
) -> None:
    before = file.read_bytes()
    with pytest.raises(UserError, match=said):
        promote(psiv, None, write(receipt(**changed), tmp_path), root=tmp_path, file=file)
    assert file.read_bytes() == before


def test_a_receipt_elsewhere_is_no_evidence(psiv: GateSpec, file: Path, tmp_path: Path) -> None:
    path = write(receipt(), tmp_path / "elsewhere")
    with pytest.raises(UserError, match="move its folder there first"):
        promote(psiv, None, path, root=tmp_path, file=file)


def test_a_receipt_of_another_name_and_links_that_go_round(psiv: GateSpec, file: Path, tmp_path: Path) -> None:
    path = write(receipt(), tmp_path)
    copy = path.rename(path.with_name("copy.json"))
    with pytest.raises(UserError, match=r"is not named receipt\.json"):
        promote(psiv, None, copy, root=tmp_path, file=file)
    path.symlink_to(path)
    with pytest.raises(UserError, match="cannot read the receipt"):
        promote(psiv, None, path, root=tmp_path, file=file)
    assert read_promotions(file) == ()


def test_promotions_at_the_same_time_are_all_kept(
    psiv: GateSpec, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits, with what it has read, for as long as the other could write."""
    first = write(receipt(), tmp_path)
    second = write(receipt(comparison={"value": "python_precompute"}), tmp_path, "2026-01-03_step_psiv_cache_box")
    reading = threading.Barrier(2)

    def read(path: Path) -> tuple[Promotion, ...]:
        found = read_promotions(path)
        with contextlib.suppress(threading.BrokenBarrierError):
            reading.wait(0.3)
        return found

    monkeypatch.setattr(promotions, "read_promotions", read)
    work = [
        threading.Thread(target=promote, args=(psiv, None, path), kwargs={"root": tmp_path, "file": file})
        for path in (first, second)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert {row.value for row in read_promotions(file)} == {"gmem_pool", "python_precompute"}


def test_the_program_refuses_a_forward_gain(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(spec: GateSpec, value: str | None, path: Path) -> Promotion:
        return promote(spec, value, path, root=tmp_path, file=file)

    monkeypatch.setattr(cli, "promote", here)
    forward = write(receipt(comparison={"scope": "forward"}), tmp_path)
    assert run_entry(cli.main_flags, ["promote", "psiv_cache", "--receipt", str(forward)]) == 2
    assert "it times forward alone" in capsys.readouterr().err
    assert run_entry(cli.main_flags, ["promote", "psvi_cache", "--receipt", str(forward)]) == 2
    whole = write(receipt(), tmp_path, "2026-01-03_step_psiv_cache_box")
    assert run_entry(cli.main_flags, ["promote", "psiv_cache=gmem_pool", "--receipt", str(whole)]) == 0
    assert "is measured" in capsys.readouterr().out
    assert read_promotions(file)[0].value == "gmem_pool"


def _promotion(gate: str, value: str) -> Promotion:
    return Promotion(gate=gate, value=value, receipt="infra/receipts/x/receipt.json", sha256="0" * 64)


@pytest.mark.parametrize(
    ("gate", "value", "said"),
    [
        ("nothing", "on", "not in the catalogue"),
        ("psiv_cache", "bwd_fwd_reuse", "only experimental ones rise"),
        ("psiv_cache", "faster", "no value: only"),
    ],
)
def test_a_row_that_does_not_fit_stops_the_program(psiv: GateSpec, gate: str, value: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        raised([psiv], [_promotion(gate, value)])


def test_evidence_of_a_gate_that_rose_further_is_kept(spec: MakeSpec) -> None:
    """A default is changed by hand; the receipt stays among the evidence, once."""
    path = "infra/receipts/x/receipt.json"
    on = spec("alpha", stage="default_on", default="on", evidence=(path,))
    (same,) = raised([on], [_promotion("alpha", "on")])
    assert (same.stage, same.evidence) == (Stage.DEFAULT_ON, (path,))


@pytest.mark.parametrize("content", ["", "{}x", '{"format": 2, "promotions": []}', '{"promotions": [{"gate": "tma"}]}'])
def test_a_damaged_file_stops_the_program(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError, match="damaged"):
        read_promotions(file)
    file.unlink()
    with pytest.raises(UserError, match="part of the program"):
        read_promotions(file)


@pytest.mark.parametrize("words", [["flags", "list"], ["flags", "status", "--json"], ["doctor"], ["bench", "--help"]])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("<<<<<<< HEAD\n", "promotions.json is damaged: Invalid JSON"),
        (f'{{"promotions": [{_promotion("nothing", "on").model_dump_json()}]}}', "not in the catalogue"),
    ],
)
def test_every_command_says_that_the_file_is_damaged(tmp_path: Path, words: list[str], content: str, said: str) -> None:
    """Of a checkout in which a merge was left unfinished. What needs no gate still answers."""
    for name in ("apps", "libs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "libs" / "flags" / "promotions.json").write_text(content)
    command = [sys.executable, "-m", "apps.cli", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    if "--help" in words:
        assert done.returncode == 0, done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")
        assert said in done.stderr


def test_the_shipped_file_is_what_the_catalogue_says() -> None:
    promoted = {(p.gate, p.value) for p in read_promotions()}
    measured = {(s.name, v) for s in CATALOG.values() for v in s.values[1:] if s.stage_of(v) is Stage.MEASURED}
    assert promoted == measured
    assert json.loads((Path(cli.__file__).parent / "promotions.json").read_text())["format"] == 1
