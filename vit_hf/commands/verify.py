"""`vit-hf verify`: a run beside what its recipe promises."""

from dataclasses import dataclass
from pathlib import Path

from vit_hf.arguments import RunArguments, parse, read_config
from vit_hf.arguments.fields import flag
from vit_hf.commands.outputs import check_folder
from vit_hf.errors import UserError


@dataclass
class VerifyArguments:
    """Which run."""

    run: str = flag("", "folder of a finished run")
    recipe: str | None = flag(None, "take `expected:` from this recipe (default: as the run's run_config.yaml has it)")


def main(argv: list[str]) -> None:
    """Compares all_results.json with the recipe's `expected:`, prints a table and writes verified.json; ends with 1 where
    something is missed. Better than expected is no miss."""
    args = parse(VerifyArguments, argv, prog="vit-hf verify", description=main.__doc__, positional="run")
    from vit_hf.hub.card import refresh_card
    from vit_hf.hub.verify import VERIFIED, misses, table, verify_run

    if Path(args.run).is_dir():
        check_folder(args.run, "RUN")
    promises = read_config(args.recipe, RunArguments).get("expected", ()) if args.recipe else None
    verified = verify_run(Path(args.run), promises)
    print(table(verified))
    carded = refresh_card(Path(args.run))
    print(
        f"written to {Path(args.run) / VERIFIED}"
        + (" and into the card" if carded else "; README.md is not ours and stays")
    )
    if not verified["met"]:
        raise UserError(f"{args.run}: {misses(verified)}")
