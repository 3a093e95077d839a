"""Blocking and awaiting give the same from one piece of code."""

from __future__ import annotations

import asyncio
import threading

import pytest

from rl_mlx.waiting import Awaiting, Blocking, drive, iterate


async def _count(waiting, numbers):
    channel = waiting.channel()
    threading.Thread(target=lambda: [channel.put(n) for n in numbers]).start()
    left = len(numbers)
    while left:
        items = await channel.get()
        left -= len(items)
        for item in items:
            yield item


async def _sum(waiting, numbers):
    return sum([n async for n in _count(waiting, numbers)])


def test_both_ways_give_the_same():
    numbers = list(range(500))
    assert drive(_sum(Blocking(), numbers)) == sum(numbers)
    assert asyncio.run(_sum(Awaiting(), numbers)) == sum(numbers)
    assert asyncio.run(_sum(Awaiting(pace=0.001), numbers)) == sum(numbers)
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


def test_a_pace_holds_back_what_is_not_urgent():
    async def main():
        channel = Awaiting(pace=3600).channel()
        channel.put(1, urgent=False)
        first = await channel.get()
        channel.put(2, urgent=False)
        channel.put(3, urgent=False)
        getting = asyncio.create_task(channel.get())
        await asyncio.sleep(0.05)
        was_held = not getting.done()
        threading.Thread(target=channel.put, args=(4,)).start()
        return first, was_held, await getting

    assert asyncio.run(main()) == ([1], True, [2, 3, 4])


def test_what_was_held_back_comes_when_its_time_has_come():
    async def main():
        channel = Awaiting(pace=0.02).channel()
        found = []
        for n in range(3):
            channel.put(n, urgent=False)
            found += await channel.get()
        return found

    assert asyncio.run(main()) == [0, 1, 2]


def test_one_wake_up_serves_all_readers_and_none_is_lost():
    async def main():
        waiting = Awaiting()
        channels = [waiting.channel() for _ in range(20)]
        readers = [asyncio.create_task(_read(channel, 200)) for channel in channels]
        writer = threading.Thread(
            target=lambda: [c.put(n, urgent=False) for n in range(200) for c in channels]
        )
        writer.start()
        return await asyncio.gather(*readers)

    async def _read(channel, count):
        return [(await channel.get())[0] for _ in range(count)]

    assert asyncio.run(main()) == [list(range(200))] * 20
