"""What the documents say of the code is what the code says: every block that `fathom docs` makes is current."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from apps.docs.__main__ import BLOCKS, main
from apps.docs.blocks import COMMAND, marks, stale
from libs.flags.errors import ExitStatus

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_the_block_is_current(block: object) -> None:
    assert [str(path) for path in stale([block], ROOT)] == [], f"renew it: {COMMAND}"  # type: ignore[list-item]


def links(path: Path) -> list[str]:
    """Targets of a document's links inside the repository, without their anchors."""
    targets = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    return [target.partition("#")[0] for target in targets if "://" not in target and not target.startswith("#")]


def test_every_link_of_a_document_leads_somewhere() -> None:
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.md"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    documents = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    assert any(links(path) for path in documents)
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in documents
        for target in links(path)
        if not (path.parent / target).exists()
    ]
    assert broken == []


def copy_of_the_documents(tmp_path: Path) -> Path:
    for file in {block.file for block in BLOCKS}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    for folder in ("infra/receipts", "infra/decisions", "infra/tpu/aot"):
        shutil.copytree(ROOT / folder, tmp_path / folder, dirs_exist_ok=True)
    return tmp_path


def test_an_edit_of_any_block_is_seen_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = copy_of_the_documents(tmp_path)
    for block in BLOCKS:
        path = root / block.file
        text = path.read_text(encoding="utf-8")
        start, end = (text.index(mark) for mark in marks(block.name))
        digit = next(i for i in range(end - 1, start, -1) if text[i].isdigit())
        path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :], encoding="utf-8")
    edited = {file: (root / file).read_text(encoding="utf-8") for file in {block.file for block in BLOCKS}}
    assert main(["--check"], root=root) == ExitStatus.FAILURE
    said = capsys.readouterr()
    assert sorted(said.out.splitlines()) == sorted(f"{file}: stale" for file in edited)
    assert f"renew them: {COMMAND}" in said.err
    assert all((root / file).read_text(encoding="utf-8") == text for file, text in edited.items())
    assert main([], root=root) == ExitStatus.OK
    for file in edited:
        assert (root / file).read_text(encoding="utf-8") == (ROOT / file).read_text(encoding="utf-8")
    assert main(["--check"], root=root) == ExitStatus.OK
