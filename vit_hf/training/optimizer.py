"""Which parameters are decayed and at what rate they learn, and the optimizer over them."""

import re
from dataclasses import dataclass

import torch
from torch import nn

# the only parameters of more than one dimension that are no weights of a layer
NEVER_DECAYED = ("cls_token", "register_tokens", "position_embeddings", "relative_position_bias_table", "probe")
LAYER = re.compile(r"vit\.layers\.(\d+)\.")


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer, as the flags of the same names say."""

    optim: str  # adamw_torch or sgd
    learning_rate: float  # the peak
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    momentum: float = 0.9  # SGD's


def parameter_groups(model: nn.Module, *, weight_decay: float, layer_decay: float) -> list[dict]:
    """Groups the trainable parameters by (decayed or not, learning rate factor `lr_scale`).

    Norms, biases (everything with one dimension), learned tokens and position embeddings are not decayed. With
    `layer_decay` below 1, embeddings learn at layer_decay**(L+1), layer i at layer_decay**(L-i), what comes after the
    layers at 1.

    Source: no decay as in google-research/big_vision and timm; layer-wise decay from BEiT (arXiv 2106.08254).
    """
    depth = len({match[1] for name, _ in model.named_parameters() if (match := LAYER.match(name))})
    groups: dict[tuple[bool, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not name.endswith(NEVER_DECAYED)
        layer = LAYER.match(name)
        above = depth - int(layer[1]) if layer else (depth + 1 if name.startswith("vit.embeddings.") else 0)
        key = (decayed, layer_decay**above)
        group = groups.setdefault(
            key, {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": key[1]}
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(groups: list[dict], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101), or SGD with momentum (the paper's fine-tuning, appendix B.1.1)."""
    if settings.optim == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")  # one kernel over all parameters
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group, by its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
