"""A run that is stopped from outside: SIGTERM, SIGUSR1 or Ctrl-C, with a checkpoint at a step that all processes share."""

import accelerate

from vit_hf.errors import UserError


class StoppedBySignal(UserError):
    """SIGTERM, SIGUSR1 or Ctrl-C came; a complete checkpoint was written. Exit status 128 + the signal's number."""

    def __init__(self, number: int, step: int):
        raise NotImplementedError


class SignalGuard:
    """Remembers a signal until the step is over, and lets all processes stop after the same step. A second Ctrl-C stops at once.

    Args:
        last_step: of the run; a stop after it is its ordinary end. All processes make the guard together.
    """

    number: int | None  # the signal that is obeyed, on every process alike; None as long as there is none

    def __init__(self, accelerator: accelerate.Accelerator, last_step: int):
        raise NotImplementedError

    def stop_asked(self, step: int) -> bool:
        """Whether to stop after this step. Called once after each, with no collective and no device sync; the same
        answer on all processes. Never true at the last step.

        Raises:
            UserError: another process does not answer any more.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Gives the signals back to whoever had them."""
        raise NotImplementedError
