"""The operator's side of the HTTP API, as typed calls.

Which server: `--server` and HOMESPUN_TOKEN, or, on the server's own machine, the data directory, where a
running server leaves its address and the operator's token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import httpx
import typer

from homespun.errors import InvalidConfig, Unreachable
from homespun.protocol import messages
from homespun.protocol.problem import error_from_problem
from homespun.protocol.tasks import TaskSpec
from homespun.protocol.views import (
    CheckpointView,
    Event,
    PopulationView,
    ReleaseView,
    RoundSummary,
    Stored,
    TaskView,
    TokenView,
)

DEFAULT_DATA = Path(".homespun/server")
TIMEOUT_S = 60.0

ServerOption = typer.Option(
    None, "--server", envvar="HOMESPUN_SERVER", help="Server URL; default: the one of --data."
)
TokenOption = typer.Option(
    None, "--token", envvar="HOMESPUN_TOKEN", help="Operator token; default: the one of --data."
)
DataOption = typer.Option(
    DEFAULT_DATA, "--data", envvar="HOMESPUN_DATA", help="Data directory of a server here."
)
JsonOption = typer.Option(False, "--json", help="Print JSON.")

T = TypeVar("T")


class OperatorClient:
    """Calls of the operator API; failures arrive as the exceptions of `homespun.errors`."""

    def __init__(self, url: str, token: str) -> None:
        self.url = url
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=TIMEOUT_S
        )

    def _call(self, kind: type[T] | Any, method: str, path: str, **request: Any) -> T:
        answer: T = messages.decode(self._exchange(method, path, **request), kind)
        return answer

    def _exchange(self, method: str, path: str, **request: Any) -> bytes:
        try:
            response = self._http.request(method, f"/v1/operator{path}", **request)
        except httpx.TransportError as error:
            raise Unreachable(
                f"no server answers at {self.url}", hint="start it with: homespun serve"
            ) from error
        if response.is_error:
            raise error_from_problem(response.status_code, response.content)
        return response.content

    def create_population(self, name: str) -> PopulationView:
        return self._call(PopulationView, "POST", "/populations", json={"name": name})

    def populations(self) -> list[PopulationView]:
        return self._call(list[PopulationView], "GET", "/populations")

    def create_token(
        self, population: str, max_uses: int | None = None, expires_s: float | None = None
    ) -> TokenView:
        settings = {"max_uses": max_uses, "expires_s": expires_s}
        return self._call(TokenView, "POST", f"/populations/{population}/tokens", json=settings)

    def revoke_token(self, population: str, token_id: str) -> None:
        self._exchange("DELETE", f"/populations/{population}/tokens/{token_id}")

    def push_plan(self, data: bytes) -> Stored:
        return self._call(Stored, "POST", "/plans", content=data)

    def plan(self, plan_hash: str) -> bytes:
        return self._exchange("GET", f"/plans/{plan_hash}")

    def push_checkpoint(self, data: bytes, plan_hash: str) -> Stored:
        return self._call(
            Stored, "POST", "/checkpoints", content=data, params={"plan_hash": plan_hash}
        )

    def checkpoint(self, checkpoint_hash: str) -> bytes:
        return self._exchange("GET", f"/checkpoints/{checkpoint_hash}")

    def checkpoints(self) -> list[CheckpointView]:
        return self._call(list[CheckpointView], "GET", "/models")

    def create_task(self, spec: TaskSpec) -> TaskView:
        return self._call(TaskView, "POST", "/tasks", content=messages.encode(spec))

    def tasks(self) -> list[TaskView]:
        return self._call(list[TaskView], "GET", "/tasks")

    def task(self, task_id: str) -> TaskView:
        return self._call(TaskView, "GET", f"/tasks/{task_id}")

    def stop_task(self, task_id: str) -> TaskView:
        return self._call(TaskView, "POST", f"/tasks/{task_id}/stop")

    def rounds(self, task_id: str) -> list[RoundSummary]:
        return self._call(list[RoundSummary], "GET", f"/tasks/{task_id}/rounds")

    def recent_rounds(self, limit: int) -> list[RoundSummary]:
        return self._call(list[RoundSummary], "GET", "/rounds", params={"limit": limit})

    def create_release(self, **release: Any) -> ReleaseView:
        return self._call(ReleaseView, "POST", "/releases", json=release)

    def release(self, release_id: str) -> ReleaseView:
        return self._call(ReleaseView, "GET", f"/releases/{release_id}")

    def hold_release(self, release_id: str, reason: str = "") -> ReleaseView:
        params = {"reason": reason}
        return self._call(ReleaseView, "POST", f"/releases/{release_id}/hold", params=params)

    def resume_release(self, release_id: str) -> ReleaseView:
        return self._call(ReleaseView, "POST", f"/releases/{release_id}/resume")

    def roll_back_release(self, release_id: str, reason: str = "") -> ReleaseView:
        params = {"reason": reason}
        return self._call(ReleaseView, "POST", f"/releases/{release_id}/roll-back", params=params)

    def releases(self) -> list[ReleaseView]:
        return self._call(list[ReleaseView], "GET", "/releases")

    def events(self, after: int, wait_s: float) -> list[Event]:
        params = {"after": after, "wait_s": wait_s}
        return self._call(list[Event], "GET", "/events", params=params)


def connect(server: str | None, token: str | None, data: Path) -> OperatorClient:
    """The client for these options. Raises `InvalidConfig` when they do not lead to a server."""
    if server is None:
        try:
            server = json.loads((data / "server.json").read_text())["url"]
        except (OSError, ValueError, KeyError) as error:
            raise InvalidConfig(
                f"no server is running in {data}",
                hint="start one with: homespun serve, or name one with --server",
            ) from error
    if token is None:
        try:
            token = (data / "operator.token").read_text().strip()
        except OSError as error:
            raise InvalidConfig(
                f"no operator token in {data}", hint="give --token or HOMESPUN_TOKEN"
            ) from error
    return OperatorClient(str(server), token)
