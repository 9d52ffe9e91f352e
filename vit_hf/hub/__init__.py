"""The finished folder: exported, described, uploaded."""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "finish": "export_model finish_folder",
        "push": "HubSettings open_repository",
        "resolved": "describe resolve",
    },
)
