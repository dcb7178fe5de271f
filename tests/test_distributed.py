"""Two real processes under DDP (gloo), through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from small import CONFIGS

RECORD = """
import sys, torch
from lightning.pytorch import Callback
from gq_lightning.cli import CommandLine

class Record(Callback):
    def on_fit_end(self, trainer, module):
        torch.save(dict(module.state_dict()), f"{trainer.default_root_dir}/rank{trainer.global_rank}.pt")

from gq_lightning import cli
start = cli.CommandLine.instantiate_trainer
cli.CommandLine.instantiate_trainer = lambda self, **kw: (lambda t: (t.callbacks.append(Record()), t)[1])(start(self, **kw))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_ranks_agree_and_every_image_is_measured_once(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RECORD)
    configs = ("base.yaml", "backbone/vit_small.yaml", "data/photographs.yaml", "scale/smoke.yaml", "machine/cpu.yaml")
    arguments = [
        *(text for file in configs for text in ("--config", str(CONFIGS / file))),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"),
        *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
        *("--trainer.callbacks=gq_lightning.callbacks.TDC", "--trainer.callbacks+=gq_lightning.callbacks.GaussianQuant"),
        *("--trainer.callbacks.rfid=false", "--trainer.enable_progress_bar=false", "--trainer.devices=2", "--trainer.strategy=ddp"),
        *("--trainer.max_steps=6", "--trainer.val_check_interval=3", "--trainer.accumulate_grad_batches=1"),
        *("--data.init_args.image_size=40", f"--runs={tmp_path}", "--name=two", "--threads=1"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    call = [sys.executable, str(script), "fit", *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"two/rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert {first[f"quantizer.tdc.lambda_{name}"].item() for name in ("min", "mean", "max")} != {1.0}
    metrics = json.loads((tmp_path / "two/metrics.json").read_text())
    # shorter side 256 in a grid of 40: 3 photographs of 6 rows and 9 columns, an odd number for two ranks of batches of 8
    assert metrics["images"] == metrics["protocol"]["data"]["images"] == 162
    assert metrics["tokens"] == 162 * 25 * 2
