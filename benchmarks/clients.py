"""Clients of a server, in a process of their own that imports nothing large:

    python -m benchmarks.clients PORT FILE CLIENTS SECONDS   prints what each request took, and all of them together

Each line of the file is the body of a request.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any


async def ask(port: int, bodies: list[bytes], num_clients: int, seconds: float) -> dict[str, Any]:
    """The seconds of every request of clients that each wait for an answer before they ask again, and how long it was
    until the last answer of those that were asked for within `seconds`."""
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    requests, taken = [head.format(len(body)).encode() + body for body in bodies], list[float]()
    began = time.perf_counter()
    end = began + seconds

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (started := time.perf_counter()) < end:
            writer.write(requests[number % len(requests)])
            answered = await reader.readuntil(b"\r\n\r\n")
            if not answered.startswith(b"HTTP/1.1 200"):
                raise AssertionError(f"not answered: {answered[:200]!r}")
            length = next(line for line in answered.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            taken.append(time.perf_counter() - started)
            number += 1
        writer.close()

    await asyncio.gather(*map(client, range(num_clients)))
    return {"taken": taken, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    port, file, num_clients, seconds = sys.argv[1:]
    bodies = [line.encode() for line in Path(file).read_text().splitlines()]
    print(json.dumps(asyncio.run(ask(int(port), bodies, int(num_clients), float(seconds)))))
