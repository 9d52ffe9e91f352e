"""Speed of a training step (forward, cross-entropy, backward) of three Vision Transformers with the same weights, side
by side in one run: ours, transformers' own, and a plain one written by hand (bare.py). The optimizer's step is the same
for all three and left out.

    python benchmarks/models.py --output benchmarks/results/NAME.json
    python benchmarks/models.py --stems                          the patch stem alone, as matrix product and convolution
    python benchmarks/models.py --table benchmarks/results/*.json

The models take turns of a few steps, in another order in each round, and so does a large matrix product:
a machine that slows down or is shared slows all of them, and ratios are taken within a round.
"""

import functools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bare import BareViT, bare_weights
from reports import environment, read_report, table
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
STEPS = {"cpu": 1, "cuda": 5}
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Step = Callable[[], Any]
Rows = list[dict[str, Any]]


def build_models(config: ViTConfig, device: torch.device) -> dict[str, nn.Module]:
    """The three models in training mode, with the same weights."""
    ours = ViTForImageClassification(config)
    stock, bare = transformers.ViTForImageClassification(config.to_stock()), BareViT(config)
    stock.load_state_dict(ours.state_dict())
    bare.load_state_dict(bare_weights(ours.state_dict()))
    for model in (ours, stock):
        model.set_attn_implementation("sdpa")
    return {name: model.to(device).train() for name, model in (("ours", ours), ("stock", stock), ("bare", bare))}


def model_steps(
    models: dict[str, nn.Module], config: ViTConfig, batch_size: int, dtype: torch.dtype
) -> dict[str, Step]:
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


def build_stems(config: ViTConfig, device: torch.device) -> dict[str, nn.Module]:
    """The patch stem as matrix product and as convolution, with the same weights."""
    size = (config.num_channels, config.hidden_size, pair(config.patch_size))
    matmul, conv = PatchProjection(*size), nn.Conv2d(*size, stride=size[2])
    conv.load_state_dict(matmul.state_dict())
    return {"matmul": matmul.to(device), "conv": conv.to(device)}


def stem_steps(stems: dict[str, nn.Module], config: ViTConfig, batch_size: int, dtype: torch.dtype) -> dict[str, Step]:
    """Forward and backward pass of each stem; each returns its tokens."""
    device = stems["conv"].weight.device
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

    return {name: functools.partial(step, stem) for name, stem in stems.items()}


def matmul_step(dtype: torch.dtype, device: torch.device) -> Step:
    """A large matrix product: the rate that the machine has to offer."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    return functools.partial(torch.mm, left, right, out=result)


def interleave(turns: dict[str, Step], rounds: int, warmup: int, steps: int, device: torch.device) -> dict[str, list]:
    """Seconds a step of each, for each round after the warm-up rounds. A round gives each a turn of `steps` steps."""
    names, seconds, order = list(turns), {name: [] for name in turns}, random.Random(0)
    for index in range(warmup + rounds):
        order.shuffle(names)  # not only rotated: what comes before a turn leaves its traces in caches and clocks
        for name in names:
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
    torch.compiler.reset()  # or the cases before this one count towards the limit of recompilations
    models = build_stems(config, device) if args.stems else build_models(config, device)
    if args.compile:
        for model in models.values():
            model.compile()
    turns = (stem_steps if args.stems else model_steps)(models, config, batch_size, DTYPES[dtype])
    outputs = [turn() for turn in turns.values()]
    if args.stems:
        extra = {"largest_difference": difference(*outputs)}
    else:
        counts = {sum(parameter.numel() for parameter in model.parameters()) for model in models.values()}
        exact = dtype == "fp32" and not args.tf32
        if max(outputs) - min(outputs) > (1e-4 if exact else 1e-2) or len(counts) > 1:
            raise AssertionError(f"not the same model three times: losses {outputs}, parameters {counts}")
        extra = {"num_parameters": counts.pop(), "train_flops_per_image": 3 * summarise(config).forward_flops}
    matmul_flops = 2 * MATMUL_SIZE[device.type] ** 3
    seconds = interleave(
        turns | {"mm": matmul_step(DTYPES[dtype], device)}, args.rounds, args.warmup, args.steps, device
    )
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


def main() -> None:
    """Measures, or prints tables of what was measured."""
    keep_freed_memory()
    args = parse()
    if args.table:
        print("\n\n".join(table(read_report(path)) for path in args.table))
        return
    cases, device = check(args), torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    report: dict[str, Any] = {**environment(device), "rows": []}
    for preset, (config, batch_size) in cases.items():
        for dtype in args.dtype.split(","):
            try:
                rows = compare(args, config, preset, batch_size, dtype, device)
            except torch.OutOfMemoryError:
                raise UserError(f"{preset}, {dtype}: out of memory at --batch_size {batch_size}") from None
            report["rows"] += rows
            print(", ".join(f"{row['model']} {row['images_per_second']:.1f} images/s" for row in rows), flush=True)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                write_json(report, args.output)
    print("\n" + table(report))


def parse() -> Any:
    """The command line."""
    parser = Parser(prog="benchmarks/models.py", description=__doc__.partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", help="several by comma; default: two that suit a CPU, three that suit a GPU")
    parser.add_argument(
        "--dtype", default="fp32,bf16", help="fp32, bf16 (autocast over fp32 weights) or both by comma"
    )
    parser.add_argument("--tf32", action="store_true", help="on a GPU, multiply fp32 as TF32")
    parser.add_argument("--batch_size", type=int, help="images of a step; default: by preset")
    parser.add_argument("--rounds", type=int, default=12, help="measured rounds (default: 12)")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them (default: 3)")
    parser.add_argument("--steps", type=int, help="steps of a model in a round (default: 1 on a CPU, 5 on a GPU)")
    parser.add_argument("--compile", action="store_true", help="torch.compile each model")
    parser.add_argument("--stems", action="store_true", help="compare the two forms of the patch stem alone")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(
        "--table", type=Path, nargs="+", metavar="FILE", help="print tables of these JSON files instead"
    )
    return parser.parse_args()


def check(args: Any) -> dict[str, tuple[ViTConfig, int]]:
    """Preset -> configuration and batch size. Raises ArgumentError for flags that cannot be right."""
    cuda = torch.cuda.is_available()
    args.device = args.device or ("cuda" if cuda else "cpu")
    if args.device not in DEFAULTS:
        raise ArgumentError(f"--device: {args.device!r} is not one of {', '.join(DEFAULTS)}")
    if args.device == "cuda" and not cuda:
        raise ArgumentError("--device cuda: torch sees no CUDA device")
    if args.tf32 and args.device != "cuda":
        raise ArgumentError("--tf32 goes with --device cuda")
    for dtype in args.dtype.split(","):
        if dtype not in DTYPES:
            raise ArgumentError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    args.steps = STEPS[args.device] if args.steps is None else args.steps
    least = {"batch_size": 1, "rounds": 1, "warmup": 0, "steps": 1}
    for name, low in least.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ArgumentError(f"--{name}: {getattr(args, name)} is out of range, allowed is {low} or more")
    cases = {}
    for name in args.preset.split(",") if args.preset else DEFAULTS[args.device]:
        try:
            config = preset_config(name, num_labels=1000)
        except ValueError as error:
            raise ArgumentError(f"--preset {name}: {error}") from None
        if not isinstance(config, ViTConfig) or not config.is_stock:
            raise ArgumentError(f"--preset {name}: not a plain ViT, which is what is compared")
        cases[name] = (config, args.batch_size or DEFAULTS[args.device].get(name, 32))
    return cases


if __name__ == "__main__":
    exit_with(main)
