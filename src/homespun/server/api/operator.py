"""The operator API: populations, plans, tasks, releases, and what happened. Cohorts only, never one device.

FastAPI gives it a schema and a page of documentation; the records are msgspec's, as everywhere else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.responses import Response

from homespun import __version__
from homespun.errors import InvalidInput
from homespun.learning.optimizers import server_optimizer
from homespun.plan.package import MAX_PLAN_BYTES
from homespun.protocol.messages import Message, Name, TaskKind, decode, encode
from homespun.protocol.release_request import (
    ReleaseRequest,
)
from homespun.protocol.tasks import TaskSpec, parse
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
from homespun.server.aggregation import chain, contribution_codec
from homespun.server.api.problems import Problems, from_http, problem_response
from homespun.server.api.requests import read_body
from homespun.server.deployment import Deployment
from homespun.server.notify import EVENTS, SCHEDULER, population_topic, round_topic
from homespun.server.store.records import ReleaseRecord, TaskRecord

MAX_EVENTS = 1000
_BEARER = HTTPBearer(auto_error=False, description="The content of operator.token.")


class NewPopulation(Message, frozen=True, kw_only=True):
    """A population to create."""

    name: Name


class NewToken(Message, frozen=True, kw_only=True):
    """A join token to create: for how many devices (null: any number), for how long (null: ever)."""

    max_uses: Annotated[int, Meta(ge=1)] | None = None
    expires_s: Annotated[float, Meta(gt=0)] | None = None


class OperatorApi:
    """Handlers over one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self._home = deployment

    def app(self) -> FastAPI:
        """The application to mount at /v1/operator."""
        app = FastAPI(title="Homespun operator API", version=__version__, docs_url="/docs")

        def route(
            method: str, path: str, handler: Any, *, takes: Any = None, gives: Any = None
        ) -> None:
            app.add_api_route(
                path,
                handler,
                methods=[method],
                response_class=Response,
                dependencies=[Depends(self.authenticate)],
                responses=_answers(gives),
                openapi_extra=_body(takes),
            )

        route(
            "POST",
            "/populations",
            self.create_population,
            takes=NewPopulation,
            gives=PopulationView,
        )
        route("GET", "/populations", self.populations, gives=list[PopulationView])
        route(
            "POST", "/populations/{name}/tokens", self.create_token, takes=NewToken, gives=TokenView
        )
        route("DELETE", "/populations/{name}/tokens/{token_id}", self.revoke_token)
        route("POST", "/plans", self.push_plan, takes=bytes, gives=Stored)
        route("GET", "/plans/{address}", self.plan, gives=bytes)
        route("POST", "/checkpoints", self.push_checkpoint, takes=bytes, gives=Stored)
        route("GET", "/checkpoints/{address}", self.checkpoint, gives=bytes)
        route("GET", "/models", self.models, gives=list[CheckpointView])
        route("POST", "/tasks", self.create_task, takes=TaskSpec, gives=TaskView)
        route("GET", "/tasks", self.tasks, gives=list[TaskView])
        route("GET", "/tasks/{task_id}", self.task, gives=TaskView)
        route("POST", "/tasks/{task_id}/stop", self.stop_task, gives=TaskView)
        route("GET", "/tasks/{task_id}/rounds", self.task_rounds, gives=list[RoundSummary])
        route("GET", "/rounds", self.rounds, gives=list[RoundSummary])
        route("POST", "/releases", self.create_release, takes=ReleaseRequest, gives=ReleaseView)
        route("GET", "/releases", self.releases, gives=list[ReleaseView])
        route("GET", "/releases/{release_id}", self.release, gives=ReleaseView)
        route("POST", "/releases/{release_id}/hold", self.hold_release, gives=ReleaseView)
        route("POST", "/releases/{release_id}/resume", self.resume_release, gives=ReleaseView)
        route("POST", "/releases/{release_id}/roll-back", self.roll_back_release, gives=ReleaseView)
        route("GET", "/events", self.events, gives=list[Event])
        app.add_exception_handler(HTTPException, from_http)
        app.add_exception_handler(RequestValidationError, _bad_parameter)
        app.add_middleware(Problems)
        _add_schemas(app)
        return app

    def authenticate(
        self, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]
    ) -> None:
        self._home.doorkeeper.check_operator(credentials.credentials if credentials else "")

    # --- who may join -----------------------------------------------------------------------------

    async def create_population(self, request: Request) -> Response:
        """Create a population; repeating it changes nothing."""
        message: NewPopulation = decode(await self._body(request), NewPopulation)
        create = self._home.store.enrolment.create_population
        return _json(await asyncio.to_thread(create, message.name, self._now()))

    async def populations(self) -> Response:
        """Populations with the number of their devices."""
        return _json(await asyncio.to_thread(self._home.store.enrolment.populations))

    async def create_token(self, name: str, request: Request) -> Response:
        """Create a join token. It is shown this once."""
        body = await self._body(request)
        message: NewToken = decode(body or b"{}", NewToken)
        expires_at = None if message.expires_s is None else self._now() + message.expires_s
        view = await asyncio.to_thread(
            self._home.store.enrolment.create_token,
            name,
            secrets.token_hex(8),
            secrets.token_urlsafe(24),
            message.max_uses,
            expires_at,
        )
        return _json(view)

    async def revoke_token(self, name: str, token_id: str) -> Response:
        """Revoke a join token; devices that joined with it stay."""
        await asyncio.to_thread(self._home.store.enrolment.revoke_token, name, token_id)
        return Response(status_code=204)

    # --- what is trained --------------------------------------------------------------------------

    async def push_plan(self, request: Request) -> Response:
        """Publish a plan's zip; one without a signature is signed with the server's publisher key."""
        data = await read_body(request, MAX_PLAN_BYTES)
        return _json(await asyncio.to_thread(self._home.library.push_plan, data, self._now()))

    async def plan(self, address: str) -> Response:
        """A plan's zip."""
        data = await asyncio.to_thread(self._home.library.plan_bytes, address)
        return Response(data, media_type="application/zip")

    async def push_checkpoint(self, request: Request, plan_hash: str) -> Response:
        """Store parameters of a plan, a safetensors file."""
        data = await read_body(request, self._home.settings.max_checkpoint)
        push = self._home.library.push_checkpoint
        return _json(await asyncio.to_thread(push, data, plan_hash, self._now()))

    async def checkpoint(self, address: str) -> Response:
        """A checkpoint's safetensors file."""
        data = await asyncio.to_thread(self._home.library.checkpoint_bytes, address)
        return Response(data, media_type="application/octet-stream")

    async def models(self) -> Response:
        """Checkpoints in their chains, oldest first."""
        return _json(await asyncio.to_thread(self._home.store.catalogue.models))

    # --- tasks and rounds -------------------------------------------------------------------------

    async def create_task(self, request: Request) -> Response:
        """Create a task; its rounds begin when devices check in. Repeating it changes nothing."""
        spec = parse(decode(await self._body(request), Any))
        task = await asyncio.to_thread(self._create_task, spec)
        await self._home.scheduler.settle()
        return _json(task.view)

    async def tasks(self) -> Response:
        """All tasks, oldest first."""
        return _json([task.view for task in await asyncio.to_thread(self._home.store.tasks.all)])

    async def task(self, task_id: str) -> Response:
        """One task."""
        return _json((await asyncio.to_thread(self._home.store.tasks.get, task_id)).view)

    async def stop_task(self, task_id: str) -> Response:
        """Stop a task for good; what its devices sent for the open round is void."""
        task = await asyncio.to_thread(self._home.store.tasks.stop, task_id, self._now())
        await self._home.scheduler.publish(
            population_topic(task.spec.population), round_topic(task_id, task.rounds_committed + 1)
        )
        self._home.notices.ring(SCHEDULER)  # a release may have waited for this task
        return _json(task.view)

    async def task_rounds(self, task_id: str) -> Response:
        """The round attempts of a task, in order."""
        await asyncio.to_thread(self._home.store.tasks.get, task_id)
        summaries = self._home.store.rounds.summaries
        return _json(await asyncio.to_thread(summaries, self._now(), task_id))

    async def rounds(self, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        """The newest round attempts of all tasks, newest first."""
        summaries = self._home.store.rounds.summaries
        return _json(await asyncio.to_thread(summaries, self._now(), None, limit))

    # --- releases and events ----------------------------------------------------------------------

    async def create_release(self, request: Request) -> Response:
        """Begin a release: it is checked, evaluated against what is served, and rolled out by stages."""
        message: ReleaseRequest = decode(await self._body(request), ReleaseRequest)
        return await self._released(self._home.desk.create, message, self._now())

    async def release(self, release_id: str) -> Response:
        """A release: where it is, how it came there, and what the devices say."""
        return _json(await asyncio.to_thread(self._home.desk.view, release_id))

    async def hold_release(self, release_id: str, reason: str = "") -> Response:
        """Stop a release where it is; devices keep what they serve."""
        return await self._released(self._home.desk.hold, release_id, self._now(), reason)

    async def resume_release(self, release_id: str) -> Response:
        """Go on with a release where it was held."""
        return await self._released(self._home.desk.resume, release_id, self._now())

    async def roll_back_release(self, release_id: str, reason: str = "") -> Response:
        """Take a release back: devices return to the one before."""
        return await self._released(self._home.desk.roll_back, release_id, self._now(), reason)

    async def _released(self, act: Callable[..., ReleaseRecord], *args: Any) -> Response:
        """Let the desk act, tell those who wait, and show what came of it."""
        release = await asyncio.to_thread(act, *args)
        await self._home.scheduler.settle()  # the rounds of its tasks
        await self._home.scheduler.publish(*self._home.desk.topics(release))
        return _json(await asyncio.to_thread(self._home.desk.view, release.release_id))

    async def releases(self) -> Response:
        """All releases, oldest first."""
        records = await asyncio.to_thread(self._home.store.releases.all)
        return _json([record.view for record in records])

    async def events(
        self,
        after: Annotated[int, Query(ge=0)] = 0,
        wait_s: Annotated[float, Query(ge=0)] = 0.0,
    ) -> Response:
        """What happened behind sequence number `after`; waits up to `wait_s` while that is nothing."""
        until = asyncio.get_running_loop().time() + min(wait_s, self._home.settings.max_wait_s)
        with self._home.notices.listen(EVENTS) as bell:
            while True:
                events = await asyncio.to_thread(self._home.store.events.after, after, MAX_EVENTS)
                left = until - asyncio.get_running_loop().time()
                if events or not await bell.wait(left):
                    return _json(events)

    # --- shared -----------------------------------------------------------------------------------

    def _create_task(self, spec: TaskSpec) -> TaskRecord:
        """Everything that could only fail later is looked at now."""
        manifest = self._home.library.manifest(spec.plan_hash)
        if spec.kind is TaskKind.TRAIN:
            server_optimizer(spec.optimizer.name, spec.optimizer.settings)
        contribution_codec(spec, manifest, 1, 1)  # clip, bits and group fit together
        first = chain(None, spec.checkpoints[0], 0)
        return self._home.store.tasks.create(spec, secrets.token_hex(16), first, self._now())

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._home.settings.max_message)

    def _now(self) -> float:
        return self._home.clock.now()


def _json(value: object) -> Response:
    return Response(encode(value), media_type="application/json")


async def _bad_parameter(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    return problem_response(InvalidInput(f"parameter {name}: {first['msg']}"))


# --- the schema: msgspec's JSON Schema in FastAPI's document ---------------------------------------

_RECORDS = (
    NewPopulation, NewToken, TaskSpec, ReleaseRequest, PopulationView, TokenView, Stored,
    CheckpointView, TaskView, RoundSummary, ReleaseView, Event,
)  # fmt: skip
_SCHEMAS, _COMPONENTS = msgspec.json.schema_components(
    _RECORDS, ref_template="#/components/schemas/{name}"
)
_REFERENCES = dict(zip(_RECORDS, _SCHEMAS, strict=True))


def _content(kind: Any) -> dict[str, Any]:
    if kind is bytes:
        binary = {"type": "string", "format": "binary"}
        return {"application/octet-stream": {"schema": binary}}
    if kind in _REFERENCES:
        return {"application/json": {"schema": _REFERENCES[kind]}}
    (item,) = kind.__args__
    return {"application/json": {"schema": {"type": "array", "items": _REFERENCES[item]}}}


def _answers(kind: Any) -> dict[int | str, dict[str, Any]]:
    problem = {"description": "A problem document (RFC 9457)."}
    if kind is None:
        return {204: {"description": "Done."}, "4XX": problem}
    return {200: {"description": "Done.", "content": _content(kind)}, "4XX": problem}


def _body(kind: Any) -> dict[str, Any] | None:
    return None if kind is None else {"requestBody": {"content": _content(kind)}}


def _add_schemas(app: FastAPI) -> None:
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        document.setdefault("components", {}).setdefault("schemas", {}).update(_COMPONENTS)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
