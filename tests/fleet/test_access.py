"""Who may do what: enrolment, tokens, signatures, populations, the operator."""

from __future__ import annotations

import base64

import httpx
import pytest

from homespun.errors import (
    BadFrame,
    Conflict,
    HomespunError,
    InvalidConfig,
    InvalidInput,
    NotAllowed,
    NotAuthentic,
    NotFound,
    PlanError,
    ShapeMismatch,
    TooLarge,
    UntrustedPlan,
)
from homespun.plan.initial import initial_checkpoint
from homespun.protocol.messages import CheckIn, CheckInReply, Enroll, Enrolled, encode
from homespun.protocol.problem import error_from_problem
from homespun.protocol.signing import request_headers
from homespun.protocol.tasks import OptimizerSpec
from homespun.protocol.views import Event, PopulationView, TaskView
from homespun.tensors import codec as tensors
from tests.fleet.device import POPULATION, Device
from tests.fleet.world import synthetic_plan


def num_devices(world):
    (view,) = world.operate(list[PopulationView], "GET", "/populations")
    return view.num_devices


def test_a_token_counts_a_device_once(make_world):
    world = make_world(0)
    token = world.token(max_uses=2)
    first, second, third = (Device(world, index) for index in range(3))
    enrolled = first.enroll(token)
    assert enrolled.device_id == first.device_id
    assert enrolled.publisher_keys == (
        base64.b64encode(world.deployment.keys.publisher_public).decode(),
    )
    assert first.enroll(token) == enrolled
    second.enroll(token)
    with pytest.raises(NotAuthentic, match="used up"):
        third.enroll(token)
    assert first.enroll(token) == enrolled
    assert num_devices(world) == 2


def test_tokens_expire_and_can_be_revoked(make_world):
    world = make_world(0)
    device = Device(world, 0)
    token = world.token(expires_s=10.0)
    world.clock.advance(10.0)
    with pytest.raises(NotAuthentic, match="expired"):
        device.enroll(token)
    view = world.operate(dict, "POST", f"/populations/{POPULATION}/tokens", {})
    for _ in range(2):
        world.operate(None, "DELETE", f"/populations/{POPULATION}/tokens/{view['token_id']}")
    with pytest.raises(NotAuthentic, match="not valid"):
        device.enroll(view["token"])
    with pytest.raises(NotAuthentic, match="not valid"):
        device.enroll("guess")
    with pytest.raises(NotFound):
        world.operate(None, "DELETE", f"/populations/{POPULATION}/tokens/0000")
    assert num_devices(world) == 0


def test_a_token_opens_its_population_only(make_world):
    world = make_world(1)
    world.operate(dict, "POST", "/populations", {"name": "others"})
    with pytest.raises(NotAuthentic):
        world.devices[0].enroll(world.token(), "others")
    message = encode(CheckIn(population="others"))
    with pytest.raises(NotAllowed):
        world.devices[0].call(CheckInReply, "POST", "/v1/check-in", message)
    view = world.operate(dict, "POST", "/populations/others/tokens", {})
    world.devices[0].enroll(view["token"], "others")
    world.devices[0].call(CheckInReply, "POST", "/v1/check-in", message)


def test_enrolling_with_a_key_that_one_does_not_hold(make_world):
    world = make_world(0)
    device, victim = Device(world, 0), Device(world, 1)
    message = Enroll(
        population=POPULATION,
        token=world.token(),
        public_key=base64.b64encode(victim.public).decode(),
    )
    with pytest.raises(NotAuthentic):
        device.call(Enrolled, "POST", "/v1/enroll", encode(message))
    bad = Enroll(population=POPULATION, token="t", public_key="AAAA")
    with pytest.raises(NotAuthentic, match="Ed25519"):
        device.call(Enrolled, "POST", "/v1/enroll", encode(bad))


def test_requests_must_be_signed_now_and_by_a_known_device(make_world):
    world = make_world(1)
    device, stranger = world.devices[0], Device(world, 7)
    body = encode(CheckIn(population=POPULATION))
    with pytest.raises(NotAuthentic, match="not enrolled"):
        stranger.check_in()
    headers = request_headers(
        stranger.key, device.device_id, "POST", "/v1/check-in", world.clock.now(), body
    )
    with pytest.raises(NotAuthentic, match="does not verify"):
        device.send(CheckInReply, "POST", "/v1/check-in", body, headers)
    headers = request_headers(
        device.key, device.device_id, "POST", "/v1/check-in", world.clock.now(), body
    )
    with pytest.raises(NotAuthentic):  # a signature for one path is none for another
        device.send(CheckInReply, "POST", "/v1/claim", body, headers)
    world.clock.advance(301.0)
    with pytest.raises(NotAuthentic, match="time"):
        device.send(CheckInReply, "POST", "/v1/check-in", body, headers)
    with pytest.raises(NotAuthentic):
        device.send(CheckInReply, "POST", "/v1/check-in", body, {})
    with pytest.raises(BadFrame):
        device.call(CheckInReply, "POST", "/v1/check-in", b"{}")
    with pytest.raises(TooLarge):
        device.call(CheckInReply, "POST", "/v1/check-in", b" " * 70_000)


def test_devices_see_the_blobs_of_their_population_only(make_world):
    world = make_world(1)
    stored = world.push_plan()
    device = world.devices[0]
    path = f"/v1/blobs/{stored.hash}"
    with pytest.raises(NotFound):
        device.call(httpx.Response, "GET", path)
    world.create_task()
    assert tensors.digest(device.call(httpx.Response, "GET", path).content) == stored.hash
    with pytest.raises(NotFound):
        device.call(httpx.Response, "GET", "/v1/blobs/../homespun.db")
    with pytest.raises(NotFound):
        device.call(httpx.Response, "GET", "/v1/blobs/" + "0" * 64)


def test_the_operator_needs_the_token(make_world):
    world = make_world(0)
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
        response = world.http.get("/v1/operator/tasks", headers=headers)
        assert isinstance(error_from_problem(response.status_code, response.content), NotAuthentic)
    token_file = world.settings.data_dir / "operator.token"
    assert token_file.stat().st_mode & 0o777 == 0o600
    assert token_file.read_text().strip() == world.deployment.keys.operator_token
    assert world.http.get("/v1/health").json()["status"] == "ok"


def test_the_operators_mistakes_are_named(make_world):
    world = make_world(0)
    plan_hash = world.push_plan().hash
    checkpoint = world.push_checkpoint(plan_hash).hash
    with pytest.raises(NotFound):
        world.operate(dict, "POST", "/populations/nowhere/tokens", {})
    with pytest.raises(BadFrame):
        world.operate(dict, "POST", "/populations", {"name": "Not A Name"})
    with pytest.raises(PlanError):
        world.operate(dict, "POST", "/plans", b"no zip")
    with pytest.raises(BadFrame):
        world.operate(dict, "POST", "/checkpoints", b"no safetensors", plan_hash=plan_hash)
    with pytest.raises(NotFound):
        world.operate(dict, "POST", "/checkpoints", b"", plan_hash="0" * 64)
    with pytest.raises(InvalidInput, match="plan_hash"):
        world.operate(dict, "POST", "/checkpoints", b"")
    other = tensors.encode_tree(initial_checkpoint(synthetic_plan((3,)).manifest, 0))
    with pytest.raises(ShapeMismatch):
        world.operate(dict, "POST", "/checkpoints", other, plan_hash=plan_hash)
    with pytest.raises(InvalidConfig, match="minimum"):
        world.create_task(checkpoints=(checkpoint,), minimum=5, goal=4)
    with pytest.raises(InvalidConfig, match="optimizer"):
        world.create_task(checkpoints=(checkpoint,), optimizer=OptimizerSpec(name="Magic"))
    with pytest.raises(InvalidConfig, match="room"):
        world.create_task(checkpoints=(checkpoint,), bits=16, goal=40_000)
    with pytest.raises(NotFound, match="checkpoint"):
        world.create_task(checkpoints=("1" * 64,))
    with pytest.raises(NotFound, match="population"):
        world.create_task(checkpoints=(checkpoint,), population="nowhere")
    with pytest.raises(NotFound):
        world.operate(dict, "GET", "/tasks/none")
    with pytest.raises(NotFound):
        world.operate(dict, "GET", "/nothing")
    assert world.operate(list[TaskView], "GET", "/tasks") == []


def test_plans_of_others_are_not_published(make_world):
    world = make_world(0)
    stranger = Device(world, 0).key
    with pytest.raises(UntrustedPlan):
        world.operate(dict, "POST", "/plans", world.plan.sign(stranger).to_bytes())
    first = world.push_plan()
    signed = bytes(world.deployment.blobs.get(first.hash))
    assert world.operate(dict, "POST", "/plans", signed)["hash"] == first.hash


def test_creating_a_task_again_is_the_same_task(make_world):
    world = make_world(0)
    task = world.create_task()
    assert world.create_task().task_id == task.task_id
    with pytest.raises(Conflict, match="active task"):
        world.create_task(goal=5)
    world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    assert world.create_task(goal=5).task_id != task.task_id


def test_what_happens_is_told_in_order(make_world):
    world = make_world(4)
    task = world.create_task()
    world.run_round(task)
    events = world.operate(list[Event], "GET", "/events")
    assert [event.kind for event in events] == [
        "population.created",
        "task.created",
        "round.opened",
        "round.selected",
        "round.closed",
        "round.committed",
        "task.finished",
    ]
    assert [event.sequence for event in events] == sorted(event.sequence for event in events)
    later = world.operate(list[Event], "GET", "/events", after=events[-3].sequence)
    assert later == events[-2:]
    text = " ".join(event.text for event in events)
    assert not any(device.device_id in text for device in world.devices)


def test_an_unexpected_failure_tells_nothing_but_a_number(make_world):
    world = make_world(1)

    def broken(*_):
        raise RuntimeError("a secret about the inside")

    world.deployment.board.reply = broken
    with pytest.raises(HomespunError, match="something went wrong") as caught:
        world.devices[0].check_in()
    assert "secret" not in str(caught.value)
    assert len(str(caught.value.details["number"])) == 12


def test_the_api_describes_itself(make_world):
    world = make_world(0)
    document = world.http.get("/v1/operator/openapi.json").json()
    assert {"/tasks", "/plans", "/releases", "/events"} <= document["paths"].keys()
    text = str(document)
    for name in ("TaskSpec", "RoundSummary", "ReleaseView", "Evidence", "Criteria"):
        assert name in document["components"]["schemas"]
        assert f"#/components/schemas/{name}" in text
    assert world.http.get("/v1/operator/docs").status_code == 200
