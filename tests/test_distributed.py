"""Two real processes under DDP (gloo), through the command line."""

import json
import warnings
from pathlib import Path

import torch
from processes import on_ranks
from small import CONFIGS, run_ranks

from gq_lightning.distributed import rows_of_all_ranks


def test_ranks_agree_and_every_image_is_measured_once(tmp_path: Path) -> None:
    configs = ("base.yaml", "backbone/vit_small.yaml", "data/photographs.yaml", "scale/smoke.yaml", "machine/cpu.yaml")
    arguments = [
        *(text for file in configs for text in ("--config", str(CONFIGS / file))),
        *("--model.backbone.init_args.width=32", "--model.backbone.init_args.layers=1"),
        *("--model.quantizer.init_args.codebook_size=256", "--model.quantizer.init_args.latent_channels=4"),
        *("--trainer.callbacks=gq_lightning.callbacks.TDC", "--trainer.callbacks+=gq_lightning.callbacks.GaussianQuant"),
        *("--export.rfid=false", "--trainer.enable_progress_bar=false", "--trainer.devices=2", "--trainer.strategy=ddp"),
        *("--trainer.max_steps=6", "--trainer.val_check_interval=3"),
        *("--data.init_args.image_size=40", f"--runs={tmp_path}", "--name=two", "--threads=1"),
    ]
    first, second = run_ranks(tmp_path, arguments, "two")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    assert {first[f"tokenizer.quantizer.tdc.lambda_{name}"].item() for name in ("min", "mean", "max")} != {1.0}
    metrics = json.loads((tmp_path / "two/metrics.json").read_text())
    # shorter side 256 in a grid of 40: 3 photographs of 6 rows and 9 columns, an odd number for two ranks of batches of 8
    assert metrics["images"] == metrics["protocol"]["data"]["images"] == 162
    assert metrics["tokens"] == 162 * 25 * 2


def gather(folder: Path, rank: int, ranks: int) -> None:
    warnings.simplefilter("error", UserWarning)
    # rank 0 has none, rank 1 one row, rank 2 two
    rows = 10.0 * rank + torch.arange(rank * 2.0).reshape(rank, 2)
    assert rows_of_all_ranks(rows).tolist() == [[10, 11], [20, 21], [22, 23]]


def test_rows_of_ranks_that_have_different_numbers_of_them(tmp_path: Path) -> None:
    alone = torch.ones(2, 3, requires_grad=True)
    assert rows_of_all_ranks(alone).equal(alone) and not rows_of_all_ranks(alone).requires_grad
    assert on_ranks(__file__, "gather", tmp_path, 3).strip() == ""
