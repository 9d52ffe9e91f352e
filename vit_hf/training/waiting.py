"""Work of one process that the others wait for, outside of collectives, which time out: for as long as it is alive.

Each process has a connection to the main process. A byte now and then is a sign of life, a line says how the work ended,
and a connection that breaks says that a process is gone. What the work gave travels by a collective once all are there,
which takes no time then. This module must not know what the work is.
"""

import functools
import json
import os
import pickle
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import accelerate

from vit_hf.errors import UserError

T = TypeVar("T")
BEAT_SECONDS = 5.0  # between two signs of life
DEAD_SECONDS = 300.0  # without any: no call of a library keeps other threads from running for so long
LINE_SECONDS = 60.0  # between two lines that say what is waited for


def main_process_first(accelerator: accelerate.Accelerator, function: Callable[[], T], doing: str) -> T:
    """What a function gives, on every process, though it is called by the main process alone: the others get it pickled.
    Where that refers to files that are not there, on another machine, the first process of the machine calls it too.

    Args:
        function: gives anything but None.
        doing: what it does, for those who wait, e.g. "loading cifar10".

    Raises:
        UserError: of the function, on all processes alike; a process that is gone.
    """
    if accelerator.num_processes == 1:
        return function()
    found = together(accelerator, function if accelerator.is_main_process else None, doing)
    (sent,) = accelerate.utils.broadcast_object_list([pickle.dumps(found) if accelerator.is_main_process else None])
    found = _opened(sent) if found is None else found
    if any(accelerate.utils.gather_object([found is None])):
        own = together(accelerator, function if found is None and accelerator.is_local_main_process else None, doing)
        all_sent = accelerate.utils.gather_object([None if own is None else pickle.dumps(own)])
        if found is None:
            first_here = accelerator.process_index - accelerator.local_process_index
            found = pickle.loads(all_sent[first_here]) if own is None else own
    return found


def machine_first(accelerator: accelerate.Accelerator, function: Callable[[], T], doing: str) -> T:
    """What a function gives that each process calls: first one process of each machine, then its others, which find the
    files that it has made. Arguments and errors are those of `main_process_first`."""
    if accelerator.num_processes == 1:
        return function()
    mine = together(accelerator, function if accelerator.is_local_main_process else None, doing)
    return mine if accelerator.is_local_main_process else function()


def processes_of(accelerator: accelerate.Accelerator) -> dict[str, Any]:
    """What the data of a run has to know of its processes: the fields of data/processes.py's `Processes`."""
    return {
        "device": accelerator.device,
        "num_processes": accelerator.num_processes,
        "rank": accelerator.process_index,
        "say": accelerator.print,
        "main_first": functools.partial(main_process_first, accelerator),
        "machine_first": functools.partial(machine_first, accelerator),
    }


def together(accelerator: accelerate.Accelerator, work: Callable[[], T] | None, doing: str) -> T | None:
    """Does this process's work, where it has some, and returns its result when all processes have done theirs."""
    meeting, result, error = _Meeting(accelerator, doing), None, None
    try:
        try:
            result = work() if work is not None else None
        except UserError as caught:
            error = [str(caught), caught.exit_status]
        error = meeting.end(error)
    finally:
        meeting.close()
    if error is not None:
        raised = UserError(error[0])
        raised.exit_status = error[1]
        raise raised
    return result


def _opened(sent: bytes):
    """What another process has pickled; None where files that it refers to are not on this machine."""
    try:
        return pickle.loads(sent)
    except OSError:
        return None


class _Meeting:
    """Connections between the main process and all others, open while some work."""

    def __init__(self, accelerator: accelerate.Accelerator, doing: str):
        self.rank, self.doing = accelerator.process_index, doing
        self.speaks = self.rank == 1 or accelerator.is_local_main_process  # one on the main machine, one on each other
        server = _server() if self.rank == 0 else None
        told = [server.getsockname()[1], secrets.token_hex(8)] if server is not None else [None, None]
        port, token = accelerate.utils.broadcast_object_list(told)
        if server is not None:
            self.others = _accept(server, token, accelerator.num_processes - 1)
        else:
            self.others = {0: _connect(os.environ.get("MASTER_ADDR", "127.0.0.1"), port)}
            self.others[0].sendall(f"{token} {self.rank}\n".encode())
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def end(self, error: list | None) -> list | None:
        """Waits until the work of all processes has ended; the first error of any, None where there was none.

        Raises:
            UserError: a process is gone.
        """
        if self.rank == 0:
            lines = self._listen()
            error = next((found for found in (error, *map(json.loads, lines)) if found is not None), None)
        self.quiet()  # nothing may follow the line: what is not read when a connection is closed takes its line along
        self._send(json.dumps(error).encode() + b"\n")
        return json.loads(self._listen()[0]) if self.rank != 0 else error

    def quiet(self) -> None:
        """Ends the signs of life."""
        self.stop.set()
        self.thread.join()

    def close(self) -> None:
        self.quiet()
        for other in self.others.values():
            other.close()

    def _beat(self) -> None:
        while not self.stop.wait(BEAT_SECONDS):
            self._send(b"\0")

    def _send(self, content: bytes) -> None:
        for other in self.others.values():
            try:
                other.sendall(content)
            except OSError:  # it is gone: who listens says so
                pass

    def _listen(self) -> list[bytes]:
        """A line of each other process."""
        start = said = time.monotonic()
        lines, heard = dict.fromkeys(self.others, b""), dict.fromkeys(self.others, start)
        with selectors.DefaultSelector() as waiting:
            for rank, other in self.others.items():
                waiting.register(other, selectors.EVENT_READ, rank)
            while waiting.get_map():
                for rank in [key.data for key, _ in waiting.select(timeout=BEAT_SECONDS / 5)]:
                    lines[rank] += _received(self.others[rank]) or self._gone(f"process {rank} ended")
                    heard[rank] = time.monotonic()
                    if lines[rank].endswith(b"\n"):
                        waiting.unregister(self.others[rank])
                now = time.monotonic()
                for rank in [key.data for key in waiting.get_map().values()]:
                    if now - heard[rank] > DEAD_SECONDS:
                        self._gone(f"process {rank} gave no sign of life for {DEAD_SECONDS:.0f} s")
                if self.speaks and now - said >= LINE_SECONDS:
                    said = now
                    print(f"{self.doing}: {now - start:.0f} s so far; the other processes wait", flush=True)
        return [line.strip(b"\0") for line in lines.values()]

    def _gone(self, how: str) -> NoReturn:
        raise UserError(f"{how} during {self.doing}; what it has printed says why")


def _connect(host: str, port: int) -> socket.socket:
    try:
        main = socket.create_connection((host, port), timeout=DEAD_SECONDS)
    except OSError as error:
        raise UserError(
            f"the main process cannot be reached at {host}:{port} ({error}): the machines of a run have to reach each other "
            "on all ports"
        ) from None
    main.settimeout(None)
    return main


def _server() -> socket.socket:
    ipv6 = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", 0), family=socket.AF_INET6 if ipv6 else socket.AF_INET, backlog=1024, dualstack_ipv6=ipv6
    )


def _accept(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    """The connections of so many processes, by rank; of others, who do not know the token, none is kept."""
    others: dict[int, socket.socket] = {}
    server.settimeout(DEAD_SECONDS)
    with server:
        while len(others) < count:
            try:
                other, _ = server.accept()
            except TimeoutError:
                raise UserError(
                    f"{count - len(others)} of {count} other processes did not come to a meeting"
                ) from None
            other.settimeout(BEAT_SECONDS)
            try:
                with other.makefile("rb", buffering=0) as file:  # a buffer would take what comes after the line
                    words = file.readline(100).decode().split()
                rank = int(words[1]) if words[0] == token else None
            except (OSError, ValueError, IndexError):
                rank = None
            if rank is None:
                other.close()
            else:
                other.settimeout(None)
                others[rank] = other
    return others


def _received(other: socket.socket) -> bytes:
    """What has come; nothing when the connection is broken."""
    try:
        return other.recv(1 << 16)
    except ConnectionError:
        return b""
