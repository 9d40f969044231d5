"""The byte budget: never exceeded, fair to populations, nothing lost when somebody gives up."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from homespun.server.intake import ByteBudget


def test_what_does_not_fit_waits_its_turn():
    async def scene():
        budget, order = ByteBudget(10), []

        async def use(name, size):
            async with budget.hold(size):
                order.append(name)
                await asyncio.sleep(0)

        async with budget.hold(8):
            tasks = [asyncio.create_task(use(name, size)) for name, size in (("a", 5), ("b", 1))]
            for _ in range(5):
                await asyncio.sleep(0)
            assert order == []  # b would fit, but a was first
        await asyncio.gather(*tasks)
        assert order == ["a", "b"]

    asyncio.run(scene())


def test_a_population_that_holds_little_goes_before_one_that_holds_much():
    async def scene():
        budget, order = ByteBudget(10), []

        async def use(population):
            async with budget.hold(5, population):
                order.append(population)

        async with budget.hold(5, "large"):
            async with budget.hold(5, "large"):
                waiting = [*("large",) * 3, "small", "large", "small"]
                tasks = [asyncio.create_task(use(population)) for population in waiting]
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert order == ["small", "small", "large", "large", "large", "large"]

    asyncio.run(scene())


def test_more_than_the_whole_budget_waits_for_all_of_it():
    async def scene():
        budget = ByteBudget(10)
        async with budget.hold(100):
            task = asyncio.create_task(hold_once(budget, 1))
            await asyncio.sleep(0)
            assert not task.done()
        await task

    asyncio.run(scene())


async def hold_once(budget, size):
    async with budget.hold(size):
        pass


def test_whoever_gives_up_leaves_nothing_behind():
    async def scene():
        budget = ByteBudget(10)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(budget.hold(10))
            waiting = asyncio.create_task(hold_once(budget, 10))
            cancelled_as_it_is_freed = asyncio.create_task(hold_once(budget, 10))
            served_and_cancelled = asyncio.create_task(hold_once(budget, 10))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            cancelled_as_it_is_freed.cancel()
        served_and_cancelled.cancel()  # its turn has come, but it has not run yet
        with pytest.raises(asyncio.CancelledError):
            await served_and_cancelled
        await asyncio.wait_for(hold_once(budget, 10), 5)

    asyncio.run(scene())
