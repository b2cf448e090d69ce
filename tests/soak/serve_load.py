"""Clients side by side on a server of this machine: python tests/soak/serve_load.py --storage storage --run quickstart

Every client asks for images of its own and checks each answer against what the run's predictor says of that image, so
an answer that is lost, mixed up or wrong ends it with code 1. Clients and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import requests
from PIL import Image

from diki_ray.prediction.run_predictor import Answer, load_predictor

JOB = Path(__file__).parents[2] / "jobs" / "serve.py"
IMAGES_PER_CLIENT = 8


def picture(seed: int) -> Image.Image:
    """64 px, of a colour and coarseness of its own."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (int(random.integers(2, 17)),) * 2 + (3,), dtype=np.uint8)
    return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)


def in_base64(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def wrong(told: dict[str, Any], right: Answer) -> bool:
    """Densities tell images apart; classes may differ where two are as good as equal (interpolated class features)."""
    first, *others = told["top"]
    close = bool(others) and first["confidence"] - others[0]["confidence"] < 0.01
    return (
        told["task"] != right.task
        or (told["class_name"] != right.class_name and not close)
        or any(not isclose(told["log_densities"][t], d, rel_tol=1e-3) for t, d in right.log_densities.items())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="storage")
    parser.add_argument("--run", default="quickstart")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--replicas", type=int, default=1)
    arguments = parser.parse_args()

    pictures = [picture(seed) for seed in range(arguments.clients * IMAGES_PER_CLIENT)]
    right = list(load_predictor(arguments.storage, arguments.run).answer(pictures))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, str(JOB), "--storage", arguments.storage, "--run", arguments.run]
    server = subprocess.Popen(
        [*command, "--port", str(port), "--replicas", str(arguments.replicas)],
        env=os.environ | {"DIKI_SERVE_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    if not server.stdout.readline().startswith("serving"):
        return 2
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Bearer {token}"}
    stop = threading.Event()

    def ask(client: int) -> tuple[list[float], int, int]:
        """(seconds of each request, wrong answers, requests that were not answered)"""
        mine = range(client * IMAGES_PER_CLIENT, (client + 1) * IMAGES_PER_CLIENT)
        bodies = {n: {"images": [in_base64(pictures[n])]} for n in mine}
        seconds, num_wrong, num_lost = [], 0, 0
        with requests.Session() as session:
            while not stop.is_set():
                for n in mine:
                    started = time.perf_counter()
                    response = session.post(f"{url}/predict", json=bodies[n], headers=headers, timeout=120)
                    seconds.append(time.perf_counter() - started)
                    if response.status_code != 200:
                        num_lost += 1
                    elif wrong(response.json()["answers"][0], right[n]):
                        num_wrong += 1
        return seconds, num_wrong, num_lost

    try:
        for n in range(len(pictures)):  # class features are computed when they are first needed
            requests.post(f"{url}/predict", json={"images": [in_base64(pictures[n])]}, headers=headers, timeout=120)
        with ThreadPoolExecutor(arguments.clients) as pool:
            started = time.perf_counter()
            asked = [pool.submit(ask, client) for client in range(arguments.clients)]
            time.sleep(arguments.seconds)
            stop.set()
            results = [future.result() for future in asked]
            elapsed = time.perf_counter() - started
        metrics = requests.get(f"{url}/metrics", headers=headers, timeout=60).text
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=120)

    seconds = np.concatenate([s for s, _, _ in results])
    num_wrong, num_lost = sum(w for _, w, _ in results), sum(n for _, _, n in results)
    passes = [float(v) for v in re.findall(r"^diki_serve_batch_images_(?:sum|count)\{.*\} (\S+)$", metrics, re.M)]
    p50, p99 = np.percentile(seconds, [50, 99])
    rate = len(seconds) / elapsed
    print(f"{arguments.clients} clients, {len(seconds)} requests in {elapsed:.1f} s: {rate:.1f} images/s")
    print(f"p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, {max(passes) / min(passes):.1f} images a pass")
    print(f"{num_wrong} wrong, {num_lost} not answered; the server ended with code {code}")
    return 1 if num_wrong or num_lost or code else 0


if __name__ == "__main__":
    sys.exit(main())
