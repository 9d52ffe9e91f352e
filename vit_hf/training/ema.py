"""An exponential moving average of the weights and of BatchNorm's statistics, kept in fp32 beside the model."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """average = decay x average + (1 - decay) x weights, after every step; so for the statistics of BatchNorm, which
    belong to the weights that they were collected with.

    Source: Polyak averaging as in arXiv 1512.00567, section 8. Starts from the initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        averaged = dict(model.named_parameters())
        saved = model.state_dict()  # not what is computed: a table of sines stays as it is
        averaged |= {name: b for name, b in model.named_buffers() if name in saved and b.is_floating_point()}
        self._names, self._weights = list(averaged), [tensor.detach() for tensor in averaged.values()]
        self._averages = [weight.clone().float() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of the step just made into the average."""
        torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context the model holds the average; its own weights come back afterwards, to the bit."""
        saved = [weight.clone() for weight in self._weights]
        torch._foreach_copy_(self._weights, self._averages)
        try:
            yield
        finally:
            torch._foreach_copy_(self._weights, saved)

    def state_dict(self) -> dict[str, Tensor]:
        """{parameter name: fp32 average}"""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over averages written by `state_dict`."""
        torch._foreach_copy_(self._averages, [state[name].to(self._averages[0].device) for name in self._names])
