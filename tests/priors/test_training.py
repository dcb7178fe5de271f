"""A prior by the command line: from pictures to token sets, to a prior, to new pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small import CONFIGS, small_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gq_lightning.cli.main import main
from gq_lightning.priors import Prior
from gq_lightning.priors.counts import counted_bits_per_pixel, uniform_bits_per_pixel
from gq_lightning.quantizers import GaussianQuantizer
from gq_lightning.tokens import TokenSet

TINY = ["--model.prior.width=32", "--model.prior.heads=2", "--model.prior.layers=1", "--model.prior.head_layers=1", "--samples.count=2"]
STEPS = [
    "--trainer.val_check_interval=4",
    "--trainer.log_every_n_steps=2",
    "--trainer.enable_progress_bar=false",
    "--last.every_n_train_steps=3",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, a tokenizer with an ordered codebook, and the token sets."""
    folder = tmp_path_factory.mktemp("prior")
    for split, count in (("train", 24), ("val", 4)):
        for index in range(count):
            path = folder / "pictures" / split / ("cats", "dogs")[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index + 100 * (split == "val")).integers(0, 255, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC).save(path)
    quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=65536, order="tree")
    small_tokenizer("vit", quantizer).save_pretrained(folder / "tokenizer")
    data = ["--config", str(CONFIGS / "data/imagenet.yaml"), f"--data.init_args.root={folder}/pictures", "--data.init_args.image_size=32"]
    arguments = ["tokenize", "--tokenizer", str(folder / "tokenizer"), *data, "--data.init_args.workers=0", "--views", "flip"]
    assert main([*arguments, "--out", str(folder / "tokens")]) == 0
    return folder


def fit(folder: Path, name: str, *more: str) -> int:
    data = [f"--data.init_args.root={folder}/tokens", f"--data.init_args.tokenizer={folder}/tokenizer", "--data.init_args.batch_size=8"]
    run = [f"--runs={folder}/runs", f"--name={name}", "--export.samples=3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [("ignore", None, Warning, None, 0)])
        return main(["prior", "fit", "--config", str(CONFIGS / "prior/small.yaml"), *data, *TINY, *STEPS, *run, *more])


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    assert fit(folder, "whole", "--trainer.max_steps=10") == 0
    return folder / "runs/whole"


def test_what_a_run_leaves(run: Path, folder: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    prior = Prior.from_pretrained(run / "prior")
    held_out = TokenSet(folder / "tokens/val", first_view=True)
    assert prior.classes == ("cats", "dogs") and prior.tokenizer == held_out.header.tokenizer
    tokens, labels = (torch.stack([torch.as_tensor(row[part]) for row in held_out]) for part in (0, 1))
    assert sorted(labels.tolist()) == [0, 0, 1, 1]
    bits = prior(tokens, labels).double()
    assert metrics["bits_per_pixel"] == pytest.approx(float(bits.sum()) / (4 * 32 * 32), rel=1e-5)
    assert metrics["loss"] == pytest.approx(float(bits.mean()) * np.log(2), rel=1e-5)
    for digit in (0, 1):
        assert metrics[f"perplexity/{digit + 1}"] == pytest.approx(2 ** float(bits[..., digit].mean()), rel=1e-5)
    assert metrics["bits_per_pixel_uniform"] == 0.25 == uniform_bits_per_pixel(held_out)
    events = EventAccumulator(str(run)).Reload()
    assert {"loss", "bits_per_pixel", "val/bits_per_pixel", "val/bits_per_pixel_counts", "val/perplexity/2"} <= set(
        events.Tags()["scalars"]
    )
    assert events.Tags()["images"] == ["samples"]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (run / "samples.png").is_file()


def test_counts_against_a_plain_computation(folder: Path) -> None:
    training, held_out = TokenSet(folder / "tokens/train"), TokenSet(folder / "tokens/val", first_view=True)
    seen, bits = [int(token) for tokens, _ in training for token in tokens.flatten()], 0.0
    for tokens, _ in held_out:
        for token in tokens.flatten().tolist():
            bits -= np.log2((seen.count(token) + 0.5) / (len(seen) + 0.5 * 65536))
    assert counted_bits_per_pixel(training, held_out) == pytest.approx(bits / (4 * 32 * 32), rel=1e-9)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_in_bfloat16_too(algorithm: str, folder: Path) -> None:
    """With an optimizer of one kernel, which Lightning takes for one that undoes a scaling."""
    clip = ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=1e-6", f"--trainer.gradient_clip_algorithm={algorithm}"]
    assert fit(folder, f"clipped-{algorithm}", *clip, "--trainer.max_steps=1", "--samples.count=0", "--export.samples=0") == 0
    checkpoint = torch.load(folder / f"runs/clipped-{algorithm}/checkpoints/last.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    moments = torch.cat([state["exp_avg"].flatten() for state in optimizer["state"].values()]) / (1 - 0.9)
    largest = moments.norm() if algorithm == "norm" else moments.abs().max()
    assert largest == pytest.approx(1e-6, rel=1e-3)


def test_resumed_it_is_the_training_that_never_stopped(run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Killed with SIGKILL while it trains, and started again by the same command."""
    script = folder / "killed.py"
    script.write_text(
        "import os, signal, sys\nfrom lightning.pytorch import Callback\nfrom gq_lightning.cli import runs\n"
        "class Kill(Callback):\n    def on_train_batch_start(self, trainer, *_):\n"
        "        trainer.global_step == 5 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "start = runs.RunCommandLine.instantiate_trainer\n"
        "def with_kill(self, **settings):\n    trainer = start(self, **settings)\n"
        "    trainer.callbacks.append(Kill())\n    return trainer\n"
        "runs.RunCommandLine.instantiate_trainer = with_kill\nfrom gq_lightning.cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    data = [f"--data.init_args.root={folder}/tokens", f"--data.init_args.tokenizer={folder}/tokenizer", "--data.init_args.batch_size=8"]
    arguments = [
        "prior",
        "fit",
        "--config",
        str(CONFIGS / "prior/small.yaml"),
        *data,
        *TINY,
        *STEPS,
        f"--runs={folder}/runs",
        "--name=killed",
    ]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(script), *arguments, "--trainer.max_steps=10", "--export.samples=3"]
    done = subprocess.run(call, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -9, done.stderr[-2000:]
    assert not (folder / "runs/killed/prior").exists()
    assert fit(folder, "killed", "--trainer.max_steps=10", "--ckpt_path=last") == 0
    ours, theirs = (load_file(path / "prior/model.safetensors") for path in (folder / "runs/killed", run))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert fit(folder, "killed", "--trainer.max_steps=12", "--ckpt_path=last", "--model.prior.width=48") == 2
    assert "the checkpoint's prior has other" in capfd.readouterr().err


def test_what_is_asked_for_wins_over_what_a_checkpoint_holds(run: Path, folder: Path) -> None:
    """And averages of the weights, which the config asks for, may go."""
    more = ["--model.learning_rate=5e-4", "--model.weight_decay=0.2", "--model.betas=[0.5,0.6]", "--ema_decay=null"]
    accumulated = ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=12"]
    assert fit(folder, "more", f"--ckpt_path={run}/checkpoints/last.ckpt", *more, *accumulated) == 0
    last = torch.load(folder / "runs/more/checkpoints/last.ckpt", weights_only=True)
    groups = last["optimizer_states"][0]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.2, 0.0] and {group["betas"] for group in groups} == {(0.5, 0.6)}
    assert [group["lr"] for group in groups] == pytest.approx([5e-4 * 0.01 * 13 / 201] * 2), "cosine over the twelve steps of now"
    assert last["global_step"] == 12 and "current_model_state" not in last


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--optimizer=Adam", "optimizer: "),
        ("--trainer.overfit_batches=1", "trainer.overfit_batches: 1: set trainer.limit_train_batches"),
        ("--trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches: 0: give 1 or more"),
        ("--checkpoint.train_time_interval=0:1:0", "checkpoint.train_time_interval: val/bits_per_pixel is not measured at that time"),
        ("--checkpoint.dirpath=elsewhere", "checkpoint.dirpath: "),
        ("--model.label_dropout=1", "model.label_dropout 1"),
        ("--ckpt_path=nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
    ],
)
def test_what_is_not_served_is_refused_by_name(option: str, words: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit(folder, "refused", "--trainer.max_steps=2", option) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error, error
    assert not (folder / "runs/refused").exists()


def test_it_says_what_it_will_be(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Ten validations where no interval is asked for, and steps of accumulated batches."""
    options = ["--trainer.max_steps=10", "--trainer.val_check_interval=null", "--trainer.accumulate_grad_batches=2"]
    assert fit(folder, "said", *options) == 0
    words = [record.getMessage() for record in caplog.records]
    assert f"{folder}/runs/said: 10 steps of 16 pictures, training on 48 of them, validating on 4" in words
    events = EventAccumulator(str(folder / "runs/said")).Reload()
    assert [event.step for event in events.Scalars("val/bits_per_pixel")] == list(range(10))


def test_generate(run: Path, folder: Path, tmp_path: Path) -> None:
    arguments = ["generate", "--prior", str(run), "--count", "5", "--cfg", "2", "--top_p", "0.9", "--seed", "3"]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b"), "--batch_size", "2", "--tokenizer", str(folder / "tokenizer")]) == 0
    names = [f"{number:06d}.png" for number in range(5)]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [*names, "generated.json", "sheet.png"]
    for name in names:
        first, second = (np.asarray(Image.open(tmp_path / side / name)).astype(int) for side in "ab")
        assert first.shape == (32, 32, 3) and np.abs(first - second).max() <= 1
    told = json.loads((tmp_path / "a/generated.json").read_text())
    assert told["classes"] == ["cats", "dogs", "cats", "dogs", "cats"] and told["sampling"]["cfg"] == 2
    picture = folder / "pictures/val/cats/0.png"
    some = ["--classes", "dogs", "--from", str(picture), "--keep", "1"]
    assert main([*arguments, "--out", str(tmp_path / "c"), *some]) == 0
    assert main(["encode", "--tokenizer", str(folder / "tokenizer"), str(picture), "--out", str(tmp_path / "t")]) == 0
    assert main(["decode", "--tokenizer", str(folder / "tokenizer"), str(tmp_path / "t"), "--out", str(tmp_path / "d")]) == 0
    kept, decoded = (np.asarray(Image.open(path)).astype(int) for path in (tmp_path / "c/000000.png", tmp_path / "d/0.png"))
    assert np.abs(kept - decoded).max() <= 1, "all rows kept: the picture through its tokens"


def test_bad_input_is_one_line(run: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    small_tokenizer("unet").save_pretrained(tmp_path / "unet")
    generate = ["generate", "--prior", str(run / "prior"), "--out", str(tmp_path / "out")]
    for arguments, words in (
        ([*generate, "--classes", "cows"], "--classes cows: this prior has classes 0 to 1, such as cats"),
        ([*generate, "--classes", "2"], "--classes 2"),
        ([*generate, "--temperature", "0"], "--temperature 0.0: give"),
        ([*generate, "--top_k", "0"], "--top_k"),
        ([*generate, "--tokenizer", str(tmp_path / "unet")], "give that as --tokenizer"),
        ([*generate, "--from", str(run / "config.yaml")], "config.yaml: not a picture"),
        ([*generate, "--from", str(folder / "pictures/val/cats/0.png"), "--keep", "2"], "--keep 2: give a share"),
        (["generate", "--prior", str(folder / "tokenizer"), "--out", str(tmp_path / "out")], "not a prior's config"),
        (["generate", "--prior", str(tmp_path), "--out", str(tmp_path / "out")], "no config.json there; a prior's folder is written"),
    ):
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and words in error and error.startswith("error: "), error
    assert not (tmp_path / "out").exists()
    assert fit(folder, "bad", f"--data.init_args.tokenizer={tmp_path}/unet") == 2
    assert "give that one, or tokenize the pictures again" in capfd.readouterr().err
    assert fit(folder, "bad", f"--data.init_args.root={tmp_path}") == 2
    assert "no token set" in capfd.readouterr().err
    assert not (folder / "runs/bad").exists()


@pytest.mark.parametrize(
    "option",
    [
        *(f"--model.{name}=-1" for name in ("learning_rate", "weight_decay", "warmup_steps")),
        "--model.betas=[2,3]",
        "--ckpt_path=",
        "--name=..",
    ],
)
def test_options_without_sense(option: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fit(folder, "refused", f"--{option}", f"--runs={tmp_path}/runs") == 2
    assert option.partition("=")[0].rpartition(".")[2] in capfd.readouterr().err and not list(tmp_path.rglob("*.yaml"))
