"""Adapts the tokenizer in the box to pictures of another kind, stained tissue, and compares with its start and with training from nothing.

    python experiments/finetune.py [--steps 100] [--work runs/finetune] [--out experiments/results/finetune.json]

The picture, ihc.png, comes with scikit-image: the left three quarters are trained on, the right quarter is measured in squares of 64.
Three trainings of equally many steps: all of the tokenizer, its decoder alone, and the same network from nothing.
"""

import argparse
import json
import subprocess
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from PIL import Image

from running import write_json

ROOT = Path(__file__).parents[1]
PICTURE, START, SIDE = "ihc.png", "gq-small-16", 64
CONFIGS = [word for name in ("base", "data/folder", "scale/small", "machine/cpu") for word in ("--config", f"configs/{name}.yaml")]
# options by what is trained; the learning rate from nothing is that of configs/scale/small.yaml
TRAININGS = {
    "all": ["--init_from", START, "--model.learning_rate", "5e-4"],
    "decoder": ["--init_from", START, "--train", "decoder", "--model.learning_rate", "5e-4"],
    "nothing": ["--config", "configs/quantizer/gq_exact.yaml", "--model.quantizer.init_args.latent_channels", "8"],
}
NAMES = {"start": f"{START} as it is", "decoder": "its decoder fine-tuned", "all": "all of it fine-tuned", "nothing": "from nothing"}


def cut(folder: Path) -> None:
    """Writes train/, overlapping squares twice as large as the training crops, and val/."""
    with as_file(files("skimage").joinpath("data", PICTURE)) as path:
        picture = Image.open(path).convert("RGB")
    border = picture.width * 3 // 4 // SIDE * SIDE
    for name, left, right, side in (("train", 0, border, 2 * SIDE), ("val", border, picture.width, SIDE)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for x in range(left, right - side + 1, SIDE):
            for y in range(0, picture.height - side + 1, SIDE):
                picture.crop((x, y, x + side, y + side)).save(folder / name / f"{x}-{y}.png")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "gq_lightning", *arguments], check=True)


def measured(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text())
    numbers = {name: round(values[name], 4) for name in ("psnr", "ssim", "lpips")}
    return numbers | {"tokenizer_fingerprint": values["tokenizer_fingerprint"]}


def table(found: dict[str, Any]) -> str:
    rows = ["| | PSNR | SSIM | LPIPS |", "|---|---|---|---|"]
    for name, text in NAMES.items():
        values = found["results"][name]
        rows.append(f"| {text} | {values['psnr']:.2f} dB | {values['ssim']:.3f} | {values['lpips']:.3f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Adapts the tokenizer in the box to pictures of another kind.")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune"), help="folder of pictures and runs")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/finetune.json")
    options = parser.parse_args()
    pictures, work = options.work / "pictures", str(options.work)
    cut(pictures)
    evaluated = options.work / "start.json"
    run("evaluate", "--tokenizer", START, "--data", f"{pictures}/val", "--size", str(SIDE), "--no_rfid", "--out", str(evaluated))
    results = {"start": measured(evaluated)}
    for name, given in TRAININGS.items():
        common = ["--runs", work, "--name", name, "--overwrite", "true", "--threads", "1", "--trainer.max_steps", str(options.steps)]
        common += ["--data.init_args.root", f"{pictures}/train", "--data.init_args.validation_root", f"{pictures}/val"]
        common += ["--data.init_args.workers", "0", "--model.warmup_steps", "10", "--export.rfid", "false"]
        run("fit", *CONFIGS, *given, *common, "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false")
        results[name] = measured(options.work / name / "metrics.json")
    found = {"picture": PICTURE, "squares": len(list((pictures / "val").iterdir())), "steps": options.steps, "batch": 8, "results": results}
    write_json(options.out, found)
    print(table(found))


if __name__ == "__main__":
    main()
