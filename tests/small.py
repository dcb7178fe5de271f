"""Small real tokenizers for the tests."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from gq_lightning import ImageTokenizer
from gq_lightning.backbones import UNet, VisionTransformer
from gq_lightning.losses.reconstruction import ReconstructionLoss
from gq_lightning.quantizers import GaussianQuantizer, Quantizer
from gq_lightning.training.module import TokenizerTraining

CONFIGS = Path(__file__).parents[1] / "configs"


def small_tokenizer(backbone: str, quantizer: Quantizer | None = None) -> ImageTokenizer:
    return small_training(backbone, quantizer).tokenizer


def small_training(backbone: str, quantizer: Quantizer | None = None, **arguments: object) -> TokenizerTraining:
    torch.manual_seed(0)
    quantizer = quantizer or GaussianQuantizer(16, latent_channels=4, codebook_size=256)
    widths = {"encoder_channels": quantizer.encoder_channels, "latent_channels": quantizer.latent_channels, "image_size": 32}
    network = (
        VisionTransformer(**widths, width=32, layers=1, heads=2, head_width=64)
        if backbone == "vit"
        else UNet(**widths, channels=32, multipliers=[1, 1, 1, 1], blocks=1, attention_resolutions=[4])
    )
    loss = ReconstructionLoss("l2", lpips_weight=0.0)
    return TokenizerTraining(network, quantizer, loss, **arguments)  # type: ignore[arg-type]


RECORD = """
import sys, torch
from lightning.pytorch import Callback
from gq_lightning.cli.training import CommandLine

class Record(Callback):
    def on_fit_end(self, trainer, module):
        torch.save(dict(module.state_dict()), f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")

from gq_lightning.cli import training as cli
start = cli.CommandLine.instantiate_trainer
cli.CommandLine.instantiate_trainer = lambda self, **kw: (lambda t: (t.callbacks.append(Record()), t)[1])(start(self, **kw))
from gq_lightning.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run_ranks(folder: Path, arguments: list[str], name: str, ranks: int = 2) -> list[dict[str, torch.Tensor]]:
    """The final state of every rank of a `fit` by the command line, in processes of its own; `arguments` say how many."""
    script = folder / "run.py"
    script.write_text(RECORD)
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    call = [sys.executable, str(script), "fit", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / name / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
