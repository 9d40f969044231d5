"""Every bad report is a named error to its device; the round goes on and the sum is untouched."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from homespun.errors import (
    BadFrame,
    Expired,
    NotAllowed,
    NotAuthentic,
    NotFound,
    NumericFailure,
    ReportConflict,
    ShapeMismatch,
    TooLarge,
)
from homespun.learning.contribution import Contribution
from homespun.protocol.frame import encode_contribution
from homespun.protocol.messages import Receipt
from homespun.protocol.signing import request_headers


@pytest.fixture
def stage(make_world):
    """A running round of four, with one report in; and a check that the sum is that of the good reports."""
    world = make_world(4)
    task = world.create_task(over_selection=1.25, deadline_s=100.0)
    world.devices.append(type(world.devices[0])(world, 99))
    world.devices[-1].enroll(world.token())
    cohort = world.gather(task)
    assert len(cohort) == 5
    cohort[0][0].report(cohort[0][1])
    yield world, task, cohort
    for device, assigned in cohort[:4]:
        device.report(assigned)
    world.settle()
    (summary,) = world.rounds(task)
    assert (summary.state, summary.num_reported) == ("scrubbed", 4)
    codec = cohort[0][0].codec(cohort[0][1])
    total = codec.empty()
    for device, assigned in cohort[:4]:
        codec.add(total, device.contribution(assigned))
    expected = codec.decode(total)
    assert summary.weight == expected.weight
    assert {name: value.sum for name, value in summary.metrics.items()} == {
        name: value.sum for name, value in expected.metrics.items()
    }


def with_main(contribution, main):
    return encode_contribution(Contribution(main, contribution.aux, contribution.bits))


def with_aux(contribution, aux):
    return Contribution(contribution.main, aux, contribution.bits)


def bad_bodies(device, assigned):
    good = device.contribution(assigned)
    assert good.bits == 16
    body = encode_contribution(good)
    weight = good.aux.copy()
    weight[0] = 2**20
    nobody = good.aux.copy()
    nobody[1] = 0
    huge = good.aux.copy()
    huge[3] = 2**60
    large = good.main.copy()
    large[0] = 2**15 - 1
    return {
        "empty": (b"", BadFrame),
        "cut short": (body[:-1], BadFrame),
        "one byte too long": (body + b"\0", TooLarge),
        "a megabyte too long": (body + bytes(2**20), TooLarge),
        "another magic": (b"HSP9" + body[4:], BadFrame),
        "another word size": (body[:4] + b"\x20" + body[5:], BadFrame),
        "a shorter update": (with_main(good, good.main[:-2]) + bytes(4), BadFrame),
        "metrics for parameters": (
            with_main(with_aux(good, np.append(good.aux, np.uint64(0))), good.main[:-4]),
            ShapeMismatch,
        ),
        "beyond the clip bound": (with_main(good, large), NumericFailure),
        "too much weight": (encode_contribution(with_aux(good, weight)), NumericFailure),
        "no device": (encode_contribution(with_aux(good, nobody)), NumericFailure),
        "an absurd metric": (encode_contribution(with_aux(good, huge)), NumericFailure),
    }


BAD_BODIES = (
    "empty", "cut short", "one byte too long", "a megabyte too long", "another magic",
    "another word size", "a shorter update", "metrics for parameters", "beyond the clip bound",
    "too much weight", "no device", "an absurd metric",
)  # fmt: skip


@pytest.mark.parametrize("what", BAD_BODIES)
def test_a_bad_body_is_named(stage, what):
    _, _, cohort = stage
    device, assigned = cohort[4]
    bodies = bad_bodies(device, assigned)
    assert set(bodies) == set(BAD_BODIES)
    body, error = bodies[what]
    with pytest.raises(error):
        device.report(assigned, body)


def test_a_refused_report_is_not_waited_for(stage):
    _, _, cohort = stage
    device, assigned = cohort[4]
    body, _ = bad_bodies(device, assigned)["too much weight"]
    with pytest.raises(NumericFailure):
        device.report(assigned, body)
    assert device.receipt(assigned).state == "void"
    with pytest.raises(Expired, match="refused"):
        device.report(assigned)


def test_the_same_report_again_has_the_same_receipt(stage):
    _, _, cohort = stage
    device, assigned = cohort[0]
    assert device.report(assigned) == device.report(assigned)


def test_another_report_for_the_same_assignment_is_a_conflict(stage):
    _, _, cohort = stage
    device, assigned = cohort[0]
    altered = bytearray(device.body(assigned))
    altered[-1] ^= 1
    with pytest.raises(ReportConflict):
        device.report(assigned, bytes(altered))


def test_an_unknown_assignment(stage):
    _, _, cohort = stage
    device, _ = cohort[4]
    with pytest.raises(NotFound):
        device.call(Receipt, "PUT", "/v1/assignments/" + "0" * 32 + "/report", b"x")


def test_another_devices_assignment(stage):
    _, _, cohort = stage
    with pytest.raises(NotAllowed):
        cohort[3][0].report(cohort[4][1], cohort[4][0].body(cohort[4][1]))
    with pytest.raises(NotAllowed):
        cohort[3][0].abort(cohort[4][1])


def test_a_signature_over_another_body(stage):
    world, _, cohort = stage
    device, assigned = cohort[4]
    path = f"/v1/assignments/{assigned.assignment_id}/report"
    body = device.body(assigned)
    headers = request_headers(
        device.key, device.device_id, "PUT", path, world.clock.now(), body[:-1] + b"\xff"
    )
    with pytest.raises(NotAuthentic):
        device.send(Receipt, "PUT", path, body, headers)
    assert device.receipt(assigned).state == "expected"


def put(world, path, headers, receive):
    """A request as the server sees it, byte for byte; what it sends back."""
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "PUT",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode(), v.encode()) for k, v in headers.items()],
    }
    world.transport.run(world.app(scope, receive, send))
    return sent


def test_a_body_whose_sender_disappears(stage):
    """The connection breaks in the middle: nobody is there to answer, and nothing was taken."""
    world, _, cohort = stage
    device, assigned = cohort[4]
    body = device.body(assigned)
    path = f"/v1/assignments/{assigned.assignment_id}/report"
    headers = request_headers(device.key, device.device_id, "PUT", path, world.clock.now(), body)
    messages = [
        {"type": "http.request", "body": body[:20], "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive():
        return messages.pop(0)

    sent = put(world, path, headers, receive)
    assert sent[0]["status"] == 400
    assert b"cut short" in sent[1]["body"]
    assert device.receipt(assigned).state == "expected"


def test_a_body_that_never_ends_in_time(make_world):
    world = make_world(3, upload_timeout_s=0.05)
    cohort = world.gather(world.create_task(goal=3))
    device, assigned = cohort[0]
    path = f"/v1/assignments/{assigned.assignment_id}/report"
    headers = request_headers(device.key, device.device_id, "PUT", path, world.clock.now(), b"")

    async def receive():
        await asyncio.Event().wait()

    sent = put(world, path, headers, receive)
    assert b"took too long" in sent[1]["body"]


def test_after_the_round_a_replay_changes_nothing(make_world):
    world = make_world(4)
    task = world.create_task()
    cohort = world.gather(task)
    for device, assigned in cohort:
        device.report(assigned)
    world.settle()
    head = world.task(task).head
    device, assigned = cohort[0]
    again = device.report(assigned)
    assert (again.state, again.checkpoint) == ("included", head)
    with pytest.raises(ReportConflict):
        device.report(assigned, device.body(assigned)[:-1] + b"\x07")
    assert world.task(task).head == head
