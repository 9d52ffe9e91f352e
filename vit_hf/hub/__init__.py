"""The finished folder: exported, described, uploaded."""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "export": "export_model finish",
        "push": "push_folder repository_name",
        "resolved": "describe resolve",
    },
)
