"""A run that is stopped from outside: SIGTERM, SIGUSR1 or Ctrl-C, with a checkpoint at a step that all processes share.

One process stops after the step at hand. Of several, some may be steps ahead of others (a host runs ahead of its device),
so they agree on a step through the process group's store, with no collective and no device sync. A thread of each
process looks into the store a few times a second; the loop reads a plain variable.

1. Whoever gets a signal writes it into the store as the request. The first one stays, so all obey the same signal.
2. When a process's thread sees the request, it writes down the first step after which the loop has not looked yet. From
   then on the loop waits when it looks, until all have written theirs.
3. The largest of these numbers is the step after which all stop.

Nobody has passed that step: each waits from its own number on, and the largest is not below it. All compute the same
step, for no number changes once it is written. Nobody waits for ever: the numbers are written by threads, which run
also while the loop hangs in a collective. Who hangs there in a step up to the largest number needs a process that
waits: that one goes on as soon as all numbers are there, up to the same step. A loop that is over writes a number beyond
all steps: then nobody stops, and each comes to its own end. A process that does not write within ANSWER_SECONDS is gone.
"""

import contextlib
import itertools
import select
import signal
import socket
import sys
import threading
import time

import accelerate

from vit_hf.errors import TOLD, UserError
from vit_hf.training.lost import LEAVE_SECONDS, end_at_once, named, private_store

POLL_SECONDS = 0.25  # between two looks into the store
# launchers kill 30 s after SIGTERM; no call of a library keeps a thread from running for so long in a step
ANSWER_SECONDS = 20.0
CLOSE_SECONDS = 2.0  # for the thread to come out of the store when the loop is over
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
OVER = 1 << 62  # the number of a loop that is over

_made = itertools.count()  # guards of this process: all make them in the same order


class StoppedBySignal(UserError):
    """SIGTERM, SIGUSR1 or Ctrl-C came; a complete checkpoint was written. Exit status 128 + the signal's number."""

    def __init__(self, number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(number).name} after checkpoint-{step}; the same command goes on from there"
        )
        self.exit_status = 128 + number


class SignalGuard:
    """Remembers a signal until the step is over, and lets all processes stop after the same step. A second Ctrl-C stops
    at once.

    Args:
        last_step: of the run; a stop after it is its ordinary end. All processes make the guard together.
    """

    def __init__(self, accelerator: accelerate.Accelerator, last_step: int):
        self._received: int | None = None
        self._last_step = last_step
        self._previous = {}
        self._agreement = _Agreement(accelerator) if accelerator.num_processes > 1 else None
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
            if self._agreement is not None:
                self._agreement.listen()
        if self._agreement is not None:
            accelerator.wait_for_everyone()  # from here on everyone answers
            self._agreement.complete = True

    @property
    def number(self) -> int | None:
        """The signal that is obeyed, on all processes alike; None as long as there is none."""
        return self._received if self._agreement is None else self._agreement.number

    def stop_asked(self, step: int) -> bool:
        """Whether to stop after this step. Called once after each, with no collective and no device sync; the same
        answer on all processes. Never true at the last step.

        Raises:
            UserError: another process does not answer any more.
        """
        if step >= self._last_step:
            return False
        return self._received is not None if self._agreement is None else self._agreement.stop_asked(step)

    def release(self) -> None:
        """Gives the signals back to whoever had them; not where a collective has just failed, so that the launcher,
        which ends all processes then, leaves time for a line that says why."""
        if self._agreement is not None:
            self._agreement.close()
            if isinstance(sys.exc_info()[1], RuntimeError):
                return
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number, frame) -> None:
        if number == signal.SIGINT:
            if self._received == signal.SIGINT:
                raise KeyboardInterrupt(TOLD)
            print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr)
        self._received = number


class _Agreement:
    """What the processes of a run write into the store about a stop, and the thread that reads it. Made by all."""

    def __init__(self, accelerator: accelerate.Accelerator):
        self.number: int | None = None
        self.complete = False  # whether the threads of all processes run
        self._rank, self._ranks = accelerator.process_index, range(accelerator.num_processes)
        self._store = private_store(f"stop/{next(_made)}")
        self._lock = threading.Lock()  # of the next two
        self._next_step = 0  # the loop has looked after all steps before this one
        self._written = False  # whether that number stands in the store, so that the loop has to wait
        self._stop_step: int | None = None
        self._lost: str | None = None
        self._settled = threading.Event()  # one of the last two is known
        self._closing = threading.Event()
        self._waker, self._wakes = socket.socketpair()  # signals arrive here at once, also while the loop hangs
        self._waker.setblocking(False)
        self._previous_waker: int | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def listen(self) -> None:
        """Lets the system tell the thread of signals; in the main thread."""
        self._previous_waker = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def stop_asked(self, step: int) -> bool:
        with self._lock:
            if not self._written:
                self._next_step = step + 1
                return False
        self._settled.wait()
        if self._lost is not None:
            raise UserError(self._lost)
        return step >= self._stop_step

    def close(self) -> None:
        if self._previous_waker is not None:
            signal.set_wakeup_fd(self._previous_waker)
        self._closing.set()
        try:
            self._waker.send(b"\0")
        except BlockingIOError:  # enough has come to wake it
            pass
        self._thread.join(timeout=CLOSE_SECONDS)
        if self._thread.is_alive():  # the store hangs with the machine that keeps it
            return
        if not self._written:
            with contextlib.suppress(RuntimeError):  # the store may be gone with whoever kept it
                self._store.set(f"step/{self._rank}", str(OVER))
        self._waker.close()
        self._wakes.close()

    def _run(self) -> None:
        try:
            while not self._closing.is_set() and not self._settled.is_set():
                self._look(self._signals())
        except RuntimeError as error:
            self._give_up(f"the store of the process group is gone ({str(error).splitlines()[0]})")
        if self._lost is not None and not self._closing.wait(LEAVE_SECONDS):
            end_at_once(self._lost)  # the loop hangs in a collective

    def _signals(self) -> list[int]:
        """The signals that have come; waits a little for them."""
        if not select.select([self._wakes], [], [], POLL_SECONDS)[0]:
            return []
        return [number for number in self._wakes.recv(64) if number in SIGNALS]

    def _look(self, received: list[int]) -> None:
        """Hands on a request, answers it, and reads the others' answers."""
        if received:
            self._store.compare_set("request", "", str(received[0]))
        if self.number is None:
            if not self._store.check(["request"]):
                return
            self.number, self._asked_at = int(self._store.get("request")), time.monotonic()
            with self._lock:
                self._written = True
            self._store.set(f"step/{self._rank}", str(self._next_step))
        now, missing = time.monotonic(), [rank for rank in self._ranks if not self._store.check([f"step/{rank}"])]
        if not missing:
            self._stop_step = max(map(int, self._store.multi_get([f"step/{rank}" for rank in self._ranks])))
            self._settled.set()
        elif not self.complete:
            self._asked_at = now
        elif now - self._asked_at > ANSWER_SECONDS:
            self._give_up(f"{named(missing)} did not answer for {ANSWER_SECONDS:.0f} s")

    def _give_up(self, why: str) -> None:
        self._lost = f"{why} when the run was to stop for {signal.Signals(self.number).name}" if self.number else why
        self._settled.set()
