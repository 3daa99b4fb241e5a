"""Every YAML file composes, and its targets exist and accept its settings."""

from __future__ import annotations

import ast
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from sdtune.backbone.families import FAMILIES, POCKET_GUIDANCE
from sdtune.cli.as_typed import for_hydra
from sdtune.commands import checks
from sdtune.commands import sample as sample_run
from sdtune.config.build import build
from sdtune.config.compose import compose, search_path, without_hydra
from sdtune.config.settings import plain
from sdtune.config.targets import resolve
from sdtune.errors import UserError
from sdtune.paths import config_folder
from sdtune.pocket.world.objects import TRAINED

ROOT = Path(__file__).parents[1]
CONF = config_folder()
COMMANDS = sorted(path.stem for path in CONF.glob("*.yaml"))
SUBGROUPS = ["data/control"]
"""Config groups in the folder of another group."""
RECIPES = ("experiment", "on_data")
"""Config groups whose options are valid only with those of other groups."""

GROUPS = sorted([*(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in RECIPES), *SUBGROUPS])


def options(group: str) -> list[str]:
    """Names of the options of a group, including those in subfolders."""
    folder = CONF / group
    others = [CONF / other for other in SUBGROUPS if other != group]
    files = [path for path in folder.rglob("*.yaml") if not any(other in path.parents for other in others)]
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in files)


CHOICES = [(group, option) for group in GROUPS if group != "hydra" for option in options(group)]
SAMPLES = [name for name in options("experiment") if name.startswith("sample/")]
EXPERIMENTS = [name for name in options("experiment") if name not in SAMPLES]
BASES = {("data", "base")}
"""Options that other options include and that cannot be used alone."""


def composed(command: str, *overrides: str) -> DictConfig:
    return compose(command, search_path(None), list(overrides))


def missing(config: DictConfig) -> set[str]:
    return OmegaConf.missing_keys(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))


def filled(config: DictConfig) -> DictConfig:
    for key in missing(config):
        OmegaConf.update(config, key, "FOLDER")
    return config


class ChecksPassed(Exception):
    """Raised instead of building the first object after the checks."""


def check(config: DictConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the checks of ``sdtune train`` until it builds the first object other than the optimizer of a check."""

    def stop(node: dict[str, Any], *args: Any, **settings: Any) -> Any:
        if node.get("_partial_"):
            return build(node, *args, **settings)
        raise ChecksPassed

    monkeypatch.setattr(checks, "build", stop)
    with pytest.raises(ChecksPassed):
        checks.check_run(plain(config), Path("run"))


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node["_target_"]
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def test_expected_config_groups_exist() -> None:
    expected = {
        "method", "backbone", "objective", "data", "optimizer", "lr_schedule", "trainer", "hardware", "checkpoint",
        "callbacks", "evaluation", "logger", "debug",
    }  # fmt: skip
    assert expected <= set(GROUPS)
    assert (CONF / "experiment").resolve() == (ROOT / "experiments").resolve()
    assert {"train", "sample", "plan", "evaluate"} <= set(COMMANDS)


@pytest.mark.parametrize(("group", "option"), CHOICES, ids=lambda value: value)
def test_every_option_composes_and_fits_its_target(group: str, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("train", f"{group}={option}")
    if (group, option) in BASES:
        return
    assert missing(config) <= {"data.path", "backbone.path", "data.control.path", "data.control.model"}
    if group == "hardware":  # hardware.check_hardware would need a GPU; its own tests are elsewhere
        monkeypatch.setattr("torch.cuda.is_available", lambda: option not in ("auto", "cpu", "mps"))
        monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
        monkeypatch.setattr("torch.backends.mps.is_available", lambda: option == "mps")
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    check(filled(config), monkeypatch)


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONF)))
def test_every_target_is_allowed(path: Path) -> None:
    for target in targets(yaml.safe_load(path.read_text(encoding="utf-8"))):
        # Hydra's targets, which Hydra resolves itself.
        resolve(target, path.name, ["hydra_plugins", "sdtune"] if "hydra" in path.parts else ())


@pytest.mark.parametrize("option", options("hydra"))
def test_every_option_of_the_hydra_group_is_used(option: str) -> None:
    if option == "job_logging/sdtune":
        assert composed("train").hydra.job_logging.handlers.console.stream == "ext://sys.stdout"
        return
    if option == "sweeper/sdtune_optuna":
        assert composed("train", "sweep=optuna").hydra.sweeper.n_trials == 20
        return
    if option == "launcher/shared_backbone":
        assert composed("train", "hydra/launcher=shared_backbone").hydra.launcher.max_concurrent_runs == "auto"
        return
    entries = {c: yaml.safe_load((CONF / f"{c}.yaml").read_text(encoding="utf-8"))["defaults"] for c in COMMANDS}
    users = [c for c in COMMANDS if {"hydra": option} in entries[c] or {"override hydra": option} in entries[c]]
    assert users
    for command in users:
        assert "outputs/" in str(composed(command).hydra.run.dir)


def test_sample_config_composes_and_fits_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **settings: Any) -> None:
        raise ChecksPassed

    config = composed("sample", "prompt=a fox", "adapters=[{path: x, strength: 0.5}]", "strengths=[0, 0.5]")
    assert missing(config) == set()
    monkeypatch.setattr(sample_run, "build", stop)
    with pytest.raises(ChecksPassed):
        sample_run.prepare(config, Path("samples"))


def test_evaluate_requires_a_run() -> None:
    assert missing(composed("evaluate")) == {"run"}
    assert missing(composed("evaluate", "run=RUN")) == set()


def test_default_config_is_lora_on_pocket(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("train")
    choices = config.hydra.runtime.choices
    assert (choices.method, choices.backbone, choices.data) == ("lora", "pocket", "pocket_subject")
    assert missing(config) == set()
    check(config, monkeypatch)


# --- recipes


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_recipe_starts_with_the_command_that_runs_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        line
        for line in (ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    assert lines[0] == "# @package _global_"
    words = shlex.split(lines[1].removeprefix("#"))
    assert words[:3] == ["sdtune", "train", f"experiment={name}"]
    config = composed("train", *for_hydra("train", words[2:]))
    assert missing(config) == set(), "the command does not set a mandatory value"
    assert config.hydra.runtime.choices.experiment == name
    check(config, monkeypatch)


@pytest.mark.parametrize("name", SAMPLES)
def test_sampling_recipe_starts_with_its_command(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (ROOT / "experiments" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[:2] == ["# @package _global_", f"# sdtune sample experiment={name}"]
    config = composed("sample", f"experiment={name}")
    assert missing(config) == set()
    monkeypatch.chdir(tmp_path)  # a folder without trained artifacts
    # Its adapter must be trained first; the error appears before any weights are loaded.
    with pytest.raises(UserError, match=r"path: outputs/results/\w+/seed-0/artifact\S* "):
        sample_run.prepare(config, tmp_path)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("mode", [option for option in options("debug") if option != "none"])
def test_every_debug_option_works_with_every_recipe(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(filled(composed("train", f"experiment={name}", f"debug={mode}")), monkeypatch)


# --- names


def methods() -> list[str]:
    """Modules of sdtune.methods that define a method class."""
    modules = []
    for path in sorted((ROOT / "src/sdtune/methods").glob("*.py")):
        classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
        bases = {base.id for c in classes for base in c.bases if isinstance(base, ast.Name)}
        bases -= {"Protocol", "TypedDict"}
        if path.stem != "base" and bases:
            modules.append(path.stem)
    return modules


def test_methods_and_their_yaml_files_correspond() -> None:
    assert options("method") == methods()


@pytest.mark.parametrize("name", options("method"))
def test_names_of_yaml_module_and_class_agree(name: str) -> None:
    target = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text(encoding="utf-8"))["_target_"]
    method_class = resolve(target, "method")
    assert target in (f"sdtune.methods.{method_class.__name__}", f"{method_class.__module__}.{method_class.__name__}")
    assert method_class.__module__ == f"sdtune.methods.{name}"
    assert method_class.__name__.lower() == name.replace("_", "")
    assert (ROOT / "src/sdtune/methods" / f"{name}.py").is_file()


@pytest.mark.parametrize(
    "group", ["objective", "optimizer", "lr_schedule", "backbone", "data", "data/control", "method", "evaluation"]
)
def test_every_option_has_a_comment_or_a_target(group: str) -> None:
    for option in options(group):
        text = (CONF / group / f"{option}.yaml").read_text(encoding="utf-8")
        assert text.startswith("#") or "_target_" in text


def test_evaluation_none_after_a_recipe_disables_the_evaluation() -> None:
    config = composed("train", "experiment=dreambooth_subject", "evaluation=none")
    assert config.evaluation == {"class_images": 210}
    assert plain(config)["evaluation"] == {}


def test_debug_overrides_a_recipe() -> None:
    config = composed("train", "experiment=lora_subject", "debug=smoke")
    assert config.trainer.max_steps == 2
    assert config.evaluation is None


def test_guidance_in_yaml_equals_guidance_of_the_family() -> None:
    """YAML cannot read it from :mod:`sdtune.backbone.families`, so the values are in both."""
    expected = {family.option.removeprefix("backbone="): family.guidance for family in FAMILIES.values()}
    expected["pocket"] = POCKET_GUIDANCE
    composed = {name: compose("train", search_path(None), [f"backbone={name}"]).backbone.guidance for name in expected}
    assert composed == expected


OWN_IMAGES = sorted({path.parent.name for path in (CONF / "on_data").glob("*/*.yaml")})


@pytest.mark.parametrize("name", OWN_IMAGES)
def test_recipe_of_pocket_carries_over_to_own_images(name: str) -> None:
    """Nothing of the recipe's own subject or style remains."""
    config = composed("train", f"experiment={name}", "data=folder", "data.path=DIR")
    assert config.hydra.runtime.choices.evaluation == "folder"
    assert config.evaluation._target_ == "sdtune.evaluation.ClipMetrics"
    assert config.callbacks.samples.prompts is None
    assert config.data.class_prompt is None
    assert len(config.new_tokens) == 0
    text = OmegaConf.to_yaml(without_hydra(config))
    assert not any(word in text for word in ("sks", "parrot", "noto", "zwx", "bird"))
    plan_config = composed("plan", f"experiment={name}", "data=folder")
    assert plan_config.data._target_ == "sdtune.data.Folder"


@pytest.mark.parametrize("file", sorted((CONF / "on_data").rglob("*.yaml")), ids=str)
def test_settings_of_a_recipe_for_its_data_are_used(file: Path) -> None:
    recipe, data = file.parent.relative_to(CONF / "on_data").as_posix(), file.stem
    assert composed("train", f"experiment={recipe}").hydra.runtime.choices.data == data
    with_them = OmegaConf.to_container(without_hydra(composed("train", f"experiment={recipe}")))
    without = OmegaConf.to_container(without_hydra(composed("train", f"experiment={recipe}", "~on_data")))
    assert with_them != without


def test_documentation_lists_the_words_of_pocket() -> None:
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    listed = page.partition("knows its class word: ")[2].partition(". Its captions")[0]
    assert " ".join(listed.split()).split(", ") == sorted({thing.word for thing in TRAINED})
