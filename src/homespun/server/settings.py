"""Settings of a server: arguments first, then `HOMESPUN_SERVER_*` variables, then these defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from homespun.errors import InvalidConfig
from homespun.protocol.messages import RetryWindow


class Settings(BaseSettings):
    """Sizes are in bytes, times in seconds.

    `max_wait_s`: longest that a long poll is held; `tick_s`: how often deadlines are looked at when nothing
    happens; `batch_s`, `batch_size`: uploads that become durable together; `upload_memory`: report bodies in
    memory at once; `upload_timeout_s`: longest that one body may take; `retry_*_s`: when a device of a population
    without any task comes back (if not given, its pace is steered).
    """

    model_config = SettingsConfigDict(env_prefix="HOMESPUN_SERVER_", frozen=True, extra="forbid")

    data_dir: Path = Path(".homespun/server")
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8470
    database_url: str = ""
    max_wait_s: Annotated[float, Field(ge=0)] = 25.0
    tick_s: Annotated[float, Field(gt=0)] = 1.0
    batch_s: Annotated[float, Field(ge=0)] = 0.02
    batch_size: Annotated[int, Field(ge=1)] = 64
    upload_memory: Annotated[int, Field(ge=1)] = 128 * 2**20
    upload_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    max_message: Annotated[int, Field(ge=1024)] = 64 * 2**10
    max_checkpoint: Annotated[int, Field(ge=1024)] = 256 * 2**20
    retry_earliest_s: Annotated[float, Field(ge=0)] | None = None
    retry_latest_s: Annotated[float, Field(ge=0)] | None = None

    @property
    def retry(self) -> RetryWindow | None:
        """When devices of a population without any task come back, if that is fixed."""
        if self.retry_earliest_s is None and self.retry_latest_s is None:
            return None
        earliest_s = self.retry_earliest_s or 0.0
        return RetryWindow(
            earliest_s=earliest_s, latest_s=max(earliest_s, self.retry_latest_s or 0.0)
        )

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
