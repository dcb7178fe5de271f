"""`--init_from TOKENIZER`: the model of a tokenizer as a config, at its place on the command line, so that what stands behind it wins."""

import json

from gq_lightning.errors import UserError
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.training.starting import model_config

OPTION = "--init_from"


def with_start(args: list[str]) -> list[str]:
    """A command line in which each --init_from is preceded by the config of its tokenizer. Raises UserError if there is no such
    tokenizer."""
    found = list(args)
    for place in reversed(range(len(args))):
        option, equals, value = args[place].partition("=")
        if option == OPTION and (equals or args[place + 1 :]):
            name = value if equals else args[place + 1]
            if name != "null":
                found.insert(place, f"--config={json.dumps(model_config(load_start(name)))}")
    return found


def load_start(name: str) -> ImageTokenizer:
    """The tokenizer that `--init_from` names. Raises UserError."""
    try:
        return ImageTokenizer.from_pretrained(name)
    except UserError as error:
        raise UserError(f"--init_from {error}") from error
