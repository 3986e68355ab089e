"""A server that answers /generate with bodies that it was given, in a process of its own, as fast as it is asked."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

from aiohttp import web


@contextmanager
def answer_server(bodies: Sequence[bytes], together: int = 1) -> Iterator[str]:
    """URL of a server that answers the request with seed n by body n, modulo their number.

    Args:
        together: so many requests wait for each other before they are answered.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(list(bodies), together, there), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{here.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(bodies: Sequence[bytes], together: int, parent: Connection) -> None:
    asyncio.run(_listen(bodies, together, parent))


async def _listen(bodies: Sequence[bytes], together: int, parent: Connection) -> None:
    waiting: list[asyncio.Event] = []

    async def answer(request: web.Request) -> web.Response:
        asked = await request.json()
        complete = asyncio.Event()
        waiting.append(complete)
        if len(waiting) == together:
            for one in waiting:
                one.set()
            waiting.clear()
        await complete.wait()
        body = bodies[asked["sampling_params"]["sampling_seed"] % len(bodies)]
        return web.Response(body=body, content_type="application/json")

    app = web.Application(client_max_size=2**30)
    app.router.add_post("/generate", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
    parent.send(runner.addresses[0][1])
    await asyncio.Event().wait()
