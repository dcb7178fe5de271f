from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from gq_lightning import data as data_package
from gq_lightning.data import ImageDataModule

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))
MODULES = ("ImageNet", "ImageFolder", "CIFAR10", "Imagenette", "Photographs", "Shards")


def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_argument("--data", type=ImageDataModule)
    return parser


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_built(config: Path) -> None:
    assert config.read_text().startswith("#") and f"configs/data/{config.name}" in config.read_text()
    data = parser().instantiate(parser().parse_args([f"--config={config}"])).data
    assert isinstance(data, ImageDataModule)


def test_all_data_modules_have_a_config() -> None:
    built = {parser().parse_args([f"--config={config}"]).data.class_path.rpartition(".")[2] for config in CONFIGS}
    assert built == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_every_argument_is_explained(name: str) -> None:
    arguments = getattr(data_package, name).__doc__.partition("Args:")[2]
    for argument in getattr(data_package, name).__init__.__annotations__:
        assert argument == "return" or f"\n        {argument}: " in arguments, argument
