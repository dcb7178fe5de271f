"""`prior fit` and `prior validate` train and measure a prior on token sets, with the machinery that trains tokenizers."""

from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from gq_lightning.callbacks.prior_export import PriorExport
from gq_lightning.callbacks.watching.dashboard import Charts, charts_of_priors
from gq_lightning.callbacks.watching.samples import Samples
from gq_lightning.cli.runs import RunCommandLine, call
from gq_lightning.priors.training import PriorTraining
from gq_lightning.tokens import TokenSets


class PriorCommandLine(RunCommandLine):
    """Trains a PriorTraining on TokenSets."""

    module, data, monitor = PriorTraining, TokenSets, ("val/bits_per_pixel", "min")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: LightningCLI.subcommands()[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(PriorExport, "export")
        parser.add_lightning_class_args(Samples, "samples")
        # the geometry of the tokens comes from the token set
        for name in ("grid", "codebook_size", "downsampling", "tokenizer", "classes"):
            target = f"model.prior.init_args.{name}"
            parser.link_arguments("data", target, compute_fn=lambda data, name=name: getattr(data.header, name), apply_on="instantiate")

    def dashboard(self) -> tuple[Charts, list[str]]:
        return charts_of_priors(), ["val/bits_per_pixel", "val/loss"]

    def own_callbacks(self, given: list[Callback]) -> list[Callback]:
        return []


def run(args: list[str]) -> None:
    """Runs `prior` with the arguments that follow it. Raises UserError."""
    call(PriorCommandLine, args, f"prior {args[0]}" if args else "prior")
