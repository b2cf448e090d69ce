"""The model has a process of its own, in which hardly anything but its passes runs.

In one process with HTTP, JSON and decoding, a pass shares the interpreter with their threads, which costs the model a
fifth of its speed (docs/serving.md). The child (`python -m diki_ray.serving.model_process`) is asked over a pair of
sockets. A message is a head in JSON and bytes whose meaning the head says. It ends with its end of the pair.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, BinaryIO

from diki_ray.errors import ConfigError, UserError
from diki_ray.runs.cluster import keeps_memory
from diki_ray.serving.schema import Answered, Asked, TasksResponse
from diki_ray.serving.settings import Settings
from diki_ray.serving.uploads import Refusal

logger = logging.getLogger(__name__)

_LENGTHS = struct.Struct("<IQ")  # bytes of the head, and of what comes after it
_END_S = 5.0


class ModelProcess:
    """A LoadedModel in a process of its own, which answers as that does.

    on_end: is called, once, where the process has ended and not been told to. What it was asked is refused.

    Raises:
        ConfigError: the model could not be loaded.
    """

    def __init__(self, settings: Settings, on_end: Callable[[], object] = lambda: None) -> None:
        self._on_end, self._closed, self._ended = on_end, False, False
        self._socket, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "diki_ray.serving.model_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ
                | keeps_memory().get("env_vars", {})
                | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._replies = self._socket.makefile("rb")
        self._pending: dict[int, Future[Any]] = {}
        self._ids = itertools.count()
        self._outgoing: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        try:
            self._socket.sendall(_message(settings.model_dump(exclude={"token_sha256"})))
            head, _ = _received(self._replies)
        except (OSError, EOFError):
            head = {"error": "the model's process ended while it was loading it"}
        if "error" in head:
            self.close()
            raise ConfigError(head["error"])
        self.size_px: int | None = head["size_px"]
        threading.Thread(target=self._send, name="diki-serve-ask", daemon=True).start()
        threading.Thread(target=self._receive, name="diki-serve-answers", daemon=True).start()

    def ask(
        self, images: Sequence[bytes], asked: Asked, deadline: float, num_inside: int
    ) -> list[Future[Answered | None]]:
        """Returns what LoadedModel.ask returns; what that raises, the answers raise."""
        head = {"do": "ask", "lengths": [len(data) for data in images], "deadline": deadline, "inside": num_inside}
        return self._ask(len(images), head | {"asked": asked.model_dump(include=set(Asked.model_fields))}, images)

    def preprocessed(self, rgb: bytes, width: int, height: int) -> bytes:
        """Returns what LoadedModel.preprocessed returns."""
        (reply,) = self._ask(1, {"do": "preprocess", "size": [width, height]}, [rgb])
        return reply.result()

    def tasks(self) -> TasksResponse:
        (reply,) = self._ask(1, {"do": "tasks"})
        return TasksResponse.model_validate_json(reply.result())

    def exposed(self) -> str:
        """Returns the model's metrics in Prometheus' text format."""
        (reply,) = self._ask(1, {"do": "metrics"})
        return reply.result().decode()

    def close(self) -> None:
        """Ends the process."""
        self._closed = True
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._outgoing.put(b"")  # ends `_send`
        try:
            self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, number: int, head: dict[str, Any], parts: Sequence[bytes] = ()) -> list[Future[Any]]:
        replies: dict[int, Future[Any]] = {next(self._ids): Future() for _ in range(number)}
        self._pending.update(replies)
        self._outgoing.put(_message(head | {"ids": list(replies)}, *parts))
        if self._ended:
            self._refuse_all()
        return list(replies.values())

    def _send(self) -> None:
        """Sends what is asked, so that no event loop waits until the process reads."""
        with suppress(OSError):  # it has ended, which `_receive` notices
            for message in iter(self._outgoing.get, b""):
                self._socket.sendall(message)

    def _receive(self) -> None:
        try:
            while True:
                head, body = _received(self._replies)
                reply = self._pending.pop(head["id"])
                if not reply.set_running_or_notify_cancel():
                    continue  # nobody waits for it any more
                if "refused" in head:
                    reply.set_exception(Refusal(*head["refused"]))
                elif "version" in head:
                    reply.set_result(Answered(head["version"], head["task"], body))
                else:
                    reply.set_result(None if head.get("late") else body)
        except (OSError, EOFError):
            self._ended = True
            self._refuse_all()
            if not self._closed:
                logger.error("the model's process has ended with exit code %d", self.process.wait())
                self._on_end()

    def _refuse_all(self) -> None:
        while self._pending:
            try:
                _, reply = self._pending.popitem()
            except KeyError:  # another thread was faster
                return
            if reply.set_running_or_notify_cancel():
                reply.set_exception(Refusal(503, "the model's process has ended: try again in a second.", "ended"))


class _Child:
    """Reads what is asked of the model, and answers."""

    def __init__(self, own: socket.socket) -> None:
        self._socket, self._asked, self._sending = own, own.makefile("rb"), threading.Lock()

    def run(self) -> None:
        fields, _ = _received(self._asked)
        try:
            import torch

            from diki_ray.serving.loaded_model import LoadedModel

            torch.set_num_threads(1)  # two replicas with two threads each on two cores collapse
            settings = Settings(**fields)
            self._model = LoadedModel(settings)
            self._model.snapshots.follow()
        except UserError as error:
            self._reply({"error": str(error)})
            return
        except Exception as error:  # a backbone is a user's own file
            logger.exception("the model could not be loaded")
            self._reply({"error": f"the model cannot be loaded: {type(error).__name__}: {error}"})
            return
        gc.freeze()  # else a full collection looks through all that torch has, 0.2 s in which nothing is answered
        self._reply({"size_px": self._model.size_px})
        # What takes long beside a pass must not keep the requests behind it from their pass.
        slow = ThreadPoolExecutor(settings.decode_threads, "diki-serve-prepare")
        while True:
            head, body = _received(self._asked)
            if head["do"] == "preprocess" or (head["do"] == "ask" and head["asked"]["classes"] is not None):
                slow.submit(self._answer, head, body)
            else:
                self._answer(head, body)

    def _answer(self, head: dict[str, Any], body: bytes) -> None:
        try:
            if head["do"] == "ask":
                ends = [0, *itertools.accumulate(head["lengths"])]
                images = [body[start:end] for start, end in itertools.pairwise(ends)]
                asked = Asked.model_construct(**head["asked"])  # it was validated
                answers = self._model.ask(images, asked, head["deadline"], head["inside"])
                for number, answer in zip(head["ids"], answers, strict=True):
                    answer.add_done_callback(partial(self._answered, number))
                return
            if head["do"] == "preprocess":
                told = self._model.preprocessed(body, *head["size"])
            elif head["do"] == "tasks":
                told = self._model.tasks().model_dump_json().encode()
            else:
                told = self._model.exposed().encode()
            self._reply({"id": head["ids"][0]}, told)
        except Exception as error:
            for number in head["ids"]:
                self._refuse(number, error)

    def _answered(self, number: int, done: Future[Answered | None]) -> None:
        if (error := done.exception()) is not None:
            self._refuse(number, error)
        elif (answer := done.result()) is None:
            self._reply({"id": number, "late": True})
        else:
            self._reply({"id": number, "version": answer.version, "task": answer.task}, answer.text)

    def _refuse(self, number: int, error: BaseException) -> None:
        if not isinstance(error, Refusal):
            logger.error("a request failed", exc_info=error)
            error = Refusal(500, "the model failed at this: the server's log says how.", "failed")
        self._reply({"id": number, "refused": [error.status, str(error), error.reason]})

    def _reply(self, head: dict[str, Any], body: bytes = b"") -> None:
        with self._sending:
            self._socket.sendall(_message(head, body))


def _message(head: dict[str, Any], *parts: bytes) -> bytes:
    text = json.dumps(head).encode()
    return b"".join((_LENGTHS.pack(len(text), sum(map(len, parts))), text, *parts))


def _received(file: BinaryIO) -> tuple[dict[str, Any], bytes]:
    """Raises EOFError where the file ends."""
    head, body = _LENGTHS.unpack(_exactly(file, _LENGTHS.size))
    return json.loads(_exactly(file, head)), _exactly(file, body)


def _exactly(file: BinaryIO, length: int) -> bytes:
    read = file.read(length)
    if len(read) < length:
        raise EOFError
    return read


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the parent ends in order, and this with it
    with suppress(OSError, EOFError):  # nobody asks any more
        _Child(socket.socket(fileno=int(sys.argv[1]))).run()
    os._exit(0)  # a pass that is still computed is for nobody


if __name__ == "__main__":
    main()
