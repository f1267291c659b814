"""What the blocks are made of, against the things themselves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from apps.cli import COMMANDS
from apps.docs.commands import cli_reference
from apps.docs.gates import gate_table
from apps.docs.parsers import PARSERS
from apps.docs.recipes import recipe_table
from apps.docs.records import decision_table
from apps.docs.steps import RECORDS, step_table
from apps.train.origins import recipe_layer, recipe_names, resolve_config
from libs.flags.catalog import CATALOG
from libs.flags.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def rows(text: str) -> dict[str, list[str]]:
    """First cell -> the cells behind it."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first.strip("`"): rest for first, *rest in cells}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of a parser and of its subcommands, but --help."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(options(inner) for inner in action.choices.values()))
        found.update(action.option_strings)
    return found - {"-h", "--help"}


def test_every_gate_has_its_row() -> None:
    found = rows(gate_table(ROOT))
    assert set(CATALOG) <= found.keys()
    assert found["cute_dsl"][7] == "retired: infra/decisions/0003-cute-dsl-not-carried.md"
    assert found["warp_specialization"][7].endswith("tma fwd or all (fwd); tma all (all)")


def test_a_recipe_is_what_is_planned() -> None:
    found = rows(recipe_table(ROOT))
    assert set(recipe_names()) <= found.keys()
    assert found["cpu_demo"][2:] == ["1,024", "2,048", "cpu, fp32", "one process"]
    assert found["cpu_demo_tp2"][0] == "cpu_demo (mixer.ngroups, attention.kv_heads)"
    assert found["h200_8x_bf16"][3:] == ["65,536", "NVIDIA H200, bf16", "dp=1 cp=1 tp=8"]
    assert found["v6e_4k_dense"][5] == "data=1 fsdp=4 tensor=1"


def test_every_command_and_option_is_in_the_reference() -> None:
    chapters = dict(part.split("\n", 1) for part in cli_reference(ROOT).split("\n## fathom ")[1:])
    assert list(chapters) == list(COMMANDS)
    for name, parsers in PARSERS.items():
        for option in set().union(*(options(build()) for build in parsers)):
            assert f"`{option}" in chapters[name], f"{name} {option}"


def test_what_argparse_knows_and_the_help_does_not_tell() -> None:
    text = cli_reference(ROOT)
    assert "    fathom flags promote GATE[=VALUE] --receipt PATH [OPTION ...]\n" in text
    assert "    fathom report compare RUN [RUN ...] [OPTION ...]\n" in text
    assert "| `--receipt PATH` | required; infra/receipts/.../receipt.json |" in text
    assert "| `--split {train,valid}` | of the example (default: train) |" in text
    assert "| `--max-new-tokens MAX_NEW_TOKENS` | (default: 128) |" in text
    assert "<time>" not in text, "a browser would take it for a tag"


def test_records_are_listed_by_their_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "infra" / "decisions"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("# Decisions\n")
    (folder / "0002-b.md").write_text("# 0002: Second | or not\n\nText\n")
    (folder / "0001-a.md").write_text("# 0001: First\n")
    assert decision_table(tmp_path).splitlines()[2:] == [
        "| [0001](0001-a.md) | First |",
        "| [0002](0002-b.md) | Second \\| or not |",
    ]
    (folder / "0002-c.md").write_text("# 0002: Third\n")
    with pytest.raises(UserError, match="0002 is taken"):
        decision_table(tmp_path)
    (folder / "0002-c.md").write_text("# 0003: Third\n")
    with pytest.raises(UserError, match="the same number"):
        decision_table(tmp_path)
    (folder / "0002-c.md").write_bytes(b"# 0003: Caf\xe9\n")
    with pytest.raises(UserError, match=r"0002-c\.md is not UTF-8"):
        decision_table(tmp_path)


def test_steps_for_a_slice_are_those_that_were_compiled(tmp_path: Path) -> None:
    """Each with the command that makes it; nothing of least effort, of changed code, or that did not fit."""
    names = [f"v6e_{length}_{model}" for length in ("4k", "16k", "64k") for model in ("dense", "hybrid")]
    lines = step_table(ROOT).splitlines()[2:]
    for name in names:
        (line,) = (line for line in lines if f"`fathom train --recipe {name} --aot v6e-4`" in line)
        record = json.loads((ROOT / RECORDS / f"{name}_v6e-4_full.json").read_text())
        assert f" {record['modelled_seconds']:.2f} s " in line
        assert f" {record['peak_bytes_per_chip'] / 2**30:.2f} " in line
        assert record["config_hash"] == resolve_config([recipe_layer(name)]).config.hash(), (
            "the recipe has changed since"
        )
    folder = tmp_path / RECORDS
    folder.mkdir(parents=True)
    for wrong in ({"effort": "quick"}, {"git_dirty": True}, {"git_dirty": None}, {"effort": None}):
        (folder / "step.json").write_text(json.dumps(record | wrong))
        with pytest.raises(UserError, match=r"step\.json: only a step that compiled with full effort"):
            step_table(tmp_path)
    (folder / "step.json").write_text(json.dumps({key: u for key, u in record.items() if key != "compiled"}))
    with pytest.raises(UserError, match="full effort"):
        step_table(tmp_path)
    (folder / "step.json").write_text("{}")
    with pytest.raises(UserError, match="no record of `fathom train --aot`: KeyError"):
        step_table(tmp_path)
