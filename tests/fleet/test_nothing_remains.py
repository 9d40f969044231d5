"""After a round, nothing of a single device is left: not in any file of the server, and in no line of its log."""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping

import pytest
import structlog

from homespun.protocol.frame import encode_contribution, encode_masked_input
from homespun.protocol.messages import Aggregation
from homespun.secagg import device as secagg
from homespun.secagg.messages import MaskedInput
from homespun.tensors.packing import pack
from tests.fleet.member import STEP_S, play
from tests.fleet.world import synthetic_plan

NUM_DEVICES = 9


class Said(logging.Handler):
    """All that goes to the log, in whichever way, with every value that goes with it."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.text = b""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == "httpx":  # that is the devices' side
            return
        self.write(f"{record.getMessage()} {record.exc_info}", record.__dict__)

    def write(self, text: str, values: Mapping[str, object]) -> None:
        words = [text, *(f"{name}={value}" for name, value in values.items())]
        self.text += " ".join(words).encode() + b"\n"

    def entry(self, _logger, method, event):
        self.write(method, event)
        raise structlog.DropEvent


@pytest.fixture
def said():
    handler, root = Said(), logging.getLogger()
    before = root.level
    configuration = structlog.get_config()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    structlog.configure(processors=[handler.entry])
    yield handler
    structlog.configure(**configuration)
    root.removeHandler(handler)
    root.setLevel(before)


def forms(data):
    """The bytes themselves, and as they look in JSON, in hexadecimal and in a line of Python."""
    yield data
    for start in range(3):  # base64 of them inside something longer
        yield base64.b64encode(b"\0" * start + data)[4 : len(data) * 4 // 3 - 4]
    yield data.hex().encode()
    yield repr(data)[2:-1].encode()


def needles(members):
    """What must never be found: name -> bytes. Of vectors a long piece, so that no chance makes a match."""
    found = {}
    for member in members:
        name = f"device {member.device.index}: "
        contribution = member.contribution
        found[name + "contribution"] = contribution.main.tobytes()[:40]
        found[name + "contribution, packed"] = bytes(pack(contribution.main, contribution.bits))[
            :40
        ]
        found[name + "weights and metrics"] = contribution.aux.tobytes()
        found[name + "body"] = encode_contribution(contribution)[-40:]
        state = secagg.load(member.state)
        found |= {
            name + "c secret": state.c_secret,
            name + "s secret": state.s_secret,
            name + "seed": state.seed,
        }
        if isinstance(state, secagg.Shared):
            for number, sealed in enumerate(state.share_keys.sealed):
                found[f"{name}sealed share {number}"] = sealed
        if isinstance(state, secagg.Masked):
            for owner, share in state.shares.items():
                found[f"{name}share of {owner}'s mask key"] = share[:32]
                found[f"{name}share of {owner}'s seed"] = share[32:]
        if "mask-input" in member.sent:
            body = member.sent["mask-input"]
            found[name + "masked main"] = body[-40:]
            found[name + "masked aux"] = body[12 + 64 :][: contribution.aux.nbytes]
            found[name + "signature of its masked input"] = body[12 : 12 + 64]
    return found


def names(members):
    """What tells who took part: of devices that are known to the server anyway, the tickets."""
    return {f"device {m.device.index}: ticket": m.assigned.assignment_id.encode() for m in members}


def search(haystacks, wanted):
    """Names of what occurs in one of the haystacks."""
    return sorted(
        {
            name
            for name, data in wanted.items()
            for form in forms(data)
            for haystack in haystacks
            if form in haystack
        }
    )


def files(world):
    """Every byte under the server's data directory."""
    return [p.read_bytes() for p in world.settings.data_dir.rglob("*") if p.is_file()]


def public_keys(members):
    return {str(m.device.index): secagg.load(m.state).keys.c_key for m in members if m.state}


def through_all_steps(world, task):
    """A group of nine in which one device is lost before each step after the first but the last two."""
    members = world.members(task)
    for member, step in zip(members, ("share-keys", "mask-input"), strict=False):
        member.leaves_at = step
    return members


@pytest.mark.parametrize("ends", ["committed", "abandoned", "stopped"])
def test_nothing_of_a_single_device_remains(make_world, said, ends):
    world = make_world(NUM_DEVICES, plan=synthetic_plan((60, 40)))
    task = world.create_task(
        aggregation=Aggregation.SECURE, goal=NUM_DEVICES, minimum=7, deadline_s=3 * STEP_S
    )
    members = through_all_steps(world, task)
    if ends != "committed":
        for member in members[2:]:
            member.leaves_at = "unmask"
    found_before = set()
    for _ in range(8):
        for member in members:
            member.step()
            found_before |= set(search(files(world), needles([member]) if member.state else {}))
        if not any(m.asked and not m.gone for m in members):
            world.pass_time(STEP_S)
        if world.rounds(task)[0].state == "unmasking" and ends == "stopped":
            break
    # What the devices sent lies in the group's snapshot while it is needed; what they kept to themselves never does.
    kinds = {name.partition(": ")[2].split()[0] for name in found_before}
    assert kinds == {"sealed", "masked"}
    if ends == "stopped":
        assert search(files(world), public_keys(members))
        assert search(files(world), names(members))
        world.operate(dict, "POST", f"/tasks/{task.task_id}/stop")
    else:
        play(world, members)
    world.settle()
    expected = {"committed": "scrubbed", "abandoned": "abandoned", "stopped": "cancelled"}[ends]
    assert world.rounds(task)[0].state == expected
    wanted = needles(members) | public_keys(members) | names(members)
    assert len(wanted) > 20 * NUM_DEVICES
    assert search([*files(world), said.text], wanted) == []
    assert b"round" in said.text
    if ends == "abandoned":
        assert b"group void" in said.text


def test_the_search_finds_what_is_there(make_world, tmp_path, said):
    """In a file and in the log, as bytes, in JSON, in hexadecimal and in a traceback."""
    world = make_world(3, plan=synthetic_plan((60, 40)))
    task = world.create_task(aggregation=Aggregation.SECURE, goal=3)
    members = world.members(task)
    play(world, members)
    wanted = needles(members)
    assert any(name.endswith("masked main") for name in wanted)
    for name, data in wanted.items():
        for form in (
            b"..." + data + b"...",
            base64.b64encode(b"before" + data + b"after"),
            data.hex().encode(),
            f"{data!r}".encode(),
        ):
            planted = tmp_path / "planted"
            planted.write_bytes(form)
            assert name in search([planted.read_bytes()], {name: data}), name
    secret = secagg.load(members[0].state).seed
    for write in (
        lambda: logging.getLogger("x").debug("oh %s", secret),
        lambda: structlog.get_logger().info("oh", value=secret),
        lambda: logging.getLogger("x").info("oh", extra={"value": secret.hex()}),
    ):
        said.text = b""
        write()
        assert search([said.text], {"seed": secret}) == ["seed"]


def test_the_masked_input_says_nothing_that_the_search_would_miss(make_world):
    """The needles are what travels: a masked input is the frame of its vectors and signature."""
    world = make_world(3, plan=synthetic_plan((60, 40)))
    task = world.create_task(aggregation=Aggregation.SECURE, goal=3)
    members = world.members(task)
    play(world, members)
    member = members[0]
    contribution = member.contribution
    body = member.sent["mask-input"]
    state = secagg.load(member.state)
    assert isinstance(state, secagg.Masked)
    aux = body[76 : 76 + contribution.aux.nbytes]
    main = body[76 + contribution.aux.nbytes :]
    again = MaskedInput(main=main, aux=aux, signature=body[12:76])
    assert encode_masked_input(again, 16) == body
    assert main != contribution.main.tobytes()
