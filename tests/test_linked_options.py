"""Options that are computed from others: given by anyone, in any form, they are refused with the options that decide them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small import CONFIGS

from gq_lightning.cli.main import main
from gq_lightning.cli.options import check_linked
from gq_lightning.cli.prior import PriorCommandLine
from gq_lightning.cli.runs import RunCommandLine
from gq_lightning.cli.training import CommandLine
from gq_lightning.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore")
CALLS = {CommandLine: ["fit"], PriorCommandLine: ["prior", "fit"]}


class Stop(Exception):
    pass


def links(kind: type[RunCommandLine]) -> dict[str, Any]:
    """The links of the real parser."""
    found: dict[str, Any] = {}

    class Recording(kind):  # type: ignore[misc, valid-type]
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.update(self.links)
            raise Stop

    with pytest.raises(Stop):
        Recording(["fit"])
    return found


LINKS = [(kind, target) for kind in CALLS for target in links(kind)]


def nested(target: str) -> dict[str, Any]:
    value: Any = 3
    for part in reversed(target.split(".")):
        value = {part: value}
    return value


def test_the_known_links_are_found() -> None:
    assert {target for _, target in LINKS} >= {
        "trainer.default_root_dir",
        "model.train",
        *(f"model.backbone.init_args.{name}" for name in ("encoder_channels", "latent_channels", "image_size")),
        *(f"model.prior.init_args.{name}" for name in ("grid", "codebook_size", "downsampling", "tokenizer", "classes")),
    }


@pytest.mark.parametrize(("kind", "target"), LINKS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_no_form_of_a_linked_option_is_ignored(
    kind: type[RunCommandLine], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, *rest = target.split(".")
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(nested(target)))
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(nested(".".join(rest))))
    forms = [
        [f"--{target}=3"],
        [f"--{target}", "3"],
        [f"--{target.replace('.init_args', '')}=3"],
        ["--config", "whole.yaml"],
        ["--config=whole.yaml"],
        ["-c", "whole.yaml"],
        ["--config", json.dumps(nested(target))],
        [f"--{first}", json.dumps(nested(".".join(rest)))],
        [f"--{first}=part.yaml"],
    ]
    for form in forms:
        assert main([*CALLS[kind], *form]) == 2, form
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1, form
        assert error[0].startswith(f"error: {target}: is computed from "), form
    assert not (tmp_path / "runs").exists()


def test_other_options_pass() -> None:
    table = {"model.backbone.init_args.image_size": ("data.init_args.image_size", "backbone_image_size"), "trainer.dir": "name"}
    values = ["--data.init_args.image_size=3", "--model.backbone.init_args.image_sizes=3", "--model", "{", "--trainer=nowhere.yaml"]
    check_linked([*values, "--name", "model.backbone.init_args.image_size", "--config"], table)
    check_linked(["--config", '{"model": {"backbone": {"init_args": {"image_size": null}}}}'], table)
    with pytest.raises(UserError, match="computed from data.init_args.image_size and backbone_image_size: leave it out"):
        check_linked(['--model={"backbone": {"init_args": {"image_size": [3, 4]}}}'], table)


def test_no_shipped_config_sets_one() -> None:
    both = links(CommandLine) | links(PriorCommandLine)
    for path in CONFIGS.rglob("*.yaml"):
        check_linked(["--config", str(path)], both)


def test_a_runs_own_config_sets_none(tmp_path: Path) -> None:
    """A run can be repeated from its config.yaml."""
    configs = ["base", "backbone/vit_small", "data/photographs", "scale/smoke", "machine/cpu"]
    parts = [part for name in configs for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--export.rfid=false", "--trainer.logger=false"]
    assert main(["fit", *parts, *options, f"--runs={tmp_path}", "--name=a", "--trainer.enable_progress_bar=false"]) == 0
    check_linked(["--config", str(tmp_path / "a/config.yaml")], links(CommandLine))
