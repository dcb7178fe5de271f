"""Where every command begins. It knows the commands by name alone: what a command needs is imported when it is called."""

import sys

from gq_lightning.errors import UserError, printable

TRAINING = ("fit", "validate", "test", "predict", "summary")
TOOLS = ("weights", "shard", "convert", "import-checkpoint", "encode", "decode", "evaluate")
HELP = """\
usage: python -m gq_lightning COMMAND …       (every COMMAND has --help)

train and measure, configured by YAML files and --key value:
  fit           train, convert to a tokenizer by Gaussian Quant, measure
  validate      metrics of a checkpoint on the data's evaluation set
  test          the same, with rFID
  predict       tokens of the evaluation set, as files
  summary       parameters, FLOPs and tokens of what fit would train

tools:
  weights       fetch and verify the LPIPS and Inception weights
  shard         a folder of pictures to tar shards, for configs/data/shards.yaml
  convert       RUN_OR_CKPT: Gaussian Quant by hand, to a tokenizer's folder
  import-checkpoint  FILE.ckpt of the authors' code, to a tokenizer's folder
  encode        pictures to token files
  decode        token files to PNG
  evaluate      metrics of a tokenizer on a folder of images
"""


def main(args: list[str] | None = None) -> int:
    """Runs a command; returns the exit status. Wrong input gives one line on standard error, and 2."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0
    try:
        if args[0] in TRAINING:
            from gq_lightning.cli import training

            training.run(args)
        elif args[0] in TOOLS:
            from gq_lightning.cli import tools

            tools.run(args)
        else:
            raise UserError(f"{args[0]} is no command; there are {', '.join(TRAINING + TOOLS)}")
        return 0
    except (UserError, FileNotFoundError) as error:
        text = Exception.__str__(error)
        if text.startswith("Caught "):  # from a worker process it is a traceback whose last line is ours
            text = text.strip().splitlines()[-1].removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")
        print(f"error: {printable(text)}", file=sys.stderr)
        return 2
