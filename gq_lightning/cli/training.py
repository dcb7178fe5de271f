"""The commands that train and measure a tokenizer: LightningCLI's fit, validate, test and predict, and summary.

This module links the arguments so that a width or an image size is given once, and lists the callbacks of these runs.
"""

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from gq_lightning.callbacks import Advice, BrokenPictures, Diagnostics, Export, NonFinite, Reconstructions, TokenWriter
from gq_lightning.callbacks.order import needed
from gq_lightning.callbacks.watching.dashboard import Charts, charts_of_tokenizers, compared
from gq_lightning.cli.options import OF_TOKENIZERS
from gq_lightning.cli.runs import RunCommandLine, call
from gq_lightning.data import ImageDataModule
from gq_lightning.evaluation.summary import Format, render, summarize
from gq_lightning.training.module import TokenizerTraining


class CommandLine(RunCommandLine):
    """Trains a TokenizerTraining on an ImageDataModule."""

    module, data, monitor, replaced = TokenizerTraining, ImageDataModule, ("val/psnr", "max"), OF_TOKENIZERS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(Advice, "advice")
        for width in ("encoder_channels", "latent_channels"):
            parser.link_arguments(
                "model.quantizer",
                f"model.backbone.init_args.{width}",
                compute_fn=lambda quantizer, width=width: getattr(quantizer, width),
                apply_on="instantiate",
            )
        parser.link_arguments("data.init_args.image_size", "model.backbone.init_args.image_size")

    def dashboard(self) -> tuple[Charts, list[str]]:
        return charts_of_tokenizers(), ["val/psnr", *(f"final/{name}" for name in compared())]

    def own_callbacks(self, given: list[Callback]) -> list[Callback]:
        own = [NonFinite(), Reconstructions(), Diagnostics(), BrokenPictures(), TokenWriter()]
        return [*own, *needed(self.model.tokenizer.quantizer, given)]


class SummaryCommand(CommandLine):
    """`summary` takes the arguments of `fit` but builds only the model, on the meta device. It needs no data and no weights."""

    def __init__(self, args: list[str]) -> None:
        # the loss would fetch the LPIPS weights; nothing is random, so nothing is seeded
        super().__init__([*args, "--model.loss=null", "--seed_everything=false"], run=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--format", type=Format, default="table", help="how to print it")
        # a run's config.yaml has these entries; no checkpoint is read
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="ignored")
        parser.add_argument("--weights_only", type=bool | None, default=None, help="ignored")

    def instantiate_classes(self) -> None:
        size = self._get(self.config, "data.init_args.image_size")
        with torch.device("meta"):
            self.model = self.parser.instantiate_classes(Namespace(model=self.config.model)).model
        rendered = render(summarize(self.model.tokenizer, size, self.model), self.config.format)
        if isinstance(rendered, str):
            print(rendered)  # for other programs, or to paste: neither wrapped nor coloured
        else:
            Console(markup=False, emoji=False).print(rendered)


def run(args: list[str]) -> None:
    """Runs a command of `main.TRAINING`. Raises UserError."""
    if args[0] == "summary":
        call(SummaryCommand, args[1:], "summary")
    else:
        call(CommandLine, args, args[0])
