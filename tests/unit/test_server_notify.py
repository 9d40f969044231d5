"""Bells: nothing rung between looking and waiting is missed; closing ends every wait."""

from __future__ import annotations

import asyncio

from homespun.server.notify import Notices


def test_a_ring_before_the_wait_is_not_missed():
    async def scene():
        notices = Notices()
        with notices.listen("a") as bell:
            notices.ring("a")
            assert await bell.wait(10.0)
            assert not await bell.wait(0.001)

    asyncio.run(scene())


def test_a_ring_wakes_all_who_listen_to_its_topic_and_nobody_else():
    async def scene():
        notices = Notices()
        with notices.listen("a") as one, notices.listen("a") as two, notices.listen("b") as other:
            waits = [asyncio.create_task(bell.wait(10.0)) for bell in (one, two)]
            await asyncio.sleep(0)
            notices.ring("a", "nobody listens here")
            assert await asyncio.gather(*waits) == [True, True]
            assert not await other.wait(0.001)

    asyncio.run(scene())


def test_topics_are_forgotten_with_their_last_listener():
    async def scene():
        notices = Notices()
        with notices.listen("a"), notices.listen("a"):
            assert len(notices._bells) == 1
        assert notices._bells == {}

    asyncio.run(scene())


def test_closing_ends_waits_now_and_later():
    async def scene():
        notices = Notices()
        with notices.listen("a") as bell:
            wait = asyncio.create_task(bell.wait(10.0))
            await asyncio.sleep(0)
            notices.close()
            assert not await wait
            assert not await bell.wait(10.0)
        with notices.listen("a") as late:
            assert not await late.wait(10.0)

    asyncio.run(scene())
