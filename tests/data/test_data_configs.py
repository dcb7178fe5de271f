import re
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
def test_every_argument_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that a class inherits, too: by the command line's help, and by the class that has them."""
    with pytest.raises(SystemExit):
        parser().parse_args([f"--data.help=gq_lightning.data.{name}"])
    text = capsys.readouterr().out.partition("\n\n")[2]
    offered = {line.split()[0].removeprefix("--data."): line for line in re.findall(r"^  (--data\..*(?:\n   .*)*)", text, re.MULTILINE)}
    kind = getattr(data_package, name)
    assert {"image_size", "batch_size", "evaluation_batch_size", "workers", "skip_broken", "max_broken"} <= offered.keys()
    taken = {key for each in kind.__mro__ if issubclass(each, ImageDataModule) for key in each.__init__.__annotations__}
    assert offered.keys() == taken - {"return", "settings"}
    for argument, line in offered.items():
        explained = [each for each in kind.__mro__ if f"\n        {argument}: " in (each.__doc__ or "")]
        assert explained, argument
        words = explained[0].__doc__.partition(f"\n        {argument}: ")[2].split()[:2]
        assert " ".join(words) in " ".join(line.split()), argument
