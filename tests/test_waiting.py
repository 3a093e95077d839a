"""Blocking and awaiting give the same from one piece of code."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rl_mlx.waiting import Awaiting, Blocking, drive, iterate


async def _count(waiting, numbers):
    channel = waiting.channel()
    threading.Thread(target=lambda: [channel.put(n) for n in numbers]).start()
    for _ in numbers:
        yield await channel.get()


async def _sum(waiting, numbers):
    return sum([n async for n in _count(waiting, numbers)])


def test_both_ways_give_the_same():
    numbers = list(range(500))
    assert drive(_sum(Blocking(), numbers)) == sum(numbers)
    assert asyncio.run(_sum(Awaiting(), numbers)) == sum(numbers)
    assert list(iterate(_count(Blocking(), numbers))) == numbers


def test_functions_run_in_the_caller_or_beside_the_loop():
    assert drive(Blocking().run(threading.get_ident)) == threading.get_ident()

    async def main():
        return await Awaiting().run(threading.get_ident)

    assert asyncio.run(main()) != threading.get_ident()


def test_errors_come_through():
    async def fail(waiting):
        await waiting.run(int, "x")

    with pytest.raises(ValueError, match="invalid literal"):
        drive(fail(Blocking()))


def test_closing_the_iterator_closes_the_generator():
    closed = []

    async def numbers():
        try:
            for n in range(9):
                yield n
        finally:
            closed.append(True)

    iterator = iterate(numbers())
    assert next(iterator) == 0
    iterator.close()
    assert closed == [True]


def test_a_coroutine_that_really_waits_cannot_be_driven():
    with pytest.raises(AssertionError, match="suspend"):
        drive(asyncio.sleep(0))


def test_a_channel_outlives_its_loop():
    channels = []

    async def main():
        channels.append(Awaiting().channel())

    asyncio.run(main())
    channels[0].put(1)  # nobody listens any more, and nothing is raised
