"""Fine-tuning: a training starts from a tokenizer's weights, all of it or its decoder alone, whose tokens stay what they were."""

from pathlib import Path

import pytest
import torch
from small import CONFIGS, small_tokenizer, small_training

from gq_lightning import ImageTokenizer, UserError, read_tokens
from gq_lightning.cli.main import main
from gq_lightning.cli.training import CommandLine, with_start
from gq_lightning.quantizers import FiniteScalarQuantizer, GaussianQuantizer, Quantizer, VectorQuantizer
from gq_lightning.tokenizer.folder import write_folder
from gq_lightning.tokens.module import _recorded
from gq_lightning.training.module import TokenizerTraining
from gq_lightning.training.starting import start_from
from killed import write_pictures

pytestmark = pytest.mark.filterwarnings("ignore")
HEADS = {f"backbone.{name}.{kind}" for name in ("encoder.conv_out", "decoder.conv_in") for kind in ("weight", "bias")}


def other(backbone: str, quantizer: Quantizer | None = None) -> ImageTokenizer:
    """Of other weights than `small_tokenizer` has."""
    tokenizer = small_tokenizer(backbone, quantizer)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def fit(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a fit of two steps."""
    monkeypatch.chdir(tmp_path)
    files = ("base", "backbone/vit_small", "data/folder", "scale/smoke", "machine/cpu")
    return [
        *("fit", *(word for name in files for word in ("--config", str(CONFIGS / f"{name}.yaml")))),
        *(
            f"--data.init_args.{name}"
            for name in (f"root={pictures}/train", f"validation_root={pictures}/val", "batch_size=4", "workers=0")
        ),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--trainer.num_sanity_val_steps=0"),
        *("--trainer.limit_val_batches=0", "--trainer.max_steps=2", "--model.learning_rate=1e-3"),
        *("--export.rfid=false", "--export.columns=2", "--name=a"),
    ]


def test_all_weights_are_taken_over(tokenizer: ImageTokenizer) -> None:
    start = other("vit" if tokenizer.fixed_image_size else "unet")
    start.quantizer.tdc.lambda_mean.fill_(3.0)  # type: ignore[union-attr, operator]
    assert start_from(tokenizer, start, "start") == []
    assert tokenizer.fingerprint == start.fingerprint


@pytest.mark.parametrize(
    "quantizer",
    [
        GaussianQuantizer(32, latent_channels=8, codebook_size=256),
        GaussianQuantizer(16, latent_channels=2, codebook_size=256),
        FiniteScalarQuantizer(16, levels=[16] * 4),
    ],
    ids=["rate", "width", "method"],
)
def test_another_rate_or_method_has_a_head_of_its_own(quantizer: Quantizer) -> None:
    tokenizer, start = small_tokenizer("unet", quantizer), other("unet")
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    new = start_from(tokenizer, start, "start")
    assert new and set(new) <= HEADS
    for name, tensor in tokenizer.backbone.state_dict().items():
        known = f"backbone.{name}"
        expected = before[known] if known in new else start.backbone.state_dict()[name]
        assert torch.equal(tensor, expected), name


def test_another_codebook_keeps_the_encoder_and_its_own_codewords() -> None:
    quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=256, seed=7)
    tokenizer, start = small_tokenizer("unet", quantizer), other("unet")
    fingerprint = quantizer.codebook_fingerprint.clone()
    assert start_from(tokenizer, start, "start") == []
    assert torch.equal(quantizer.codebook_fingerprint, fingerprint)
    assert not torch.equal(fingerprint, start.quantizer.codebook_fingerprint)  # type: ignore[arg-type]


def test_what_cannot_start_is_refused_by_its_field() -> None:
    with pytest.raises(UserError, match=r"model.backbone: a UNet, but init_from start has a VisionTransformer"):
        start_from(small_tokenizer("unet"), small_tokenizer("vit"), "start")
    wide = small_training("unet").tokenizer
    wide.backbone.init_args["blocks"] = 2
    with pytest.raises(UserError, match=r"model.backbone.init_args.blocks: 2, but init_from start has 1"):
        start_from(wide, small_tokenizer("unet"), "start")
    seeded = small_tokenizer("unet", GaussianQuantizer(16, latent_channels=4, codebook_size=256, seed=7))
    with pytest.raises(UserError, match=r"model.quantizer.init_args.seed: 7, but init_from start has 42"):
        start_from(seeded, small_tokenizer("unet"), "start", same_tokens=True)
    # what shapes the training alone may be another
    trained = small_tokenizer("unet", GaussianQuantizer(16, latent_channels=4, codebook_size=256, penalty_weight=0.3))
    assert start_from(trained, small_tokenizer("unet"), "start", same_tokens=True) == []


@pytest.mark.parametrize("quantizer", [None, VectorQuantizer(16, codebook_size=256, group_size=2)], ids=["gaussian", "vq"])
def test_a_step_of_the_decoder_alone_moves_nothing_else(quantizer: Quantizer | None) -> None:
    tokenizer = other("vit", quantizer).eval().requires_grad_(False)
    training = TokenizerTraining(tokenizer.backbone, tokenizer.quantizer, small_training("vit").loss, train="decoder")
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    quantized = training._quantized(images)
    assert torch.equal(quantized.latents, tokenizer.quantizer.detokenize(tokenizer.encode(images)))
    trainable = [parameter for parameter in training.parameters() if parameter.requires_grad]
    tokenizer.backbone.decode(quantized.latents.movedim(-1, 1)).square().sum().backward()
    torch.optim.SGD(trainable, lr=1e-3).step()
    moved = {name for name, tensor in tokenizer.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("backbone.decoder.") for name in moved)


def test_tokens_outlive_a_fine_tuned_decoder(fit: list[str], pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a quantizer whose multipliers would move, across a resumed training, to the bit; each decodes the other's files."""
    start = other("vit")
    start.save_pretrained("start")
    args = [*fit, "--init_from", "start", "--train", "decoder"]
    assert main([*args, "--trainer.max_steps=1"]) == 0
    assert "start: gives all weights" in caplog.messages
    assert main([*args, "--ckpt_path=last"]) == 0
    assert main([*args, "--name=whole"]) == 0
    tuned, whole = (ImageTokenizer.from_pretrained(f"runs/{name}") for name in ("a", "whole"))
    assert tuned.fingerprint == whole.fingerprint != start.fingerprint
    assert tuned.tokens_fingerprint == start.tokens_fingerprint == start.fingerprint == _recorded(Path("runs/a/tokenizer"))
    assert tuned.encoder_fingerprint == start.encoder_fingerprint
    assert ImageTokenizer.from_pretrained("runs/a/checkpoints/last.ckpt").tokens_fingerprint == start.fingerprint
    for made, decodes in (("start", "runs/a"), ("runs/a", "start")):
        assert main(["encode", str(pictures / "val"), "--tokenizer", made, "--out", f"tokens/{made}"]) == 0
        assert main(["decode", f"tokens/{made}", "--tokenizer", decodes, "--out", f"back/{made}"]) == 0
    files = sorted(path.name for path in Path("tokens/start").iterdir())
    assert files
    for name in files:
        ours, theirs = (read_tokens(f"tokens/{made}/{name}") for made in ("start", "runs/a"))
        assert torch.equal(ours.tokens, theirs.tokens) and ours.fingerprint == theirs.fingerprint
    # to be fine-tuned once more, and as a whole
    again, all_of_it = small_tokenizer("vit"), small_tokenizer("vit")
    assert start_from(again, tuned, "tuned", same_tokens=True) == start_from(all_of_it, tuned, "tuned") == []
    assert again.tokens_fingerprint == start.fingerprint and all_of_it.tokens_fingerprint == tuned.fingerprint
    again.quantizer = GaussianQuantizer(16, latent_channels=4, codebook_size=256, seed=7)
    assert again.tokens_fingerprint == again.fingerprint
    # a claim that the weights do not bear out
    with torch.no_grad():
        state = tuned.state_dict()
        state["backbone.encoder.linear_out.bias"] += 1
    write_folder("forged", tuned.description() | {"tokens_of": [start.fingerprint, start.encoder_fingerprint]}, state, {"fingerprint": ""})
    with pytest.raises(UserError, match=r"tokens_of: .* has changed"):
        ImageTokenizer.from_pretrained("forged")


@pytest.mark.parametrize("train", ["all", "decoder"])
def test_an_adversary_joins_weights_that_were_trained_without(train: str, fit: list[str]) -> None:
    """It steps from its start on, and the decoder's tokens stay what they were."""
    start = other("vit")
    start.save_pretrained("start")
    adversary = ["--model.adversary.discriminator.width=8", "--model.adversary.discriminator.layers=1", "--model.adversary.start=1"]
    assert main([*fit, "--init_from=start", f"--train={train}", *adversary]) == 0
    state = torch.load("runs/a/checkpoints/last.ckpt", weights_only=True)
    generator, discriminator = state["optimizer_states"]
    assert generator["state"] and {int(one["step"]) for one in discriminator["state"].values()} == {1}
    trained = ImageTokenizer.from_pretrained("runs/a")
    assert trained.fingerprint != start.fingerprint
    assert (trained.tokens_fingerprint == start.fingerprint) == (train == "decoder")


def built(args: list[str]) -> ImageTokenizer:
    """What a fit of these arguments would train, before it has the weights of its start."""
    return CommandLine([word for word in with_start(args[1:])], run=False).model.tokenizer


def test_another_size_of_pictures_where_the_backbone_allows(fit: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Attention is at the level where it was, not at the one that has its resolution now."""
    start = other("unet")
    start.save_pretrained("unet")
    small_tokenizer("vit").save_pretrained("vit")
    size = "--data.init_args.image_size=64"
    tokenizer = built([*fit, "--init_from=unet", size])
    assert start_from(tokenizer, start, "unet") == [] and tokenizer.fingerprint == start.fingerprint
    assert main([*fit, "--init_from=vit", size]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error == "error: data.init_args.image_size: 64, but the VisionTransformer sees pictures of 32 pixels alone: give 32"


def test_another_rate_by_one_option_has_the_widths_of_that_rate(fit: list[str]) -> None:
    start = other("unet", GaussianQuantizer(16, codebook_size=256, exact_divergence=True))
    start.save_pretrained("start")
    same, tokenizer = (
        built([*fit, "--init_from", "start", *options]) for options in ([], ["--model.quantizer.init_args.bits_per_position=32"])
    )
    assert same.quantizer.identity() == start.quantizer.identity()
    assert (tokenizer.quantizer.bits_per_position, tokenizer.quantizer.latent_channels) == (32, 16)
    assert set(start_from(tokenizer, start, "start")) == HEADS - {"backbone.decoder.conv_in.bias"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train=decoder"], "--train decoder: keeps an encoder, but none is given"),
        (["--init_from=nowhere/at/all"], "--init_from nowhere/at/all: neither a folder, a shipped tokenizer (gq-small-16"),
        (["--init_from=start", "--train=decoder", "--model.quantizer.init_args.seed=7"], "model.quantizer.init_args.seed: 7"),
        (["--init_from=start", "--model.backbone.init_args.width=64"], "model.backbone.init_args.width: 64"),
        (["--init_from=runs/a/tokenizer", "--overwrite=true"], "--init_from runs/a/tokenizer: it lies in the run"),
    ],
    ids=["nothing", "nowhere", "codebook", "width", "itself"],
)
def test_what_cannot_be_is_said_before_anything_begins(
    fit: list[str], options: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for folder in ("start", "runs/a/tokenizer"):
        small_tokenizer("vit").save_pretrained(folder)
    assert main([*fit, *options]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {said}")
    assert sorted(path.name for path in Path("runs/a").iterdir()) == ["tokenizer"]
