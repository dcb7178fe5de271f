"""The commands that train and measure a tokenizer: LightningCLI's fit, validate, test and predict, and summary.

This module links the arguments so that a width or an image size is given once, and lists the callbacks of these runs.
"""

import json
from pathlib import Path

import torch
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console

from gq_lightning.callbacks import Advice, BrokenPictures, Diagnostics, Export, NonFinite, Reconstructions, TokenWriter
from gq_lightning.callbacks.order import needed
from gq_lightning.callbacks.watching.dashboard import Charts, charts_of_tokenizers
from gq_lightning.cli.options import OF_TOKENIZERS
from gq_lightning.cli.runs import RunCommandLine, call
from gq_lightning.data import ImageDataModule, Size, shortened, spelled
from gq_lightning.errors import UserError
from gq_lightning.evaluation.report import compared
from gq_lightning.evaluation.summary import Format, render, summarize
from gq_lightning.tokenizer import ImageTokenizer
from gq_lightning.training.module import TokenizerTraining, Trained
from gq_lightning.training.starting import model_config, start_from


class CommandLine(RunCommandLine):
    """Trains a TokenizerTraining on an ImageDataModule."""

    module, data, monitor, replaced = TokenizerTraining, ImageDataModule, ("val/psnr", "max"), OF_TOKENIZERS

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(Advice, "advice")
        parser.add_argument(
            "--init_from",
            type=str | None,
            default=None,
            help="tokenizer whose model and weights fit begins with: a name of `models`, folder, owner/name; put it behind the configs",
        )
        parser.add_argument(
            "--train", type=Trained, default="all", help="what fit trains: all, or the decoder alone, which keeps all tokens"
        )
        parser.add_argument(
            "--backbone_image_size", type=Size | None, default=None, help="image_size of the backbone; null takes that of the data"
        )
        parser.link_arguments("train", "model.train")
        for width in ("encoder_channels", "latent_channels"):
            parser.link_arguments(
                "model.quantizer",
                f"model.backbone.init_args.{width}",
                compute_fn=lambda quantizer, width=width: getattr(quantizer, width),
                apply_on="instantiate",
            )
        parser.link_arguments(
            ("data.init_args.image_size", "backbone_image_size"),
            "model.backbone.init_args.image_size",
            compute_fn=lambda pictures, own: shortened(pictures if own is None else own),
        )

    def before_instantiate_classes(self) -> None:
        if self.subcommand == "fit":
            part, source, checkpoint, run = (
                self._get(self.config, name) for name in ("train", "init_from", "ckpt_path", "trainer.default_root_dir")
            )
            if part == "decoder" and source is None and checkpoint is None:
                raise UserError("--train decoder: keeps an encoder, but none is given: give --init_from, the tokenizer that has it")
            if source and self._get(self.config, "overwrite") and Path(source).absolute().is_relative_to(Path(run).absolute()):
                raise UserError(f"--init_from {source}: it lies in the run that is to be overwritten: choose another --name")
        super().before_instantiate_classes()

    def after_instantiate_classes(self) -> None:
        super().after_instantiate_classes()
        if self.subcommand != "fit":
            return
        seen, size = self.model.tokenizer.fixed_image_size, self._get(self.config, "data.init_args.image_size")
        if seen is not None and shortened(seen) != shortened(size):
            name = type(self.model.tokenizer.backbone).__name__
            told = f"data.init_args.image_size: {spelled(size)}, but the {name} sees pictures of {spelled(seen)} pixels alone"
            raise UserError(f"{told}: give {spelled(seen)}")
        if (source := self._get(self.config, "init_from")) is not None and self._checkpoint is None:
            new = start_from(self.model.tokenizer, load_start(source), source, self.model.decoder_alone)
            fate = f"all weights but {len(new)}, which begin anew: {', '.join(new)}" if new else "all weights"
            rank_zero_info(f"{source}: gives {fate}")

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


def with_start(args: list[str]) -> list[str]:
    """A command line in which each --init_from is preceded by the config of its tokenizer's model, so that what stands behind it wins.
    Raises UserError if there is no such tokenizer."""
    found = list(args)
    for place in reversed(range(len(args))):
        option, equals, value = args[place].partition("=")
        if option == "--init_from" and (equals or args[place + 1 :]):
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


def run(args: list[str]) -> None:
    """Runs a command of `main.TRAINING`. Raises UserError."""
    if args[0] == "summary":
        call(SummaryCommand, with_start(args[1:]), "summary")
    else:
        call(CommandLine, with_start(args), args[0])
