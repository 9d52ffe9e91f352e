"""What a run is told: the flags of both scripts, their YAML file, and every check that needs no data and no model.

fields.py       the flags by topic, each with its help, its range and whether it may change at a resume
parser.py       flags over a YAML file over the defaults, as values; and the values as YAML has them
values.py       what is more than a number or a word: read from text once, written as text again
checks.py       flags that exclude or need each other
pick.py         what one room of the package needs of them
identity.py     what makes a run this run, and what may change of it when it goes on

A recipe (`--config FILE.yaml`) holds the same names as the flags; a flag wins over the file. This package must not import
torch, transformers or more of vit_hf than its errors, so that `--help` and a wrong flag answer at once.
"""

from vit_hf.arguments.checks import check, check_augmentation, check_loading, check_one_model, check_subset
from vit_hf.arguments.fields import RunArguments
from vit_hf.arguments.identity import MENDABLE, changes, differences, identity, saved_identity, without_paths
from vit_hf.arguments.parser import Parser, parse, plain, read_config
from vit_hf.arguments.pick import pick
from vit_hf.arguments.values import RandAugment, RandomCrop

__all__ = [
    "MENDABLE",
    "Parser",
    "RandAugment",
    "RandomCrop",
    "RunArguments",
    "changes",
    "check",
    "check_augmentation",
    "check_loading",
    "check_one_model",
    "check_subset",
    "differences",
    "identity",
    "parse",
    "pick",
    "plain",
    "read_config",
    "saved_identity",
    "without_paths",
]
