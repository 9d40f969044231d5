"""Long polls: woken by what they wait for, at once, and without asking the database meanwhile."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from homespun.protocol.messages import Assigned, Claim, Waiting
from homespun.protocol.views import Event

LONG_S = 20.0
"""No test waits this long: what wakes them is the point."""


def when_waiting(world, count, topic_start):
    """Wait until `count` bells hang on topics that start so."""
    while True:
        bells = world.deployment.notices._bells
        if sum(len(v) for k, v in list(bells.items()) if k.startswith(topic_start)) >= count:
            return
        time.sleep(0.001)


def test_a_check_in_waits_for_an_offer_or_a_release(make_world):
    world = make_world(2)
    plan = world.push_plan().hash
    checkpoint = world.push_checkpoint(plan).hash
    with ThreadPoolExecutor() as pool:
        polls = [pool.submit(device.check_in, LONG_S) for device in world.devices]
        when_waiting(world, 2, "population")
        world.release(plan, checkpoint, "1")
        for poll in polls:
            assert poll.result(timeout=10).releases[0].sequence == 1
        polls = [pool.submit(device.check_in, LONG_S) for device in world.devices]
        when_waiting(world, 2, "population")
        world.create_task()
        for poll in polls:
            assert len(poll.result(timeout=10).offers) == 1


def test_a_claim_waits_for_the_draw(make_world):
    world = make_world(4)
    task = world.create_task()
    with ThreadPoolExecutor() as pool:
        claims = [pool.submit(device.claim, task, 1, 1, LONG_S) for device in world.devices]
        replies = [claim.result(timeout=10) for claim in claims]
    assert all(isinstance(reply, Assigned) for reply in replies)


def test_a_claim_that_waits_in_vain_says_so(make_world):
    world = make_world(4)
    task = world.create_task()
    reply = world.devices[0].claim(task, 1, wait_s=0.02)
    assert isinstance(reply, Waiting)
    assert reply.retry.latest_s < 15.0
    assert Claim.__struct_fields__[-1] == "wait_s"


def test_events_can_be_waited_for(make_world):
    world = make_world(0)
    (created,) = world.operate(list[Event], "GET", "/events")
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(
            world.operate, list[Event], "GET", "/events", after=created.sequence, wait_s=LONG_S
        )
        when_waiting(world, 1, "events")
        world.create_task()
        assert poll.result(timeout=10)[0].kind == "task.created"


def test_waiting_devices_do_not_touch_the_database(make_world):
    world = make_world(3)
    read, reads = world.deployment.store.database.read, []

    def counted():
        reads.append(threading.current_thread().name)
        return read()

    for device in world.devices:
        device.check_in()
    world.deployment.store.database.read = counted
    with ThreadPoolExecutor() as pool:
        polls = [pool.submit(device.check_in, 0.2) for device in world.devices]
        assert all(poll.result().offers == () for poll in polls)
    assert reads == []


def test_stopping_the_server_ends_every_wait(make_world):
    world = make_world(1)
    with ThreadPoolExecutor() as pool:
        poll = pool.submit(world.devices[0].check_in, LONG_S)
        when_waiting(world, 1, "population")
        world.transport.run(close(world))
        assert poll.result(timeout=10).offers == ()


async def close(world):
    world.deployment.notices.close()
