"""Reading the environment: torchrun's variables, the allow-list, secrets."""

from __future__ import annotations

import pytest

from libs.flags import environment
from libs.flags.environment import Launch, allowed_variables, fathom_variables, names_a_secret, parse_launch
from libs.flags.errors import UserError


def test_single_process_by_default() -> None:
    assert parse_launch({}) == Launch(rank=0, local_rank=0, world_size=1, attempt=0)


def test_torchrun() -> None:
    env = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert parse_launch(env) == Launch(5, 1, 8, 2)
    more = {"LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RUN_ID": "a"}
    assert parse_launch(env | more) == Launch(5, 1, 8, 2, "a", max_restarts=3, several_machines=True)
    assert not parse_launch(env | {"LOCAL_WORLD_SIZE": "8"}).several_machines


@pytest.mark.parametrize(
    "env",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2", "RANK": "0"},
        {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "two"},
        {"TORCHELASTIC_RESTART_COUNT": "1.5"},
    ],
)
def test_broken_launch_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"RANK|WORLD_SIZE|RESTART"):
        parse_launch(env)


def test_launch_reads_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert environment.launch().rank == 1


def test_fathom_variables_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FATHOM_TMA", "fathom_tma", "FATHOM_TRAIN__OPTIM__LR", "NOT_FATHOM_X"):
        monkeypatch.setenv(name, "1")
    found = fathom_variables()
    assert {"FATHOM_TMA", "fathom_tma", "FATHOM_TRAIN__OPTIM__LR"} <= set(found)
    assert "NOT_FATHOM_X" not in found


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("WANDB_API_KEY", True),
        ("HF_TOKEN", True),
        ("--wandb.api-key", True),
        ("FATHOM_TRAIN__WANDB__PASSWORD", True),
        ("--auth", True),
        ("apikey", True),
        ("--tokenizer", False),
        ("FATHOM_TRAIN__MAX_TOKENS", False),
        ("FATHOM_ACCESSKEY", True),
        ("FATHOM_AUTHTOKEN", True),
        ("--db.clientsecret", True),
        ("KEYBOARD", False),
        ("AUTHOR", False),
    ],
)
def test_names_a_secret(name: str, secret: bool) -> None:
    assert names_a_secret(name) is secret


def test_only_the_allow_list_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {"OMP_NUM_THREADS": "3", "FATHOM_TMA": "off"}
    hidden = {"WANDB_API_KEY": "hunter2", "AWS_SECRET_ACCESS_KEY": "hunter2", "HOME_OF_X": "hunter2"}
    for name, value in (shown | hidden | {"FATHOM_TRAIN__WANDB__TOKEN": "hunter2"}).items():
        monkeypatch.setenv(name, value)
    found = allowed_variables()
    assert shown.items() <= found.items()
    assert not set(hidden) & set(found)
    assert found["FATHOM_TRAIN__WANDB__TOKEN"] == "[redacted]"
    assert "hunter2" not in str(found)


def test_the_allow_list_names_no_secret() -> None:
    assert not [name for name in environment.ALLOWED if names_a_secret(name)]
