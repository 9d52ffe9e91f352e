"""What the processes found out about their images, put together. Knows columns of tensors alone."""

import accelerate
import torch
from torch import Tensor


def gather_in_order(columns: dict[str, list[Tensor]], accelerator: accelerate.Accelerator) -> dict[str, Tensor]:
    """Columns of all processes without `valid`, a row an image that counts, by `index`; on the device, the same on all.

    Args:
        columns: of each batch a tensor (B, ...), equally many rows on each process; among them index int64 (B,) and valid
            bool (B,).
    """
    # one collective a column, after the last batch: no host sync between batches
    joined = {name: torch.cat(parts).to(accelerator.device) for name, parts in columns.items()}
    gathered = {name: accelerator.gather(column) for name, column in joined.items()}
    counted = gathered.pop("valid").nonzero()[:, 0]
    counted = counted[torch.argsort(gathered["index"][counted])]
    return {name: column[counted] for name, column in gathered.items()}
