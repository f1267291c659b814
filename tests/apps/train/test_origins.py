"""Layers of settings: who wins, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.train.arguments import parse_arguments
from apps.train.config import TrainConfig
from apps.train.origins import (
    command_line_layer,
    describe,
    environment_layer,
    file_layer,
    flat_values,
    leaves,
    recipe_layer,
    recipe_names,
    resolve_config,
    saved_layer,
)
from libs.flags.errors import UserError


def test_each_layer_wins_over_those_before_it(tmp_path: Path) -> None:
    recipe, file = tmp_path / "r.toml", tmp_path / "f.toml"
    recipe.write_text('[model]\npreset="cpu_tiny"\n[optim]\nlr=1.0\nbeta1=0.1\nbeta2=0.2\neps=1.0\n')
    file.write_text("[optim]\nlr=2.0\nbeta1=0.3\nbeta2=0.4\n")
    environment = environment_layer(
        {"FATHOM_TRAIN__OPTIM__LR": "3.0", "FATHOM_TRAIN__OPTIM__BETA1": "0.5", "FATHOM_TMA": "off"}
    )
    found = resolve_config(
        [recipe_layer(str(recipe)), file_layer(file), environment, command_line_layer(["--optim.lr=4.0"])]
    )
    optim = found.config.optim
    assert (optim.lr, optim.beta1, optim.beta2, optim.eps) == (4.0, 0.5, 0.4, 1.0)
    assert found.origins["optim.lr"] == "command line --optim.lr"
    assert found.origins["optim.beta1"] == "environment FATHOM_TRAIN__OPTIM__BETA1"
    assert found.origins["optim.beta2"] == f"file {file}"
    assert found.origins["optim.eps"] == f"recipe {recipe}"
    assert found.origins["optim.weight_decay"] == "default"
    assert found.origins["model.hidden_size"] == "preset cpu_tiny"
    assert set(found.origins) == set(flat_values(found.config))


def test_every_setting_can_be_overridden_from_the_command_line_and_the_environment() -> None:
    start = resolve_config([command_line_layer(["--model.preset", "cpu_tiny"])]).config
    values = flat_values(start)
    assert set(values) == set(leaves())
    for key, value in values.items():
        text = "none" if value is None else str(value)
        again = resolve_config(
            [command_line_layer(["--model.preset", "cpu_tiny"]), command_line_layer([f"--{key}", text])]
        )
        assert again.config == start, key
        assert again.origins[key] == f"command line --{key}"
        variable = "FATHOM_TRAIN__" + key.upper().replace(".", "__")
        layers = [command_line_layer(["--model.preset", "cpu_tiny"]), environment_layer({variable: text})]
        assert resolve_config(layers).origins[key] == f"environment {variable}"


def test_a_saved_config_comes_back_with_its_origins() -> None:
    first = resolve_config([command_line_layer(["--model.preset", "cpu_tiny_dense", "--optim.clip_norm", "none"])])
    assert first.config.model.mixer is None
    again = resolve_config([saved_layer(first.config.to_json(), first.origins)])
    assert again == first
    assert TrainConfig.model_validate(first.config.to_json()).hash() == first.config.hash()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lrr", "1"], ["optim.lrr", "did you mean 'optim.lr'"]),
        (["--optimm.lr", "1"], ["optimm.lr", "'optim.lr'"]),
        (["--model.mixer.nhead", "1"], ["model.mixer.nhead", "'model.mixer.nheads'"]),
        (["--optim", "1"], ["unknown setting 'optim'"]),
        (["--optim.lr", "fast"], ["optim.lr = 'fast'", "expected float > 0", "command line"]),
        (["--optim.lr", "-1"], ["optim.lr = '-1'", "float > 0"]),
        (["--optim.lr", "inf"], ["optim.lr", "finite"]),
        (["--train.steps", "1.5"], ["train.steps = '1.5'", "expected int >= 1"]),
        (["--train.precision", "fp16"], ["'fp16'", "'fp32', 'bf16', 'auto'"]),
        (["--train.deterministic", "maybe"], ["'maybe'", "bool"]),
        (["--train.device_memory", "lots"], ["'lots'", "ByteSize or none"]),
        (["--model.preset", "cpu_tin"], ["cpu_tin", "cpu_tiny"]),
        (["--schedule.warmup_steps", "600"], ["600", "train.steps = 500", "lower them, or give train.steps"]),
        (["--train.nonfinite", "skip"], ["nonfinite_budget"]),
        (["--optim.lr"], ["--optim.lr needs a value"]),
        (["--optim.lr", "1", "--optim.lr=2"], ["given twice"]),
        (["stray"], ["stray"]),
    ],
)
def test_a_bad_setting_is_refused_with_what_was_given_and_what_is_expected(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve_config([command_line_layer(words)])
    for part in said:
        assert part in str(caught.value)


def test_geometry_that_does_not_fit_shows_the_numbers() -> None:
    with pytest.raises(UserError) as caught:
        resolve_config([command_line_layer(["--model.preset", "cpu_tiny", "--model.hidden_size", "40"])])
    for number in ("nheads=4", "40*2/16", "hidden_size=32"):
        assert number in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[optim]\nlr = "1e-3"\n', "expected float"),
        ("[train]\nsteps = 3.0\n", "expected int"),
        ("[train]\nsteps = true\n", "expected int"),
        ("[train]\ndeterministic = 1\n", "expected bool"),
        ("[optim.lr]\nvalue = 1\n", "optim.lr.value"),
        ("optim = 3\n", "unknown setting 'optim'"),
        ("[optim\n", "not valid TOML"),
    ],
)
def test_a_file_must_have_the_types_already(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        resolve_config([file_layer(path)])


def test_unreadable_files_and_unknown_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        file_layer(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="cannot be read"):
        file_layer(tmp_path / "binary.toml")
    with pytest.raises(UserError, match="did you mean 'cpu_demo'"):
        recipe_layer("cpu_dmeo")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name: str) -> None:
    found = resolve_config([recipe_layer(name)])
    assert f"recipe {name}" in describe(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recpie", "x"], "--recipe"),
        (["--from-step", "3"], "--resume"),
        (["--accept-gate-change", "tma"], "--resume"),
        (["--resume", "r", "--recipe", "x"], "--recipe x cannot go with --resume"),
        (["--resume", "r", "--run-dir", "x"], "--run-dir x cannot go with --resume"),
    ],
)
def test_options_that_do_not_fit(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse_arguments(words)
