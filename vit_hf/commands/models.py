"""`vit-hf models`: the presets and what they cost."""

from vit_hf.arguments import Parser
from vit_hf.arguments.values import parse_overrides
from vit_hf.errors import ArgumentError


def main(argv: list[str]) -> None:
    """Lists the presets, one a line, at 1,000 classes; or shows what becomes of an image in one of them."""
    parser = Parser(prog="vit-hf models", description=main.__doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset")
    parser.add_argument("--config_overrides", help='with NAME: fields of its configuration, e.g. "pooling=mean"')
    args = parser.parse_args(argv)
    if args.config_overrides and not args.name:
        raise ArgumentError("--config_overrides goes with the NAME of a preset")
    from vit_hf.models.presets import PRESETS, preset_config
    from vit_hf.models.summary import stages, summarise

    form = "{:38} {:>10}  {:>6}  {:>8}  {:>9}  {:>9}"
    header = form.format("preset", "parameters", "tokens", "GFLOPs", "states", "an image")
    try:
        changes = parse_overrides(args.config_overrides or "")
        configs = {
            name: preset_config(name, changes, num_labels=1000) for name in ([args.name] if args.name else PRESETS)
        }
        parts = stages(configs[args.name]) if args.name else []
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # the latter where torch has no such size
        raise ArgumentError(f"model {args.name}: {' '.join(str(error).split())[:300]}") from None
    print(header)
    for name, config in configs.items():
        size = summarise(config)
        row = form.format(
            name,
            f"{size.num_parameters / 1e6:.1f} M",
            size.num_tokens or "-",
            f"{size.forward_flops / 1e9:.{1 if size.forward_flops > 1e10 else 2}f}",
            f"{size.state_bytes / 2**30:.2f} GiB",
            f"{size.activation_bytes / 2**20:.1f} MiB",
        )
        print(row, flush=True)
    if args.name:
        width = max(len(part) for part, _ in parts)
        print(f"\n{'part':{width}}  shape, for one image")
        inner = [part for part, _ in parts if part.startswith("vit.layers.")][1:-1]  # all the same
        for part, shape in parts:
            if part not in inner:
                print(f"{part:{width}}  {' x '.join(map(str, shape))}")
            elif part == inner[0]:
                print("...")
    print(
        "\nGFLOPs: one image forward, two operations a multiply-add. Memory of training: states (fp32 weights,\n"
        "gradients, AdamW) + images at once x an image (bf16 mixed precision), and what the framework takes."
    )
