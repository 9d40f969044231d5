"""Settings of a server: arguments first, then `HOMESPUN_SERVER_*` variables, then these defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from homespun.errors import InvalidConfig


class Settings(BaseSettings):
    """Sizes are in bytes, times in seconds.

    `max_wait_s`: longest that a long poll is held; `tick_s`: how often deadlines are looked at when nothing
    happens; `group_s`, `group_size`: uploads that become durable together; `upload_memory`: report bodies in
    memory at once; `upload_timeout_s`: longest that one body may take; `retry_*_s`: when a device of a population
    without any task comes back.
    """

    model_config = SettingsConfigDict(env_prefix="HOMESPUN_SERVER_", frozen=True, extra="forbid")

    data_dir: Path = Path(".homespun/server")
    host: str = "127.0.0.1"
    port: int = Field(8470, ge=0, le=65535)
    database_url: str = ""
    max_wait_s: float = Field(25.0, ge=0)
    tick_s: float = Field(1.0, gt=0)
    group_s: float = Field(0.02, ge=0)
    group_size: int = Field(64, ge=1)
    upload_memory: int = Field(128 * 2**20, ge=1)
    upload_timeout_s: float = Field(300.0, gt=0)
    max_message: int = Field(64 * 2**10, ge=1024)
    max_checkpoint: int = Field(256 * 2**20, ge=1024)
    retry_earliest_s: float = Field(60.0, ge=0)
    retry_latest_s: float = Field(300.0, ge=0)

    @property
    def database(self) -> str:
        """SQLAlchemy URL: the given one, or a SQLite file in the data directory."""
        return self.database_url or f"sqlite:///{(self.data_dir / 'homespun.db').absolute()}"


def load_settings(**values: Any) -> Settings:
    """Settings from arguments (None: not given), environment and defaults. Raises `InvalidConfig`."""
    try:
        return Settings(**{name: value for name, value in values.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvalidConfig(
            f"server setting {name}: {first['msg']}",
            hint=f"set HOMESPUN_SERVER_{name.upper()} or its option to something else",
        ) from error
