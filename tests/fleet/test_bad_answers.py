"""Every bad answer in a group is a named error to its device; the sum is that of the others, or of all."""

from __future__ import annotations

import base64
import json

import httpx
import pytest

from homespun.errors import (
    BadFrame,
    BadRoster,
    BadShare,
    BadSignature,
    Conflict,
    HomespunError,
    NotAllowed,
    NotAuthentic,
    NotFound,
    ShapeMismatch,
    TooLarge,
    WrongStep,
)
from homespun.protocol.messages import Aggregation, GroupReply, Settled, Waiting, encode
from homespun.protocol.signing import request_headers
from homespun.rng import stream
from homespun.secagg import device as secagg
from tests.fleet.member import STEP_S, STEPS, Member, included, plain_checkpoint, play

HEADER = 12  # of a frame
SIGNATURE = 64


@pytest.fixture
def stage(make_world):
    """A round of five, and a check that it ends with the exact sum of those that were honest in the end."""
    world = make_world(5)
    task = world.create_task(aggregation=Aggregation.SECURE, goal=5, minimum=4)
    members = world.members(task)
    yield members
    play(world, members)
    (summary,) = world.rounds(task)
    counted = included(members)
    assert (summary.state, summary.num_reported) == ("scrubbed", len(counted))
    assert {*map(id, members[:4])} <= {*map(id, counted)}
    assert summary.checkpoint == plain_checkpoint(world, counted)


def until(step, members):
    for _ in range(10):
        for member in members:
            if member.asked != step:
                member.step()
    assert {member.asked for member in members} == {step}


def honest(member):
    """What the device would say now, and the state in which it would be then."""
    state = member.state
    step, body = member.answer(member.last)
    member.state = state
    return step, body


def altered(body, **fields):
    return json.dumps(json.loads(body) | fields).encode()


def text(size, letter=b"x"):
    return base64.b64encode(letter * size).decode()


def bad_bodies(member, others):
    """For the step that is asked: what is wrong -> (body, error)."""
    step, body = honest(member)
    if step == "mask-input":
        flipped = bytearray(body)
        flipped[-1] ^= 1
        wide = body[:4] + b"\x20" + body[5:]
        d = (len(body) - HEADER - SIGNATURE - 8 * body[6]) // 2
        less = body[:8] + (d - 4).to_bytes(4, "little") + body[12:-8]
        other = body[:6] + b"\x01" + body[7:8] + (d + 4 * (body[6] - 1)).to_bytes(4, "little")
        return {
            "empty": (b"", BadFrame),
            "cut short": (body[:-1], BadFrame),
            "one byte too long": (body + b"\0", TooLarge),
            "a megabyte too long": (body + bytes(2**20), TooLarge),
            "an unmasked report": (member.device.body(member.assigned), BadFrame),
            "other bits": (wide, BadFrame),
            "fewer words": (less, BadFrame),
            "another layout of the same length": (other + body[12:], ShapeMismatch),
            "another vector than was signed": (bytes(flipped), BadSignature),
        }
    cases: dict[str, tuple[bytes, type[HomespunError]]] = {
        "empty": (b"", BadFrame),
        "no JSON": (b"{", BadFrame),
        "another type": (b"[]", BadFrame),
        "an unknown field": (altered(body, more=1), BadFrame),
        "too large": (body + b" " * 70_000, TooLarge),
        "no base64": (altered(body, **{next(iter(json.loads(body))): "?"}), BadFrame),
    }
    match step:
        case "advertise-keys":
            theirs = honest(others[0])[1]
            cases["somebody else's keys"] = (theirs, NotAllowed)
            cases["keys that were not signed"] = (altered(body, c_key=text(32)), BadSignature)
            cases["a short key"] = (altered(body, c_key=text(31)), BadFrame)
        case "share-keys":
            sealed = json.loads(body)["sealed"]
            cases["a share too few"] = (altered(body, sealed=sealed[1:]), BadShare)
            cases["a share too many"] = (altered(body, sealed=[*sealed, sealed[0]]), BadShare)
            cases["a short share"] = (altered(body, sealed=[text(79), *sealed[1:]]), BadFrame)
        case "agree":
            cases["a wrong signature"] = (altered(body, signature=text(64)), BadSignature)
            cases["somebody else's signature"] = (honest(others[0])[1], BadSignature)
        case "unmask":
            shares = json.loads(body)["shares"]
            cases["a share too few"] = (altered(body, shares=shares[1:]), BadShare)
            cases["a share too many"] = (altered(body, shares=[*shares, shares[0]]), BadShare)
            cases["a long share"] = (altered(body, shares=[text(33), *shares[1:]]), BadFrame)
    return cases


@pytest.mark.parametrize("step", STEPS)
def test_a_bad_answer_is_named_and_may_be_made_good(stage, step):
    until(step, stage)
    member = stage[4]
    for what, (body, error) in bad_bodies(member, stage[:4]).items():
        with pytest.raises(error) as caught:
            member.put(step, body)
        assert type(caught.value) is error, what
        assert type(member.ask()) is type(stage[0].last), what


@pytest.mark.parametrize("step", STEPS)
def test_another_answer_after_the_first_is_refused(stage, step):
    until(step, stage)
    member = stage[4]
    before = member.last
    member.step()
    match step:
        case "advertise-keys":
            second = fresh_keys(member, before)
        case "mask-input":
            second = another_masked_input(stage)
        case _:
            name, values = next(
                (name, value) for name, value in json.loads(member.sent[step]).items()
            )
            changed = text(len(base64.b64decode(values))) if isinstance(values, str) else None
            second = altered(member.sent[step], **{name: changed or [values[-1], *values[1:]]})
    with pytest.raises(WrongStep):
        member.put(step, second)


def fresh_keys(member, terms):
    """What the device would say if it had forgotten its first keys."""
    other = Member(member.device, member.assigned, member.task_name, num_drawn=100)
    return other.answer(terms)[1]


def another_masked_input(members):
    """The same vectors and masks, with other bytes that verify."""
    member = members[4]
    body = bytearray(member.sent["mask-input"])
    body[HEADER] ^= 1
    return bytes(body)


@pytest.mark.parametrize("step", STEPS)
def test_answers_to_other_steps_than_the_one_asked(stage, step):
    """Too early, by a member; what it sends is well-formed, because others have sent it."""
    until(step, stage)
    member = stage[4]
    for other in STEPS[STEPS.index(step) + 1 :]:
        if step == "advertise-keys":  # it is in no group yet: it is told to join one
            if other != "mask-input":
                reply = member.put(other, well_formed(other))
                assert type(reply) is type(member.last)
        elif other != "mask-input":
            with pytest.raises(WrongStep):
                member.put(other, well_formed(other))


def well_formed(step):
    return json.dumps(
        {
            "share-keys": {"sealed": 4 * [text(80)], "commitment": text(32)},
            "agree": {"signature": text(64)},
            "unmask": {"shares": 5 * [text(32)]},
        }[step]
    ).encode()


def test_a_masked_input_before_its_time(stage):
    until("mask-input", stage)
    early = honest(stage[4])[1]
    other = stage[0]
    world = other.device.world
    # The same layout in a round whose group still collects keys.
    task = world.create_task(
        name="second", aggregation=Aggregation.SECURE, goal=5, minimum=4, seed=8
    )
    members = world.members(task)
    reply = members[4].put("mask-input", early)
    assert type(reply) is type(members[4].ask())
    until("share-keys", members)
    with pytest.raises(WrongStep):
        members[4].put("mask-input", early)
    until("mask-input", members)
    with pytest.raises(BadSignature):
        members[4].put("mask-input", early)


def test_only_the_holder_of_an_assignment_asks_and_answers(stage):
    until("share-keys", stage)
    first, second = stage[:2]
    step, body = honest(first)
    path = f"{first.path}/{step}"
    with pytest.raises(NotAllowed):
        second.device.call(GroupReply, "PUT", path, body)
    with pytest.raises(NotAllowed):
        second.device.call(GroupReply, "GET", first.path)
    with pytest.raises(NotFound):
        second.device.call(GroupReply, "GET", "/v1/assignments/" + "0" * 32 + "/group")
    with pytest.raises(NotFound, match="no such step"):
        first.device.call(GroupReply, "PUT", f"{first.path}/more", body)
    headers = request_headers(
        first.device.key, first.device.device_id, "PUT", path, first.device.world.clock.now(), b"{}"
    )
    with pytest.raises(NotAuthentic):
        first.device.send(GroupReply, "PUT", path, body, headers)
    assert type(first.ask()) is type(second.last)


def test_a_key_that_another_member_has(stage):
    first, second = stage[:2]
    for member in (first, second):
        member.ask()
    first.step()
    stolen = secagg.load(first.state)
    keys = stolen.keys
    draws = iter([stolen.c_secret, bytes(range(32)), bytes(range(32)), bytes(16)])
    _, copied = secagg.advertise_keys(
        second.last,
        second.work,
        second.demands,
        second.device.public,
        second.device.key,
        lambda _: next(draws),
    )
    assert copied.c_key == keys.c_key
    with pytest.raises(BadRoster):
        second.put("advertise-keys", encode(copied))


def test_shares_that_do_not_open_end_a_group_and_nothing_else(make_world):
    """One device's sealed shares are noise: its neighbours take no further part in this attempt."""
    world = make_world(5)
    task = world.create_task(aggregation=Aggregation.SECURE, goal=5, minimum=4)
    members = world.members(task)
    until("share-keys", members)
    liar, *others = members
    _, body = honest(liar)
    liar.send("share-keys", altered(body, sealed=4 * [text(80)]))
    until("mask-input", others)
    for member in others:
        with pytest.raises(BadShare):
            member.answer(member.last)
        assert member.device.abort(member.assigned).state == "void"
    world.pass_time(STEP_S)
    world.pass_time(task.spec.deadline_s)
    first, second = world.rounds(task)
    assert (first.state, second.state) == ("abandoned", "open")
    assert first.groups[0].reason == "too few devices sent masked input"
    again = world.members(task, attempt=2)
    play(world, again)
    assert included(again) == again
    assert world.rounds(task)[1].checkpoint == plain_checkpoint(world, again)


def test_a_false_share_opens_nothing(make_world):
    """The sum cannot be opened with it; the group says so, and nothing wrong is ever committed."""
    world = make_world(3)
    task = world.create_task(aggregation=Aggregation.SECURE, goal=3)
    members = world.members(task)
    until("unmask", members)
    liar = members[0]
    shares = json.loads(honest(liar)[1])["shares"]
    liar.send("unmask", json.dumps({"shares": [text(32), *shares[1:]]}).encode())
    play(world, members)
    first, second = world.rounds(task)
    assert (first.state, first.checkpoint, second.state) == ("abandoned", None, "open")
    assert first.groups[0].reason == "shares give another secret than was committed to"
    assert {m.device.receipt(m.assigned).state for m in members} == {"void"}


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_each_task_takes_reports_in_its_own_way_only(make_world, aggregation):
    world = make_world(4)
    task = world.create_task(aggregation=aggregation)
    cohort = world.gather(task)
    device, assigned = cohort[0]
    member = Member(device, assigned, task.spec.name)
    if aggregation is Aggregation.SECURE:
        with pytest.raises(Conflict, match="aggregated secure"):
            device.report(assigned)
    else:
        member.last = Waiting(retry=task.spec.retry)
        for ask in (
            member.ask,
            lambda: member.put("advertise-keys", well_formed("agree")),
            lambda: member.put("mask-input", b"x"),
        ):
            with pytest.raises(Conflict, match="aggregated plain"):
                ask()
    assert device.receipt(assigned).state == "expected"
    world.report(task, cohort)
    summary = world.rounds(task)[0]
    assert (summary.state, summary.num_reported) == ("scrubbed", 4)
    assert len(summary.groups) == (aggregation is Aggregation.SECURE)


def test_after_the_round_every_repetition_has_the_receipt(make_world):
    world = make_world(4)
    task = world.create_task(aggregation=Aggregation.SECURE)
    members = world.members(task)
    play(world, members)
    head, rng = world.task(task).head, stream(1)
    for member in members:
        for step in rng.permutation(list(member.sent)):
            reply = member.put(step, member.sent[step])
            assert isinstance(reply, Settled)
            assert (reply.receipt.state, reply.receipt.checkpoint) == ("included", head)
        response = member.device.call(httpx.Response, "GET", member.path)
        assert json.loads(response.content)["type"] == "settled"
    assert world.task(task).head == head
