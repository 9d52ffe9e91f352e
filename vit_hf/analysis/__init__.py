"""Looking at models and runs: arrays out of models, figures out of arrays."""

from vit_hf.front import front

__getattr__ = front(
    __name__,
    {
        "gallery": "figure_drawer",
    },
)
