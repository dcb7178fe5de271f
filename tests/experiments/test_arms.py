"""Specs become arms: layers, rules, combinations, and the committed results that they are to find again."""

import io
import json
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import reproduce
from arms import ROOT, SpecError, arms, choose, layered, read, with_data, without_data
from estimates import seconds, spoken
from gq_lightning.cli.commands import convert, evaluate
from gq_lightning.cli.main import main
from gq_lightning.cli.signature import parse
from gq_lightning.cli.training import CommandLine
from running import finished

FIG1 = read(ROOT / "experiments/fig1.yaml")
RUNS = "runs/experiments/fig1"
BACKBONES = ("unet", "vit")
SPEC: dict[str, Any] = {
    "configs": ["a.yaml"],
    "axes": {"backbone": ["vit", "unet"], "rate": [16, 32], "seed": [0]},
    "arguments": {"backbone": "--config {}.yaml", "rate": "--rate {}"},
    "overrides": {"steps": 10, "flag": True, "none": None, "name": "As It Is"},
}


def options(line: list[str]) -> dict[str, str]:
    """The last value of each option."""
    return dict(zip(line[4::2], line[5::2], strict=True))


def test_every_combination_is_a_command() -> None:
    found = arms(SPEC, "runs/x")
    assert [arm.name for arm in found] == ["vit-16-0", "vit-32-0", "unet-16-0", "unet-32-0"]
    wanted = "--config a.yaml --config vit.yaml --rate 16 --steps 10 --flag true --none null --name 'As It Is'"
    assert found[0].line == f"python -m gq_lightning fit {wanted} --runs runs/x --name vit-16-0 --overwrite true"
    assert found[0].folder == "runs/x/vit-16-0"


def test_extra_combinations_come_once() -> None:
    found = arms(SPEC | {"extra": [{"backbone": ["vit"], "rate": [16], "seed": [0, 1, 2]}]}, "runs")
    assert [arm.name for arm in found][4:] == ["vit-16-1", "vit-16-2"]
    with pytest.raises(SpecError, match="extra: colour is no axis; there are backbone, rate, seed"):
        arms(SPEC | {"extra": [{"colour": ["red"]}]}, "runs")


def test_later_rules_win_and_see_the_arm() -> None:
    several = [
        {"when": {"backbone": "vit"}, "set": {"steps": 20, "width": 4}},
        {"when": {"backbone": "vit", "rate": [32, 64]}, "set": {"steps": 30, "text": "rate-{rate}"}},
        {"set": {"width": "{rate}"}},
    ]
    settings = {arm.name: arm.settings for arm in arms(SPEC | {"rules": several}, "runs")}
    assert (settings["vit-16-0"]["steps"], settings["vit-32-0"]["steps"], settings["unet-32-0"]["steps"]) == (20, 30, 10)
    assert settings["vit-32-0"]["width"] == 32, "a number stays one"
    assert settings["vit-32-0"]["text"] == "rate-32"
    assert "text" not in settings["vit-16-0"]
    with pytest.raises(SpecError, match="rules: quantiser is no axis"):
        arms(SPEC | {"rules": [{"when": {"quantiser": "gq"}, "set": {}}]}, "runs")


def test_a_layer_merges_appends_and_replaces() -> None:
    merged = layered({"configs": ["a"], "axes": {"x": [1], "y": [2]}, "extra": [1]}, {"configs": ["b"], "axes": {"y": [3]}, "extra": []})
    assert merged == {"configs": ["a", "b"], "axes": {"x": [1], "y": [3]}, "extra": []}


def test_a_profile_like_another() -> None:
    """Its layer lies over the other's: what it does not say is the same, and its rules come last."""
    spec = SPEC | {"profiles": {"short": {"rules": [{"set": {"steps": 20}}]}, "long": {"like": "short", "rules": [{"set": {"steps": 30}}]}}}
    usual, long = ({arm.name: arm for arm in arms(choose(spec, profile), RUNS)} for profile in ("short", "long"))
    assert [arm.settings["steps"] for arm in (*usual.values(), *long.values())] == [20] * 4 + [30] * 4
    assert all(arm.settings | {"steps": 20} == usual[name].settings for name, arm in long.items())


def test_profiles_are_asked_for_where_there_are_some() -> None:
    assert choose(SPEC, None) == SPEC
    for profile, words in ((None, "give one of smoke, cpu, gpu, paper"), ("tiny", "give one of smoke")):
        with pytest.raises(SpecError, match=words):
            choose(FIG1, profile)
    with pytest.raises(SpecError, match="leave it out"):
        choose(SPEC, "cpu")
    with pytest.raises(SpecError, match="--sweep: this profile has none"):
        choose(FIG1, "smoke", sweep=True)


def test_data_is_a_word_and_no_folder_gets_out() -> None:
    assert [with_data(word, "/p") for word in ("DATA", "DATA/val", "DATABASE", "a/DATA")] == ["/p", "/p/val", "DATABASE", "a/DATA"]
    assert without_data({"a": ["/p/val", "/pq", 3], "b": "/p"}, "/p") == {"a": ["DATA/val", "/pq", 3], "b": "DATA"}


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("profile", FIG1["profiles"])
def test_figure_1_is_fair(profile: str, sweep: bool) -> None:
    """Arms of one backbone differ in nothing but what the axes say, the learning rate and the width of the latents."""
    if sweep and "sweep" not in FIG1["profiles"][profile]:
        return
    found = arms(choose(FIG1, profile, sweep), RUNS)
    # the sweep: four rates of two backbones, for both forms of three methods and, of VQ, both starts; a fifth of the UNet
    assert len(found) == (2 * 4 * (3 + 2 * 2 + 4) + 2 * 2 + 4 if sweep else 2 * 8 * 3 * 3 if profile == "cpu" else 30)
    own = {
        "learning_rate",
        "codebook_size",
        "latent_channels",
        "group_size",
        "tdc_variant",
        "tdc_beta",
        "penalty_reduction",
        "codebook_start",
    }
    for backbone in BACKBONES:
        common = {}
        for arm in found:
            if arm.values["backbone"] == backbone:
                for key, value in arm.settings.items():
                    # rFID is measured for one seed of each point
                    if key.rpartition(".")[2] not in own and key != "export.rfid":
                        assert common.setdefault(key, value) == value, f"{arm.name}: {key}"
    assert sorted({arm.values["seed"] for arm in found}) == ([0, 1, 2] if profile == "cpu" and not sweep else [0])


class Parsed(CommandLine):
    """The command line up to where it would build a model."""

    def instantiate_classes(self) -> None:
        pass


@pytest.mark.parametrize("profile", FIG1["profiles"])
def test_every_arm_of_figure_1_is_a_valid_command(profile: str) -> None:
    for arm in arms(choose(FIG1, profile), RUNS):
        if arm.values["seed"]:
            continue  # the command of seed 0 with another number
        config = Parsed(arm.command[4:], run=False).config
        assert config.seed_everything == arm.values["seed"]
        assert config.model.quantizer.init_args.bits_per_position == arm.values["bits_per_position"]
        assert config.trainer.max_steps == arm.settings["trainer.max_steps"]
        assert config.name == arm.name


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("profile", ["cpu", pytest.param("gpu", marks=pytest.mark.slow), "paper"])
def test_the_models_of_figure_1_are_of_one_size(profile: str, backbone: str) -> None:
    parameters, flops = [], []
    for arm in arms(choose(FIG1, profile), RUNS):
        method, rate = arm.values["quantizer"], arm.values["bits_per_position"]
        # the narrowest, the widest and ours
        if (
            arm.values["backbone"] != backbone
            or arm.values["seed"]
            or (method, rate) not in {("fsq", 16), ("bsq", 64), ("gq", 16), ("vq", 64)}
        ):
            continue
        with redirect_stdout(io.StringIO()) as output:
            assert main(["summary", *arm.command[4:], "--format", "json"]) == 0, arm.name
        summary = json.loads(output.getvalue())
        assert summary["bits_per_pixel"] == rate / 64
        parameters.append(summary["parameters"]["encoder"] + summary["parameters"]["decoder"])
        flops.append(summary["encode_flops"] + summary["decode_flops"])
    assert len(parameters) == 4
    # the two 3 x 3 convolutions around 4 to 64 latent channels weigh more in a UNet of few channels
    small = profile == "cpu" or (backbone == "unet" and profile != "paper")
    assert max(parameters) / min(parameters) < (1.08 if small else 1.01)
    assert max(flops) / min(flops) < (1.02 if small else 1.01)


def test_committed_results_are_those_of_the_specs() -> None:
    """Whatever is committed came from the commands that the specs give now; what is missing is still to be measured."""
    fig1 = [(profile, sweep) for profile, layer in FIG1["profiles"].items() for sweep in (False, True) if not sweep or "sweep" in layer]
    for profile, sweep in fig1:
        folder = ROOT / "experiments/results/fig1" / profile / ("sweep" if sweep else "")
        found = arms(choose(FIG1, profile, sweep), f"{RUNS}/{profile}{'/sweep' if sweep else ''}")
        assert {arm.name for arm in found if finished(arm, folder)} == {path.stem for path in folder.glob("*.json")}, folder
    methods = ROOT / "experiments/results/methods"
    found = arms(choose(read(ROOT / "experiments/methods.yaml"), None), "runs/experiments/methods")
    assert {arm.name for arm in found if finished(arm, methods)} == {path.stem for path in methods.glob("*.json")}


def test_the_first_seed_of_everything_comes_first() -> None:
    spec = SPEC | {"axes": SPEC["axes"] | {"seed": [0, 1]}, "extra": [{"backbone": ["vit"], "seed": [2]}], "order": ["seed"]}
    found = arms(spec, "runs")
    assert [arm.values["seed"] for arm in found] == [0] * 4 + [1] * 4 + [2] * 2
    assert [arm.name for arm in found][:5] == ["vit-16-0", "vit-32-0", "unet-16-0", "unet-32-0", "vit-16-1"], "names stay"
    assert {arm.name: arm.line for arm in found} == {arm.name: arm.line for arm in arms(spec | {"order": []}, "runs")}
    for profile in FIG1["profiles"]:
        seeds = [arm.values["seed"] for arm in arms(choose(FIG1, profile), RUNS)]
        assert seeds == sorted(seeds)


def test_estimates_know_backbone_and_quantizer() -> None:
    cost = {"by": ["backbone", "rate"], "seconds_per_step": {"vit": 0.5, "unet": 1.0}, "seconds_besides": {"vit": 10, "unet": 20}}
    vit16, vit32, unet16, _ = arms(SPEC | {"overrides": {"trainer.max_steps": 100}}, "runs")
    measured = [{"arm": {"backbone": "vit", "rate": 16}, "seconds": 30.0}, {"arm": {"backbone": "vit", "rate": 64}, "seconds": 50.0}]
    assert [seconds(arm, cost, measured, lambda arm: 0.0) for arm in (vit16, vit32, unet16)] == [30, 40, 120]


def test_estimates_prefer_what_was_measured() -> None:
    spec = SPEC | {"overrides": {"trainer.max_steps": 100}}
    vit, unet = arms(spec, "runs")[0], arms(spec, "runs")[2]
    cost = {"by": "backbone", "seconds_per_step": {"vit": 0.5, "unet": 1.0}, "seconds_besides": {"vit": 10, "unet": 20}}
    measured = [{"arm": {"backbone": "vit"}, "seconds": s, "resumed": s > 100} for s in (30, 40, 900)]
    assert seconds(vit, cost, [], lambda arm: 0.0) == 60
    assert seconds(vit, cost, measured, lambda arm: 0.0) == 35
    assert seconds(unet, cost, measured, lambda arm: 0.0) == 120
    flops = {"by": "backbone", "sustained_flops": 1e12, "images_per_step": 16, "devices": 8}
    assert seconds(vit, flops, [], lambda arm: 1e10) == pytest.approx(3 * 1e10 * 100 * 16 / 8e12)
    assert seconds(vit, {}, [], lambda arm: 0.0) is None
    assert [spoken(value) for value in (None, 42.3, 270.0, 7200.0, 1e6)] == ["?", "42 s", "4.5 min", "2.0 h", "12 d"]


def test_commands_that_follow_and_commands_of_their_own() -> None:
    first = arms(SPEC | {"then": ["python look.py {folder} --data DATA/val"]}, "runs/x/train")[0]
    assert first.command[:4] == ["python", "-m", "gq_lightning", "fit"]
    assert first.line.endswith("--overwrite true && python look.py runs/x/train/vit-16-0 --data DATA/val")
    assert first.with_data("/my pictures").endswith("--data '/my pictures/val'")
    own = arms(SPEC | {"command": "python do.py {profiles}/train/{backbone} --rate {rate}", "then": ["python more.py"]}, "runs/x/convert")[
        0
    ]
    assert own.line == "python do.py runs/x/train/vit --rate 16 && python more.py"
    assert own.folder == "runs/x/convert/vit-16-0"


def test_every_ablation_is_a_valid_command() -> None:
    spec = read(ROOT / "experiments/ablations.yaml")
    trained = {arm.name: arm for arm in arms(choose(spec, "train"), "runs/experiments/ablations/train")}
    for arm in trained.values():
        config = Parsed(arm.command[4:], run=False).config
        for axis in ("bits_per_position", "codebook_size", "alpha", "beta", "variant", "penalty_weight"):
            argument = f"tdc_{axis}" if axis in ("alpha", "beta", "variant") else axis
            if arm.values[axis] is not None:
                assert config.model.quantizer.init_args[argument] == arm.values[axis], arm.name
        if arm.values["quantizer"] == "gaussian":
            assert config.model.quantizer.init_args.tdc_variant == "fixed", "no argument of a plain VAE may set its multipliers free"
    for arm in arms(choose(spec, "convert"), "runs/experiments/ablations/convert"):
        assert arm.values["of"] in trained
        for command in (arm.command, *arm.then):
            parse({"convert": convert, "evaluate": evaluate}[command[3]].run, command[3], command[4:])


def test_dry_run_prints_what_can_be_pasted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    call = [str(ROOT / "experiments/fig1.yaml"), "--profile", "cpu", "--only", "vit-gq-16", "--dry-run", "--results", str(tmp_path)]
    assert reproduce.main([*call, "--data", "/pictures of mine", "--jobs", "2"]) == 0
    *lines, total = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 3
    for seed, line in enumerate(lines):
        words = shlex.split(line, comments=True)
        assert words[:4] == ["python", "-m", "gq_lightning", "fit"]
        assert options(words)["--data.init_args.root"] == "/pictures of mine"
        assert options(words)["--seed_everything"] == str(seed)
        assert f"# vit-gq-16-{seed}: " in line
    assert total.startswith("# 3 of 3 arms to run: about ")


def test_arms_of_one_thread_take_all_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(reproduce, "dry_run", lambda progress, data: seen.append(progress.jobs))
    monkeypatch.setattr(reproduce, "cores", lambda: 7)
    for profile, more in (("smoke", []), ("cpu", []), ("smoke", ["--jobs", "2"]), ("gpu", []), ("paper", [])):
        call = [str(ROOT / "experiments/fig1.yaml"), "--profile", profile, "--dry-run", "--results", str(tmp_path), *more]
        assert reproduce.main(call) == 0
    assert seen == [7, 7, 2, 1, 1]
    for profile in ("smoke", "cpu"):
        assert all(arm.settings["threads"] == 1 for arm in arms(choose(read(ROOT / "experiments/fig1.yaml"), profile), "runs"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["nowhere.yaml"], "nowhere.yaml: no such file"),
        (["fig1", "--profile", "cpu", "--only", "gp"], "--only gp: no arm"),
        (["fig1", "--profile", "gpu"], "--data: this needs a folder of pictures, its DATA: DATA=FOLDER with ImageNet-1k"),
        (["fig1", "--profile", "cpu", "--data", "/nowhere"], "--data /nowhere: no such folder"),
        (["fig1", "--profile", "smoke", "--jobs", "0"], "--jobs 0"),
    ],
)
def test_wrong_options_are_one_line(
    call: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reproduce, "summarized", lambda: lambda arm: 1e9)  # which counts in a process of its own
    spec = str(ROOT / "experiments/fig1.yaml") if call[0] == "fig1" else call[0]
    assert reproduce.main([spec, *call[1:]]) == 2
    assert words in (error := capsys.readouterr().err)
    assert error.strip().split("\n")[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"axes": None}, "axes: the spec has none"),
        ({"configs": None}, "configs: the spec has none"),
        ({"table": {"rows": "seed"}}, "table: add columns, as in experiments/methods.yaml"),
        ({"table": {"rows": "colour", "columns": ["psnr"]}}, "table.rows: colour is no axis; there are backbone, rate, seed"),
        ({"plot": {"name": "x", "x": "rate", "y": ["psnr"], "series": "rate"}}, "plot: add style, as in experiments/fig1.yaml"),
        ({"plot": FIG1["plot"]}, "plot.series: quantizer is no axis"),
        ({"plot": {key: value for key, value in FIG1["plot"].items() if key != "lead"}}, "plot: add lead"),
    ],
)
def test_what_could_not_be_shown_is_refused_before_it_runs(
    wrong: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = {key: value for key, value in (SPEC | wrong).items() if value is not None}
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    assert reproduce.main([str(tmp_path / "spec.yaml"), "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.mark.parametrize(("text", "words"), [("axes: [", "while parsing"), ("", "no entries"), ("- axes", "no entries")])
def test_what_is_no_spec(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.yaml").write_text(text)
    assert reproduce.main([str(tmp_path / "spec.yaml"), "--dry-run"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}/spec.yaml: {words}")
