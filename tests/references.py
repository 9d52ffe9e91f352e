"""Forward passes of other people's checkpoints, written from the papers' equations on the tensor names of the source.

Plain functions in float64 that share nothing with vit_hf. B images, N tokens, D width, h heads, e = D/h.
Source: ViT paper (arXiv 2010.11929), equations 1 to 4 and appendix A; BiT (arXiv 1912.11370) for the hybrid's ResNet;
big_vision's MAP head (arXiv 2106.04560) and layer scale (arXiv 2103.17239), as timm and Google's JAX code have them.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d


def normed(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * scale + shift


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, h, M, e), (B, h, N, e), (B, h, N, e) -> (B, M, h*e)"""
    scores = torch.einsum("bhme,bhne->bhmn", query, key) / math.sqrt(query.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("bhmn,bhne->bmhe", weights, value).flatten(2)


def patches(x: Tensor, height: int, width: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*height*width), in raster order."""
    rows = [
        x[:, :, top : top + height, left : left + width].flatten(1)
        for top in range(0, x.shape[2], height)
        for left in range(0, x.shape[3], width)
    ]
    return torch.stack(rows, dim=1)


def padded_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """As TensorFlow's SAME: the output has ceil(side / stride) positions, the odd cell of padding comes last."""
    height, width = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
    sides = (width // 2, width - width // 2, height // 2, height - height // 2)
    return torch.nn.functional.pad(x, sides, value=value)


def resnet(x: Tensor, unit: dict, depths: list[int], timm: bool) -> Tensor:
    """The hybrid's feature map. `unit` has tensors under (stage, unit, "conv1") and so on, None for the root.

    timm divides by sqrt(variance + 1e-8) and norms groups with eps 1e-5, Google by deviation + 1e-5 and 1e-6.
    """

    def conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
        mean = weight.mean((1, 2, 3), keepdim=True)
        variance = (weight - mean).square().mean((1, 2, 3), keepdim=True)
        weight = (weight - mean) / ((variance + 1e-8).sqrt() if timm else variance.sqrt() + 1e-5)
        return conv2d(padded_same(x, weight.shape[-1], stride), weight, stride=stride)

    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        unit_groups = normed(groups, torch.ones(()), torch.zeros(()), 1e-5 if timm else 1e-6)
        return unit_groups.reshape(x.shape) * scale[:, None, None] + shift[:, None, None]

    x = norm(conv(x, unit[None, "conv"], 2), *unit[None, "norm"]).clamp(min=0)
    x = padded_same(x, 3, 2, -math.inf).unfold(2, 3, 2).unfold(3, 3, 2).amax((-2, -1))
    for stage, depth in enumerate(depths):
        for index in range(depth):
            stride = 2 if stage and not index else 1
            here = {name: value for (*place, name), value in unit.items() if place == [stage, index]}
            shortcut = x if index else norm(conv(x, here["conv_shortcut"], stride), *here["norm_shortcut"])
            y = norm(conv(x, here["conv1"]), *here["norm1"]).clamp(min=0)
            y = norm(conv(y, here["conv2"], stride), *here["norm2"]).clamp(min=0)
            x = (shortcut + norm(conv(y, here["conv3"]), *here["norm3"])).clamp(min=0)
    return x


def timm_logits(tensors: dict[str, Tensor], images: Tensor, heads: int, pool: str, depths: list[int] | None) -> Tensor:
    """Logits (B, K) of timm's VisionTransformer, from its state dict alone."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = images.double()

    def both(name: str) -> tuple[Tensor, Tensor]:
        return t[f"{name}.weight"], t[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", torch.zeros(()))

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    if depths is not None:
        backbone, root = "patch_embed.backbone.", "patch_embed.backbone." + ("stem." if depths else "")
        unit = {(None, "conv"): t[root + "conv.weight"], (None, "norm"): both(root + "norm")}
        for stage, depth in enumerate(depths):
            for index in range(depth):
                there = f"{backbone}stages.{stage}.blocks.{index}."
                for ours, name in (("1", "{}1"), ("2", "{}2"), ("3", "{}3"), ("_shortcut", "downsample.{}")):
                    if there + name.format("conv") + ".weight" in t:
                        unit[stage, index, f"conv{ours}"] = t[there + name.format("conv") + ".weight"]
                        unit[stage, index, f"norm{ours}"] = both(there + name.format("norm"))
        x = resnet(x, unit, depths, timm=True)
    kernel = t["patch_embed.proj.weight"]
    x = patches(x, *kernel.shape[2:]) @ kernel.flatten(1).T + t["patch_embed.proj.bias"]
    count = x.shape[1]
    prefix = [t[name].expand(len(x), -1, -1) for name in ("cls_token", "reg_token") if name in t]
    k = sum(part.shape[1] for part in prefix)
    positions = t.get("pos_embed", torch.zeros(1, count, x.shape[2]))
    if positions.shape[1] == count:  # no_embed_class
        x = torch.cat([*prefix, x + positions], dim=1)
    else:
        x = torch.cat([*prefix, x], dim=1) + positions
    index = 0
    while f"blocks.{index}.norm1.weight" in t:
        block = f"blocks.{index}."
        query, key, value = map(split, linear(normed(x, *both(block + "norm1")), block + "attn.qkv").chunk(3, dim=-1))
        if block + "attn.q_norm.weight" in t:
            query, key = normed(query, *both(block + "attn.q_norm")), normed(key, *both(block + "attn.k_norm"))
        x = x + linear(attend(query, key, value), block + "attn.proj") * t.get(block + "ls1.gamma", torch.ones(()))
        y = gelu(linear(normed(x, *both(block + "norm2")), block + "mlp.fc1"))
        x = x + linear(y, block + "mlp.fc2") * t.get(block + "ls2.gamma", torch.ones(()))
        index += 1
    if "norm.weight" in t:
        x = normed(x, *both("norm"))
    if pool == "token":
        x = x[:, 0]
    elif pool == "avg":
        x = x[:, k:].mean(1)
    else:
        latent = split(linear(t["attn_pool.latent"], "attn_pool.q")).expand(len(x), -1, -1, -1)
        key, value = map(split, linear(x[:, k:], "attn_pool.kv").chunk(2, dim=-1))
        x = linear(attend(latent, key, value), "attn_pool.proj")
        y = gelu(linear(normed(x, *both("attn_pool.norm")), "attn_pool.mlp.fc1"))
        x = (x + linear(y, "attn_pool.mlp.fc2"))[:, 0]
    if "fc_norm.weight" in t:
        x = normed(x, *both("fc_norm"))
    return linear(x, "head") if "head.weight" in t else x


def google_logits(arrays: dict[str, np.ndarray], images: Tensor, depths: list[int] | None, numbers: str) -> Tensor:
    """Logits (B, K) of google-research/vision_transformer, from its arrays alone: kernels (..., inputs, outputs).

    Args:
        numbers: what its attention, MLP and second norm are counted as, "132" in older files and "001" since Linen.
    """
    a = {name: torch.from_numpy(array).double() for name, array in arrays.items()}
    x = images.double()
    attention, mlp, second = numbers

    def norm(x: Tensor, name: str) -> Tensor:
        return normed(x, a[f"{name}/scale"], a[f"{name}/bias"])

    def dense(x: Tensor, name: str) -> Tensor:
        return x @ a[f"{name}/kernel"] + a[f"{name}/bias"]

    if depths is not None:

        def group(name: str) -> tuple[Tensor, Tensor]:
            return a[f"{name}/scale"].reshape(-1), a[f"{name}/bias"].reshape(-1)

        unit = {(None, "conv"): a["conv_root/kernel"].permute(3, 2, 0, 1), (None, "norm"): group("gn_root")}
        for stage, depth in enumerate(depths):
            for index in range(depth):
                there = f"block{stage + 1}/unit{index + 1}/"
                for ours, name in (("1", "1"), ("2", "2"), ("3", "3"), ("_shortcut", "_proj")):
                    if f"{there}conv{name}/kernel" in a:
                        unit[stage, index, f"conv{ours}"] = a[f"{there}conv{name}/kernel"].permute(3, 2, 0, 1)
                        unit[stage, index, f"norm{ours}"] = group(f"{there}gn{name}")
        x = resnet(x, unit, depths, timm=False)
    kernel = a["embedding/kernel"]
    x = patches(x, *kernel.shape[:2]) @ kernel.permute(2, 0, 1, 3).flatten(0, 2) + a["embedding/bias"]
    if "cls" in a:
        x = torch.cat((a["cls"].expand(len(x), -1, -1), x), dim=1)
    x = x + a["Transformer/posembed_input/pos_embedding"]
    index = 0
    while f"Transformer/encoderblock_{index}/LayerNorm_0/scale" in a:
        block = f"Transformer/encoderblock_{index}/"
        y, there = norm(x, block + "LayerNorm_0"), f"{block}MultiHeadDotProductAttention_{attention}/"
        query, key, value = (
            torch.einsum("bnd,dhe->bhne", y, a[f"{there}{name}/kernel"]) + a[f"{there}{name}/bias"][None, :, None]
            for name in ("query", "key", "value")
        )
        y = attend(query, key, value).unflatten(-1, a[f"{there}query/bias"].shape)
        x = x + torch.einsum("bnhe,hed->bnd", y, a[f"{there}out/kernel"]) + a[f"{there}out/bias"]
        y = gelu(dense(norm(x, f"{block}LayerNorm_{second}"), f"{block}MlpBlock_{mlp}/Dense_0"))
        x = x + dense(y, f"{block}MlpBlock_{mlp}/Dense_1")
        index += 1
    x = norm(x, "Transformer/encoder_norm")
    x = x[:, 0] if "cls" in a else x.mean(1)
    if "pre_logits/kernel" in a:
        x = dense(x, "pre_logits").tanh()
    return dense(x, "head") if "head/kernel" in a else x
