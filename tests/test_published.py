"""Against the published networks as `published_networks` has them, under the names that a checkpoint of theirs has."""

import argparse
import os
import sys
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.data import AttributeDict
from published_networks import IMAGE, LATENTS, UNET, VIT, reference
from torch import Tensor
from torch.distributions import Normal
from torch.quasirandom import SobolEngine

from gq_lightning import ImageTokenizer, UserError
from gq_lightning.cli.main import main
from gq_lightning.importers.authors import import_checkpoint, their_name

CODEBOOK, BITS = 256, 16  # two tokens of 4 channels per position
SIZES = {"unet": ("gq_lightning.backbones.UNet", UNET), "vit": ("gq_lightning.backbones.VisionTransformer", VIT)}

State = dict[str, Tensor]


def write(folder: Path, architecture: str, change: Callable[[State], object] | None = None, **more: object) -> tuple[Path, Path]:
    """A checkpoint and the config of its sizes."""
    state = dict(reference(architecture).state_dict()) | {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.bias": torch.zeros(3)}
    if change is not None:
        change(state)
    checkpoint, config = folder / "last.ckpt", folder / "sizes.yaml"
    torch.save({"epoch": 3, "global_step": 7, "state_dict": state, **more}, checkpoint)
    class_path, arguments = SIZES[architecture]
    config.write_text(yaml.safe_dump({"model": {"backbone": {"class_path": class_path, "init_args": arguments}}}))
    return checkpoint, config


def pictures() -> Tensor:
    return torch.rand(2, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("architecture", ["unet", "vit"])
def test_computes_what_the_published_networks_do(architecture: str, tmp_path: Path) -> None:
    checkpoint, config = write(tmp_path, architecture)
    arguments = ["--backbone", architecture, "--bits-per-position", str(BITS), "--codebook-size", str(CODEBOOK), "--config", str(config)]
    assert main(["import-checkpoint", str(checkpoint), *arguments, "--out", str(tmp_path / "tokenizer")]) == 0
    tokenizer = ImageTokenizer.from_pretrained(tmp_path / "tokenizer")
    network, images = reference(architecture), pictures()
    with torch.no_grad():
        features = network.encoder(images)
        torch.testing.assert_close(tokenizer.backbone.encode(images), features, atol=1e-5, rtol=0)
        latents = torch.randn(2, LATENTS, *features.shape[2:], generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(tokenizer.backbone.decode(latents), network.decoder(latents), atol=1e-5, rtol=0)

        mean, log_variance = features.double().movedim(1, -1).chunk(2, dim=-1)
        assert (log_variance > 0.1).any(), "the published score does not bound variances: some must be above the prior's"
        posterior, prior = Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(()).double(), 1.0)
        codebook = prior.icdf(SobolEngine(4, scramble=True, seed=42).draw(CODEBOOK, dtype=torch.float32).double()).float()
        tokens = tokenizer.encode(images)
        for group in range(2):
            channels = slice(group, None, 2)
            own = Normal(posterior.mean[..., None, channels], posterior.stddev[..., None, channels])
            score = (own.log_prob(codebook.double()) - prior.log_prob(codebook.double())).sum(dim=-1)
            assert torch.equal(tokens[..., group], score.argmax(dim=-1))
        chosen = torch.empty(*tokens.shape[:3], LATENTS)
        chosen[..., 0::2], chosen[..., 1::2] = codebook[tokens[..., 0]], codebook[tokens[..., 1]]
        torch.testing.assert_close(tokenizer.decode(tokens), network.decoder(chosen.movedim(-1, 1)).clamp(-1, 1), atol=1e-5, rtol=0)

    imported = import_checkpoint(checkpoint, architecture, BITS, CODEBOOK, config)  # type: ignore[arg-type]
    assert imported.fingerprint == tokenizer.fingerprint
    assert torch.equal(imported.encode(images), tokens)
    assert torch.equal(imported.decode(tokens), tokenizer.decode(tokens))


@pytest.mark.parametrize("architecture", ["unet", "vit"])
def test_what_aligned_a_training_with_a_foundation_model_is_left_out(
    architecture: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names as a training with `use_vf` has them: the model itself, and a layer between its features and the latents."""
    extra = {
        "foundation_model.model.cls_token": torch.zeros(1, 1, 24),
        "foundation_model.model.patch_embed.proj.weight": torch.zeros(24, 3, 14, 14),
        "foundation_model.model.blocks.0.attn.qkv.bias": torch.full((72,), torch.nan),
        "linear_proj.weight": torch.zeros(24, LATENTS, 1, 1),
    }
    expected = import_checkpoint(write(tmp_path, architecture)[0], architecture, BITS, CODEBOOK, tmp_path / "sizes.yaml")  # type: ignore[arg-type]
    assert not caplog.messages
    checkpoint, config = write(tmp_path, architecture, lambda state: state.update(extra))
    imported = import_checkpoint(checkpoint, architecture, BITS, CODEBOOK, config)  # type: ignore[arg-type]
    assert imported.fingerprint == expected.fingerprint
    (message,) = caplog.messages
    assert str(checkpoint) in message
    assert "foundation_model.* (3) and linear_proj.* (1)" in message


def test_names_at_the_papers_sizes() -> None:
    pairs = {
        "encoder.levels.3.blocks.1.attention.query.weight": "encoder.down.3.attn.1.q.weight",
        "decoder.levels.0.blocks.2.attention.norm.bias": "decoder.up.3.attn.2.norm.bias",
        "decoder.levels.3.blocks.0.shortcut.weight": "decoder.up.0.block.0.nin_shortcut.weight",
        "decoder.levels.1.resample.conv.bias": "decoder.up.2.upsample.conv.bias",
        "encoder.middle.blocks.1.norm1.weight": "encoder.mid.block_2.norm1.weight",
    }
    assert {ours: their_name(ours, "unet", levels=4) for ours in pairs} == pairs


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    checkpoint, config = write(tmp_path, "vit", lambda state: state.update({name: value.bfloat16() for name, value in state.items()}))
    tokenizer = import_checkpoint(checkpoint, "vit", BITS, CODEBOOK, config)
    weight = tokenizer.backbone.last_layer
    assert torch.equal(weight, reference("vit").decoder.conv_out.weight.bfloat16().float())


def test_settings_beside_the_tensors_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a class of a library that need not be installed where the checkpoint is read
    stand_in = type("DictConfig", (), {"__module__": "omegaconf"})
    config_object = stand_in()
    config_object.content = {"learning_rate": 1e-4, "nested": [1, 2]}
    module = types.ModuleType("omegaconf")
    module.DictConfig = stand_in  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", module)
        settings: dict[str, Any] = {
            "hyper_parameters": {"config": config_object, "path": Path("a"), "options": argparse.Namespace(a=[1])},
            "more": [defaultdict(list, {"a": [1]}), AttributeDict(a=1), np.float64(0.5), np.ones(2)],
        }
        checkpoint, config = write(tmp_path, "vit", **settings)
    before = set(torch.serialization.get_safe_globals())
    assert sys.modules.get("omegaconf") is not module
    assert import_checkpoint(checkpoint, "vit", BITS, CODEBOOK, config).fixed_image_size == IMAGE
    assert set(torch.serialization.get_safe_globals()) == before


class Hostile:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "text", "name"),
    [(os.system, "touch {}", f"{os.name}.system"), (exec, "open({!r}, 'w').close()", "exec"), (os.mkdir, "{}", "mkdir")],
)
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict"])
def test_hostile_pickles_do_nothing(function: Callable[..., object], text: str, name: str, place: str, tmp_path: Path) -> None:
    created = tmp_path / "created"
    attack = Hostile(function, text.format(str(created)))
    checkpoint, config = write(tmp_path, "vit", **{place: attack})  # type: ignore[arg-type]
    message = refused(checkpoint, "vit", config)
    assert name in message
    assert not created.exists()
    torch.load(checkpoint, weights_only=False)
    assert created.exists(), "the attack works where it is let in"


def test_a_harmless_name_runs_nothing_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the name of a class that is passed over, importable here, is not called."""
    created = tmp_path / "created"

    def touch(path: str) -> str:
        Path(path).touch()
        return path

    module = types.ModuleType("omegaconf")
    module.touch = touch  # type: ignore[attr-defined]
    touch.__module__, touch.__qualname__ = "omegaconf", "touch"
    monkeypatch.setitem(sys.modules, "omegaconf", module)
    checkpoint, config = write(tmp_path, "vit", hyper_parameters=Hostile(touch, str(created)))
    import_checkpoint(checkpoint, "vit", BITS, CODEBOOK, config)
    assert not created.exists()


def refused(checkpoint: Path, architecture: str, config: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        import_checkpoint(checkpoint, architecture, BITS, CODEBOOK, config)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def nan(state: State) -> None:
    state["encoder.conv1.weight"][3, 5] = torch.nan


def grow(state: State) -> None:
    state["decoder.up.2.block.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("vit", lambda state: state.pop("decoder.ffn.0.bias"), ["decoder.ffn.0.bias", "our decoder.head.bias", "missing"]),
        ("unet", lambda state: state.pop("encoder.mid.block_1.norm1.bias"), ["encoder.mid.block_1.norm1.bias", "our encoder.middle"]),
        ("unet", grow, ["decoder.up.2.block.0.conv1.weight", "our decoder.levels.0.blocks.0.conv1", "(64, 64, 1, 1)", "(64, 64, 3, 3)"]),
        ("vit", lambda state: state.update({"encoder.extra": torch.zeros(2)}), ["encoder.extra", "(2,)", "left over"]),
        ("vit", lambda state: state.update({"regularization.codebook": torch.zeros(2)}), ["regularization.codebook", "Gaussian"]),
        ("vit", lambda state: state.update({"model_ema.decay": torch.zeros(())}), ["model_ema.decay"]),
        ("vit", lambda state: state.update({"linear_projection.bias": torch.zeros(2)}), ["linear_projection.bias", "Gaussian"]),
        ("unet", lambda state: state.update({"foundation_model_2.x": torch.zeros(2)}), ["foundation_model_2.x", "Gaussian"]),
        ("vit", nan, ["encoder.conv1.weight", "our encoder.linear_in.weight", "not finite"]),
        ("vit", lambda state: state.update({"encoder.ln_pre.bias": torch.zeros(48, dtype=torch.int64)}), ["encoder.ln_pre.bias", "int64"]),
        ("vit", lambda state: state.update({"encoder.ln_pre.bias": "text"}), ["encoder.ln_pre.bias", "str"]),
        ("vit", lambda state: state.update({"decoder.positional_embedding": torch.zeros(25, 48)}), ["decoder.positional_embedding", "25"]),
        ("vit", lambda state: state.update({"encoder.positional_embedding": torch.zeros(17, 48)}), ["encoder.positional_embedding", "17"]),
        ("vit", lambda state: state.update({"encoder.conv1.weight": torch.zeros(48, 2)}), ["patch_size: 8"]),
        ("vit", lambda state: state.update({"decoder.post_quant_embed.weight": torch.zeros(48)}), ["decoder.post_quant_embed.weight"]),
        ("unet", lambda state: state.clear(), ["state_dict"]),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(architecture: str, change: Callable[[State], object], words: list[str], tmp_path: Path) -> None:
    checkpoint, config = write(tmp_path, architecture, change)
    message = refused(checkpoint, architecture, config)
    for word in [*words, str(tmp_path)]:
        assert word in message


def test_wrong_backbone_and_wrong_sizes(tmp_path: Path) -> None:
    for architecture, other in (("unet", "vit"), ("vit", "unet")):
        checkpoint, config = write(tmp_path, architecture)
        assert f"--backbone {architecture}" in refused(checkpoint, other, None)
        assert "--config" in refused(checkpoint, architecture, None), "the paper's sizes are another network's"
        assert str(config) in refused(checkpoint, other, config) or str(checkpoint) in refused(checkpoint, other, config)


def test_files_that_are_no_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent, text, listing, own, legacy = (tmp_path / f"{name}.ckpt" for name in ("absent", "text", "listing", "own", "legacy"))
    text.write_bytes(b"something else")
    torch.save([1, 2], listing)
    torch.save({"tokenizer": {}, "state_dict": {"backbone.x": torch.zeros(1)}}, own)
    torch.save({"state_dict": {}}, legacy, _use_new_zipfile_serialization=False)
    whole = write(tmp_path, "vit")[0]
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole.read_bytes()[:-1000])
    words = {absent: "no such", text: "not a zip file", listing: "no state_dict", own: "convert", legacy: "not a zip file", cut: "damaged"}
    for path, word in words.items():
        call = ["import-checkpoint", str(path), "--backbone", "vit", "--bits-per-position", "16", "--out", str(tmp_path / "out")]
        assert main(call) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert str(path) in error[0]
        assert word in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "content", "word"),
    [
        ("vit", None, "cannot be read"),
        ("vit", "model: [", "class_path"),
        ("vit", "trainer: {}", "class_path"),
        ("vit", "model: {backbone: {class_path: gq_lightning.backbones.UNet}}", "--backbone"),
        ("vit", "model: {backbone: {class_path: other.VisionTransformer}}", "class_path: other.VisionTransformer"),
        ("vit", "model: {backbone: {class_path: VisionTransformer, init_args: {wide: 3, 1: 2}}}", "init_args.1"),
        ("vit", "model: {backbone: {class_path: VisionTransformer, init_args: {width: 48}}}", "heads"),
        ("vit", "model: {backbone: {class_path: VisionTransformer, init_args: {width: 48, heads: 5}}}", "multiple of heads"),
        ("vit", "model: {backbone: {class_path: VisionTransformer, init_args: {width: many, heads: 3}}}", "width"),
        ("vit", "model: {backbone: {class_path: VisionTransformer, init_args: {width: -48, heads: 3}}}", "-48"),
        ("vit", "model: {backbone: {class_path: VisionTransformer, init_args: {image_size: 64}}}", "image_size"),
        ("unet", "model: {backbone: {class_path: UNet, init_args: {channels: 32, norm_groups: 8}}}", "norm_groups"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit(architecture: str, content: str | None, word: str, tmp_path: Path) -> None:
    checkpoint, config = write(tmp_path, architecture)
    config.unlink() if content is None else config.write_text(content)
    message = refused(checkpoint, architecture, config)
    assert word in message
    assert str(config) in message


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "\n  import-checkpoint " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["import-checkpoint", "--help"])
    assert "--bits_per_position" in capsys.readouterr().out
