"""Settings: arguments, then environment, then defaults; what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from homespun.errors import InvalidConfig
from homespun.server.settings import load_settings


def test_arguments_come_before_the_environment(monkeypatch):
    monkeypatch.setenv("HOMESPUN_SERVER_PORT", "9000")
    monkeypatch.setenv("HOMESPUN_SERVER_TICK_S", "0.5")
    settings = load_settings(port=9001, host=None)
    assert (settings.port, settings.tick_s, settings.host) == (9001, 0.5, "127.0.0.1")


def test_the_database_is_in_the_data_directory_unless_said_otherwise(tmp_path: Path):
    settings = load_settings(data_dir=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/homespun.db"
    assert load_settings(database_url="postgresql://x").database == "postgresql://x"


def test_a_wrong_setting_is_named(monkeypatch):
    with pytest.raises(InvalidConfig, match="port"):
        load_settings(port=70000)
    with pytest.raises(InvalidConfig, match="prot"):
        load_settings(prot=1)
    monkeypatch.setenv("HOMESPUN_SERVER_TICK_S", "soon")
    with pytest.raises(InvalidConfig, match="tick_s"):
        load_settings()
