"""The finished folder: exported, described, uploaded."""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "export": "finish_run",
        "push": "HubSettings open_repository",
        "resolved": "describe resolve",
    },
)
