"""The device API: what a device may ask, every request signed, every endpoint idempotent."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from homespun.errors import Conflict, Expired, HomespunError, NotFound, ReportConflict
from homespun.learning.contribution import Contribution, ContributionCodec
from homespun.protocol.frame import decode_contribution, decode_masked_input
from homespun.protocol.messages import (
    Abort,
    Aggregation,
    Assigned,
    CheckIn,
    Claim,
    ClaimReply,
    Enroll,
    Enrolled,
    GroupReply,
    Receipt,
    Rejected,
    ReportState,
    RetryWindow,
    Settled,
    Waiting,
    decode,
    encode,
)
from homespun.protocol.selection import in_bucket
from homespun.protocol.signing import device_id
from homespun.secagg.messages import AdvertiseKeys, Agree, ShareKeys, Unmask
from homespun.server.aggregation import (
    contribution_codec,
    encoding,
    report_size,
    round_checkpoints,
    round_seed,
)
from homespun.server.api.requests import read_body, read_exactly
from homespun.server.auth import decode_key, require_member
from homespun.server.deployment import Deployment
from homespun.server.group import Answer
from homespun.server.notify import SCHEDULER, group_topic, population_topic, round_topic
from homespun.server.store.records import (
    ClaimAnswer,
    DeviceRecord,
    Drawn,
    Expectation,
    Gathered,
    TaskRecord,
    TurnedAway,
)
from homespun.server.store.reports import receipt_id
from homespun.tensors.codec import digest

CHUNK = 2**20
CLAIM_GRACE_S = 15.0
_STEPS: dict[str, type[Answer]] = {  # of the masked input, which is not JSON, see `mask_input`
    "advertise-keys": AdvertiseKeys,
    "share-keys": ShareKeys,
    "agree": Agree,
    "unmask": Unmask,
}
_PREFER_WAIT = re.compile(r"wait=(\d{1,4})\Z")
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class DeviceApi:
    """Handlers over one deployment."""

    def __init__(self, deployment: Deployment) -> None:
        self._home = deployment
        self._granted: set[tuple[frozenset[str], str]] = set()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/enroll", self.enroll, methods=["POST"]),
            Route("/v1/check-in", self.check_in, methods=["POST"]),
            Route("/v1/claim", self.claim, methods=["POST"]),
            Route("/v1/blobs/{hash}", self.blob, methods=["GET"]),
            Route("/v1/assignments/{id}/report", self.report, methods=["PUT"]),
            Route("/v1/assignments/{id}/group", self.group, methods=["GET"]),
            Route("/v1/assignments/{id}/group/mask-input", self.mask_input, methods=["PUT"]),
            Route("/v1/assignments/{id}/group/{step}", self.answer, methods=["PUT"]),
            Route("/v1/assignments/{id}/abort", self.abort, methods=["POST"]),
            Route("/v1/assignments/{id}", self.receipt, methods=["GET"]),
            Route("/v1/releases/{population}/{slot}", self.release, methods=["GET"]),
            Route("/v1/releases/{population}/{slot}/deployed", self.deployed, methods=["GET"]),
        ]

    # --- joining ----------------------------------------------------------------------------------

    async def enroll(self, request: Request) -> Response:
        body = await read_body(request, self._home.settings.max_message)
        message: Enroll = decode(body, Enroll)
        key = decode_key(message.public_key)
        self._home.doorkeeper.check_signature(request, key, digest(body))
        device = device_id(key)
        await asyncio.to_thread(
            self._home.store.enrolment.enroll,
            message.population,
            message.token,
            device,
            key,
            self._home.clock.now(),
        )
        self._home.doorkeeper.forget(device)
        publisher = base64.b64encode(self._home.keys.publisher_public).decode()
        return _json(
            Enrolled(device_id=device, population=message.population, publisher_keys=(publisher,))
        )

    # --- taking part ------------------------------------------------------------------------------

    async def check_in(self, request: Request) -> Response:
        device, body = await self._signed(request)
        message: CheckIn = decode(body, CheckIn)
        population = message.population
        require_member(device, population)
        board = self._home.board
        self._home.paces.arrive(population, self._home.clock.now())
        before = board.standing(population).releases
        with self._home.notices.listen(population_topic(population)) as bell:
            until = _loop_time() + min(message.wait_s, self._home.settings.max_wait_s)
            while True:
                offers = board.offers(population, device.device_id, message.plan_formats)
                if offers or board.standing(population).releases != before:
                    break
                if not await bell.wait(until - _loop_time()):
                    break
        return _json(board.reply(population, offers, self._home.clock.now()))

    async def claim(self, request: Request) -> Response:
        device, body = await self._signed(request)
        message: Claim = decode(body, Claim)
        wait_s = min(message.wait_s, self._home.settings.max_wait_s)
        topic = round_topic(message.task_id, message.round_number)
        with self._home.notices.listen(topic) as bell:
            until = _loop_time() + wait_s
            reply, due = await asyncio.to_thread(self._claim, device, message, wait_s)
            if due:
                self._home.notices.ring(SCHEDULER)
            while isinstance(reply, Waiting) and await bell.wait(until - _loop_time()):
                reply, _ = await asyncio.to_thread(self._claim, device, message, None)
        return _json(reply)

    def _claim(
        self, device: DeviceRecord, message: Claim, wait_s: float | None
    ) -> tuple[ClaimReply, bool]:
        """The answer to a claim, and whether the draw is due. Without `wait_s` the claim is not refreshed."""
        task = self._home.store.tasks.get(message.task_id)
        require_member(device, task.spec.population)
        if not in_bucket(task.spec.criteria.bucket, device.device_id):
            return self._rejected(task, "not_in_bucket"), False
        place = (message.task_id, message.round_number, message.attempt, device.device_id)
        claims, now = self._home.store.claims, self._home.clock.now()
        if wait_s is None:
            answer = claims.answer(*place)
        else:
            answer = claims.claim(*place, now, now + 2 * wait_s + CLAIM_GRACE_S)
        due = isinstance(answer, Gathered) and answer.due
        if isinstance(answer, Gathered | Drawn) and answer.is_new:
            self._home.paces.claim(task.spec.population, task.task_id, now)
        if isinstance(answer, TurnedAway) and answer.reason == "full":
            self._home.paces.full(task.task_id, now)
        return self._claim_reply(task, message, answer), due

    def _claim_reply(self, task: TaskRecord, message: Claim, answer: ClaimAnswer) -> ClaimReply:
        spec = task.spec
        if isinstance(answer, Gathered):
            # Soon enough to be still waiting when the draw comes.
            return Waiting(retry=RetryWindow(earliest_s=0.0, latest_s=CLAIM_GRACE_S / 3))
        if not isinstance(answer, Drawn):
            return self._rejected(task, answer.reason)
        manifest = self._home.library.manifest(spec.plan_hash)
        place = message.round_number, message.attempt
        return Assigned(
            assignment_id=answer.assignment_id,
            kind=spec.kind,
            round_number=message.round_number,
            attempt=message.attempt,
            plan_hash=spec.plan_hash,
            checkpoints=round_checkpoints(spec, answer.base),
            encoding=encoding(spec, manifest, *place),
            aggregation=spec.aggregation,
            seed=round_seed(spec, *place),
            deadline_s=max(0.0, answer.expires_at - self._home.clock.now()),
            max_staleness=spec.max_staleness,
        )

    def _rejected(self, task: TaskRecord, reason: str) -> Rejected:
        retry = task.spec.retry
        if retry is None:
            retry = self._home.board.retry(task.spec.population, self._home.clock.now())
        return Rejected(reason=reason, retry=retry)

    # --- reporting --------------------------------------------------------------------------------

    async def report(self, request: Request) -> Response:
        assignment = request.path_params["id"]
        device = await self._home.doorkeeper.device(request)
        expected = await self._reporting(assignment, device, Aggregation.PLAIN)
        codec = await self._codec(expected)
        receipt, size = expected.receipt, report_size(expected.task.spec, codec)
        async with self._home.uploads.hold(size, expected.task.spec.population):
            body = await read_exactly(request, size, self._home.settings.upload_timeout_s)
            body_hash = await asyncio.to_thread(digest, body)
            self._home.doorkeeper.check_signature(request, device.public_key, body_hash)
            if receipt.state is ReportState.EXPECTED:
                if self._home.clock.now() >= expected.deadline_at:
                    raise Expired("the round's deadline has passed", state=ReportState.LATE)
                contribution = await self._checked(assignment, codec, body)
                if await self._home.intake.add(
                    expected.round_id, codec, receipt_id(assignment), body_hash, contribution
                ):
                    acknowledged = ReportState.ACKNOWLEDGED
                    return _json(
                        Receipt(assignment_id=assignment, state=acknowledged, digest=body_hash)
                    )
                # It was settled since we looked: by the fence, the device itself, or the same report.
                receipt = (await self._expectation(assignment, device)).receipt
        return _json(_settled(receipt, body_hash))

    # --- secure aggregation -----------------------------------------------------------------------

    async def group(self, request: Request) -> Response:
        device, _ = await self._signed(request)
        expected = await self._reporting(request.path_params["id"], device, Aggregation.SECURE)
        return await self._asked(request, device, expected)

    async def answer(self, request: Request) -> Response:
        kind = _STEPS.get(request.path_params["step"])
        if kind is None:
            raise NotFound("there is no such step", hint=f"one of: mask-input, {', '.join(_STEPS)}")
        device, body = await self._signed(request)
        expected = await self._reporting(request.path_params["id"], device, Aggregation.SECURE)
        message: Answer = decode(body, kind)
        await self._home.groups.answer(expected, device.public_key, message)
        return await self._asked(request, device, expected)

    async def mask_input(self, request: Request) -> Response:
        assignment = request.path_params["id"]
        device = await self._home.doorkeeper.device(request)
        expected = await self._reporting(assignment, device, Aggregation.SECURE)
        codec = await self._codec(expected)
        size = report_size(expected.task.spec, codec)
        async with self._home.uploads.hold(size, expected.task.spec.population):
            body = await read_exactly(request, size, self._home.settings.upload_timeout_s)
            body_hash = await asyncio.to_thread(digest, body)
            self._home.doorkeeper.check_signature(request, device.public_key, body_hash)
            shape = codec.bits, len(codec.aux_names), codec.dimension
            masked = await asyncio.to_thread(decode_masked_input, body, *shape)
            await self._home.groups.answer(expected, device.public_key, masked, body_hash)
            del body, masked
        return await self._asked(request, device, expected)

    async def _asked(
        self, request: Request, device: DeviceRecord, expected: Expectation
    ) -> Response:
        """What is asked of the device next, as soon as there is something or its patience is over."""
        match = _PREFER_WAIT.match(request.headers.get("prefer", ""))
        wait_s = min(float(match[1]) if match else 0.0, self._home.settings.max_wait_s)
        until = _loop_time() + wait_s
        while True:
            if expected.group_id is None:
                expected = await self._expectation(expected.receipt.assignment_id, device)
            topic = round_topic(expected.task.task_id, expected.number)
            if expected.group_id is not None:
                topic = group_topic(expected.group_id)
            with self._home.notices.listen(topic) as bell:
                reply: GroupReply | None = await self._home.groups.ask(expected, device.public_key)
                if reply is None:
                    expected = await self._expectation(expected.receipt.assignment_id, device)
                    if expected.group_id is None:
                        continue  # the group is void, it may join another
                    reply = Settled(receipt=expected.receipt)
                if not isinstance(reply, Waiting) or not await bell.wait(until - _loop_time()):
                    return _json(reply)

    # --- what became of it ------------------------------------------------------------------------

    async def receipt(self, request: Request) -> Response:
        device, _ = await self._signed(request)
        expected = await self._expectation(request.path_params["id"], device)
        return _json(expected.receipt)

    async def abort(self, request: Request) -> Response:
        device, body = await self._signed(request)
        message: Abort = decode(body, Abort)
        assignment = request.path_params["id"]
        if message.assignment_id != assignment:
            raise ReportConflict("the body names another assignment than the path")
        await self._expectation(assignment, device)
        await self._void(assignment, "given up by the device")
        return _json((await self._expectation(assignment, device)).receipt)

    # --- downloading ------------------------------------------------------------------------------

    async def blob(self, request: Request) -> Response:
        device, _ = await self._signed(request)
        address = request.path_params["hash"]
        key = (device.populations, address)
        if key not in self._granted:
            catalogue = self._home.store.catalogue
            if not await asyncio.to_thread(catalogue.may_download, device.populations, address):
                raise NotFound(f"there is no blob {address[:12]} for this device")
            if len(self._granted) > 10_000:
                self._granted.clear()
            self._granted.add(key)
        size = await asyncio.to_thread(self._home.blobs.size, address)
        start, stop = _requested_range(request.headers.get("range", ""), size)
        headers = {
            "Content-Length": str(stop - start),
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, max-age=31536000, immutable",
            "ETag": f'"{address}"',
        }
        partial = (start, stop) != (0, size)
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return StreamingResponse(
            self._chunks(address, start, stop),
            206 if partial else 200,
            headers,
            "application/octet-stream",
        )

    async def release(self, request: Request) -> Response:
        return await self._manifest(request, for_all=False)

    async def deployed(self, request: Request) -> Response:
        return await self._manifest(request, for_all=True)

    async def _manifest(self, request: Request, *, for_all: bool) -> Response:
        device, _ = await self._signed(request)
        population, slot = request.path_params["population"], request.path_params["slot"]
        require_member(device, population)
        newest = self._home.store.releases.signed
        signed = await asyncio.to_thread(newest, population, slot, for_all=for_all)
        if signed is None:
            raise NotFound(f"nothing is released to slot {slot} of {population}")
        return Response(signed, media_type="application/json")

    # --- shared -----------------------------------------------------------------------------------

    async def _signed(self, request: Request) -> tuple[DeviceRecord, bytes]:
        """The proven sender of a small request, and its body."""
        device = await self._home.doorkeeper.device(request)
        body = await read_body(request, self._home.settings.max_message)
        self._home.doorkeeper.check_signature(request, device.public_key, digest(body))
        return device, body

    async def _expectation(self, assignment: str, device: DeviceRecord) -> Expectation:
        reports = self._home.store.reports
        expected = await asyncio.to_thread(reports.expectation, assignment, device.device_id)
        if expected.receipt.state is ReportState.LATE and not expected.has_heard:
            await asyncio.to_thread(reports.tell, assignment)
        return expected

    async def _void(self, assignment: str, reason: str) -> None:
        await asyncio.to_thread(self._home.store.reports.void, assignment, reason)
        self._home.notices.ring(SCHEDULER)  # nobody else may be left to wait for

    async def _reporting(
        self, assignment: str, device: DeviceRecord, aggregation: Aggregation
    ) -> Expectation:
        """An assignment that is reported in this way. Raises `Conflict` for one of the other aggregation."""
        expected = await self._expectation(assignment, device)
        if expected.task.spec.aggregation is not aggregation:
            raise Conflict(f"reports of this task are aggregated {expected.task.spec.aggregation}")
        return expected

    async def _codec(self, expected: Expectation) -> ContributionCodec:
        """How a report is encoded."""
        spec = expected.task.spec
        manifest = await asyncio.to_thread(self._home.library.manifest, spec.plan_hash)
        return contribution_codec(spec, manifest, expected.number, expected.attempt)

    async def _checked(
        self, assignment: str, codec: ContributionCodec, body: bytearray
    ) -> Contribution:
        """The contribution in a signed body. Raises `BadFrame`, `ShapeMismatch` or `NumericFailure`."""

        def check() -> Contribution:
            contribution = decode_contribution(body)
            codec.check(contribution)
            return contribution

        try:
            return await asyncio.to_thread(check)
        except HomespunError as error:  # the device will never send anything else
            await self._void(assignment, f"refused: {error.code}")
            raise

    async def _chunks(self, address: str, start: int, stop: int) -> AsyncIterator[bytes]:
        while start < stop:
            length = min(CHUNK, stop - start)
            chunk = await asyncio.to_thread(self._home.blobs.read, address, start, length)
            start += len(chunk)
            yield chunk


def _settled(receipt: Receipt, body_hash: str) -> Receipt:
    """The answer to a report. Raises `ReportConflict` if another body was reported, `Expired` if none was in time."""
    if receipt.digest is None:
        raise Expired(
            f"this assignment is over: {receipt.reason or receipt.state}",
            hint="nothing of this report was used",
            state=receipt.state,
        )
    if receipt.digest != body_hash:
        raise ReportConflict(
            "another report was sent for this assignment",
            expected=receipt.digest,
            got=body_hash,
        )
    return receipt


def _requested_range(header: str, size: int) -> tuple[int, int]:
    """(start, stop) of the bytes asked for; all of them when the header is absent or cannot be met (RFC 9110)."""
    match = _RANGE.fullmatch(header)
    if match is None or int(match[1]) >= size:
        return 0, size
    stop = min(int(match[2]) + 1, size) if match[2] else size
    return (int(match[1]), stop) if stop > int(match[1]) else (0, size)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


def _json(message: object) -> Response:
    return Response(encode(message), media_type="application/json")
