"""`vit-hf lineage`: from a model back to the data."""

from dataclasses import dataclass

from vit_hf.arguments import parse
from vit_hf.arguments.fields import flag
from vit_hf.errors import UserError


@dataclass
class LineageArguments:
    """Which model."""

    model: str = flag("", "Hub id or folder of a model, a run or a checkpoint")
    revision: str | None = flag(None, "branch, tag or commit of the Hub model")


def main(argv: list[str]) -> None:
    """Prints what a model was trained from, pinned by commit, and on which data, back to the first of the chain. Of the
    Hub it downloads run_config.yaml alone."""
    args = parse(LineageArguments, argv, prog="vit-hf lineage", description=main.__doc__, positional="model")
    from vit_hf.hub.lineage import trace

    lines, found = trace(args.model, args.revision)
    if not found:
        raise UserError(lines[-1])
    print("\n".join(lines))
