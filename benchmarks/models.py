"""Speed of a training step (forward, cross-entropy, backward) of three Vision Transformers with the same weights, side
by side in one run: ours, transformers' own, and a plain one written by hand below. The optimizer's step is the same for
all three and left out.

    python benchmarks/models.py --output benchmarks/results/NAME.json
    python benchmarks/models.py --stems                          the patch stem alone, as matrix product and convolution
    python benchmarks/models.py --table benchmarks/results/*.json

The models take turns of a few steps, in an order that rotates from round to round, and so does a large matrix product:
a machine that slows down or is shared slows all of them, and ratios are taken within a round.
"""

import datetime
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vit_hf.arguments import Parser
from vit_hf.errors import ArgumentError, UserError, exit_with
from vit_hf.hub.export import write_json
from vit_hf.models import ViTConfig, ViTForImageClassification
from vit_hf.models.configuration_vit import pair
from vit_hf.models.presets import preset_config
from vit_hf.models.stems import PatchProjection
from vit_hf.models.summary import summarise
from vit_hf.training.accelerator import keep_freed_memory

# preset -> images of a step
DEFAULTS = {
    "cpu": {"vit-small-patch4-32": 64, "vit-base-patch16-224": 8},
    "cuda": {"vit-small-patch16-224": 256, "vit-base-patch16-224": 128, "vit-large-patch16-224": 64},
}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], Any]
Rows = list[dict[str, Any]]


class BareBlock(nn.Module):
    """A pre-norm encoder layer."""

    def __init__(self, width: int, heads: int, mlp_width: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attention = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + self.out(attention.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class BareViT(nn.Module):
    """What one would write by hand: a convolution as the stem, one projection to queries, keys and values, no
    switches."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, patch = config.hidden_size, pair(config.patch_size)
        rows, columns = config.grid_size
        self.stem = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + rows * columns, width))
        block = (width, config.num_attention_heads, config.intermediate_size, config.layer_norm_eps)
        self.blocks = nn.Sequential(*(BareBlock(*block) for _ in range(config.num_hidden_layers)))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.head = nn.Linear(width, config.num_labels)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.class_token.expand(len(x), -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


# tensor names of transformers' ViT -> those of BareViT
BARE_NAMES = {
    r"^vit\.embeddings\.patch_embeddings\.projection\.": "stem.", r"^vit\.embeddings\.cls_token": "class_token",
    r"^vit\.embeddings\.position_embeddings": "positions", r"^vit\.layers\.": "blocks.", r"^vit\.layernorm\.": "norm.",
    r"^classifier\.": "head.", r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.q_proj\.": ".qkv.", r"\.attention\.o_proj\.": ".out.", r"\.mlp\.": ".",
}  # fmt: skip


def bare_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of BareViT."""
    renamed = {}
    for name, tensor in weights.items():
        if ".q_proj." in name:
            tensor = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        if ".k_proj." not in name and ".v_proj." not in name:
            renamed[functools.reduce(lambda n, rule: re.sub(*rule, n), BARE_NAMES.items(), name)] = tensor
    return renamed


def build_models(config: ViTConfig, device: torch.device) -> dict[str, nn.Module]:
    """The three models in training mode, with the same weights."""
    ours = ViTForImageClassification(config)
    stock, bare = transformers.ViTForImageClassification(config.to_stock()), BareViT(config)
    stock.load_state_dict(ours.state_dict())
    bare.load_state_dict(bare_weights(ours.state_dict()))
    for model in (ours, stock):
        model.set_attn_implementation("sdpa")
    return {name: model.to(device).train() for name, model in (("ours", ours), ("stock", stock), ("bare", bare))}


def model_steps(models: dict[str, nn.Module], config: ViTConfig, batch_size: int, dtype: torch.dtype) -> dict[str, Step]:
    """A training step of each model on one batch of noise; each returns its loss."""
    device = next(models["bare"].parameters()).device
    pixel_values = torch.randn(batch_size, config.num_channels, *pair(config.image_size), device=device)
    labels = torch.randint(config.num_labels, (batch_size,), device=device)

    def step(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = model(pixel_values)
            logits = output if isinstance(output, Tensor) else output.logits
            loss = nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        return loss.detach()

    return {name: functools.partial(step, model) for name, model in models.items()}


def stem_steps(config: ViTConfig, batch_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Step]:
    """Forward and backward pass of the patch stem as each of its two forms; each returns its tokens."""
    size = (config.num_channels, config.hidden_size, pair(config.patch_size))
    stems = {"matmul": PatchProjection(*size), "conv": nn.Conv2d(*size, stride=size[2])}
    stems["conv"].load_state_dict(stems["matmul"].state_dict())
    rows, columns = config.grid_size
    pixel_values = torch.randn(batch_size, config.num_channels, *pair(config.image_size), device=device)
    gradient = torch.randn(batch_size, rows * columns, config.hidden_size, device=device)

    def step(stem: nn.Module) -> Tensor:
        stem.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            tokens = stem(pixel_values)
            tokens = tokens if tokens.ndim == 3 else tokens.flatten(2).transpose(1, 2)
        tokens.backward(gradient.to(tokens.dtype))
        return tokens.detach()

    return {name: functools.partial(step, stem.to(device)) for name, stem in stems.items()}


def matmul_step(dtype: torch.dtype, device: torch.device) -> Step:
    """A large matrix product: the rate that the machine has to offer."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return functools.partial(torch.mm, left, right, out=result)


def interleave(turns: dict[str, Step], rounds: int, warmup: int, steps: int, device: torch.device) -> dict[str, list]:
    """Seconds a step of each, for each round after the warm-up rounds. A round gives each a turn of `steps` steps."""
    names, seconds = list(turns), {name: [] for name in turns}
    for index in range(warmup + rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            start = now(device)
            for _ in range(steps):
                turns[name]()
            if index >= warmup:
                seconds[name].append((now(device) - start) / steps)
    return seconds


def now(device: torch.device) -> float:
    """The time at which the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def spread(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def compare(args: Any, config: ViTConfig, preset: str, batch_size: int, dtype: str, device: torch.device) -> Rows:
    """One row for each contestant: times of each round, images a second, how many times as fast ours is."""
    torch.manual_seed(0)
    if args.stems:
        turns = stem_steps(config, batch_size, DTYPES[dtype], device)
        extra = {"largest_difference": difference(turns["matmul"](), turns["conv"]())}
    else:
        models = build_models(config, device)
        counts = [sum(parameter.numel() for parameter in model.parameters()) for model in models.values()]
        if args.compile:
            torch.compiler.reset()  # or the cases before this one count towards the limit of recompilations
            for model in models.values():
                model.compile()
        turns = model_steps(models, config, batch_size, DTYPES[dtype])
        losses = [turn().item() for turn in turns.values()]
        if max(losses) - min(losses) > 0.02 or len(set(counts)) > 1:
            raise AssertionError(f"{list(models)} are not the same model: losses {losses}, parameters {counts}")
        extra = {"num_parameters": counts[0], "train_flops_per_image": 3 * summarise(config).forward_flops}
    matmul_flops = 2 * MATMUL_SIZE[device.type] ** 3
    seconds = interleave(turns | {"mm": matmul_step(DTYPES[dtype], device)}, args.rounds, args.warmup, args.steps, device)
    ours, rows = next(iter(turns)), []
    for name in turns:
        row: dict[str, Any] = {"preset": preset, "dtype": "tf32" if args.tf32 and dtype == "fp32" else dtype}
        row |= {"batch_size": batch_size, "model": name, "seconds_per_step": seconds[name]}
        row["images_per_second"] = batch_size / statistics.median(seconds[name])
        if name != ours:
            row["ours_faster"] = spread([other / own for other, own in zip(seconds[name], seconds[ours])])
        if not args.stems:
            rate = [batch_size * extra["train_flops_per_image"] / own for own in seconds[name]]
            row["share_of_matmul"] = spread([own * mm / matmul_flops for own, mm in zip(rate, seconds["mm"])])
        row["matmul_flops_per_second"] = matmul_flops / statistics.median(seconds["mm"])
        rows.append(row | extra)
    return rows


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((one.float() - other.float()).abs().max() / other.float().abs().max()).item()


def environment(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from."""
    root = Path(__file__).parent.parent
    measured = ["vit_hf", "benchmarks/models.py"]

    def git(*command: str) -> str:
        try:
            return subprocess.run(("git", "-C", root, *command), capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    commit = git("rev-parse", "HEAD") or "unknown"
    commit += " (dirty)" if git("status", "--porcelain", "--", *measured) else ""
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    machine = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count()}
    machine |= {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__}
        | {"python": platform.python_version()},
    }


def table(report: dict[str, Any]) -> str:
    """A report as Markdown: where it was measured, then a row a (model, preset, dtype)."""
    machine, versions = report["machine"], report["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads on {machine['cores']} cores"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [f"{where}; {software}; commit {report['commit']}; {report['date'][:10]}", f"`{report['command']}`"]
    stems = "largest_difference" in report["rows"][0]
    last = "largest difference of outputs" if stems else "share of a matrix product's rate"
    lines += ["", f"| preset | dtype | batch | {'stem' if stems else 'model'} | images/s | ours is faster, times | {last} |"]
    lines.append("|---|---|---:|---|---:|---:|---:|")
    for row in report["rows"]:
        low, middle, high = row.get("ours_faster", (1, 1, 1))
        faster = f"{middle:.3f} ({low:.3f} to {high:.3f})" if "ours_faster" in row else ""
        cell = f"{row['largest_difference']:.1e}" if stems else f"{row['share_of_matmul'][1]:.0%}"
        lines.append(
            f"| {row['preset']} | {row['dtype']} | {row['batch_size']} | {row['model']} | "
            f"{row['images_per_second']:.{0 if row['images_per_second'] >= 100 else 1}f} | {faster} | {cell} |"
        )
    rates = {row["dtype"]: row["matmul_flops_per_second"] for row in report["rows"]}
    return "\n".join([*lines, "", "matrix product: " + ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in rates.items())])


def read_report(path: Path) -> dict[str, Any]:
    """A file that --output wrote."""
    try:
        return {"rows": [], **json.loads(path.read_text())}
    except OSError as error:
        raise UserError(f"--table: {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"--table: {path} is not a file that --output wrote") from None
