"""Each setting of Hydra works or is refused, as an override and as an interpolation ``${hydra:...}``."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.conf import HydraConf
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from running import arguments, export, rows, sdtune, train
from sdtune.config.compose import compose, search_path
from sdtune.quoting import override
from sdtune.runs.hydra_values import as_current

WORKS, REFUSED, MISSING = "works", "refused", "missing"

SETTINGS = {
    # name: (as an override, as an interpolation)
    "defaults": (REFUSED, MISSING),
    "mode": (REFUSED, MISSING),  # null without -m
    "searchpath": (REFUSED, WORKS),
    "run.dir": (WORKS, WORKS),
    "sweep.dir": (WORKS, WORKS),
    "sweep.subdir": (REFUSED, MISSING),  # the number of the job, which a run without a sweep does not have
    "hydra_logging": (REFUSED, WORKS),
    "job_logging": (REFUSED, WORKS),
    "sweeper": (WORKS, WORKS),
    "launcher": (WORKS, WORKS),
    "callbacks": (REFUSED, WORKS),
    "help.app_name": (REFUSED, WORKS),
    "help.header": (REFUSED, WORKS),
    "help.footer": (REFUSED, WORKS),
    "help.template": (REFUSED, WORKS),
    "hydra_help.hydra_help": (REFUSED, MISSING),
    "hydra_help.template": (REFUSED, WORKS),
    "output_subdir": (REFUSED, WORKS),
    "overrides.hydra": (REFUSED, WORKS),
    "overrides.task": (REFUSED, WORKS),
    "job.name": (REFUSED, WORKS),
    "job.chdir": (REFUSED, WORKS),
    "job.override_dirname": (REFUSED, WORKS),
    "job.id": (REFUSED, MISSING),
    "job.num": (REFUSED, MISSING),
    "job.config_name": (REFUSED, WORKS),
    "job.env_set": (REFUSED, WORKS),
    "job.env_copy": (REFUSED, WORKS),
    "job.config": (REFUSED, WORKS),
    "runtime.version": (REFUSED, WORKS),
    "runtime.version_base": (REFUSED, WORKS),
    "runtime.cwd": (REFUSED, WORKS),
    "runtime.config_sources": (REFUSED, WORKS),
    "runtime.output_dir": (REFUSED, WORKS),
    "runtime.choices": (REFUSED, WORKS),
    "verbose": (WORKS, WORKS),
}
EXAMPLES = {"verbose": "sdtune", "launcher": "{}", "sweeper": "{}"}


def test_every_setting_of_hydra_has_a_row() -> None:
    config = OmegaConf.structured(HydraConf)
    names: set[str] = set()
    for key in config:
        node = None if OmegaConf.is_missing(config, key) else config[key]
        names |= {f"{key}.{name}" for name in node} if OmegaConf.is_dict(node) and len(node) else {str(key)}
    assert names == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_override_of_a_setting_of_hydra(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = EXAMPLES.get(name, str(tmp_path / "x"))
    code = sdtune("train", f"++hydra.{name}={value}" if value == "{}" else f"hydra.{name}={value}", "--cfg", "job")
    error = capsys.readouterr().err
    if SETTINGS[name][0] == WORKS:
        assert (code, error) == (0, "")
    else:
        assert code == 2
        assert error.startswith(
            f"sdtune: hydra.{name}: setting of Hydra that sdtune does not support; use hydra.run.dir"
        )
        assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_interpolation_of_a_setting_of_hydra(name: str, tmp_path: Path) -> None:
    whole = compose("train", search_path(None), [])
    with as_current(whole, tmp_path / "run"):
        config = OmegaConf.create({"value": f"${{hydra:{name}}}"})
        try:
            value = OmegaConf.to_container(config, resolve=True)["value"]  # type: ignore[index, call-overload]
        except OmegaConfBaseException:
            value = None
    assert (value not in (None, "???")) == (SETTINGS[name][1] == WORKS)
    assert name != "runtime.output_dir" or value == str(tmp_path / "run")


def test_run_with_interpolations_is_resumed_exported_and_reported(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    overrides = ["name=${hydra:runtime.choices.method}", "data.trigger='${hydra:job.name} x'", "trainer.max_steps=1"]
    overrides += ["data.templates=['${data.trigger} {}']"]
    overrides += ["data.repeats=${method.rank}"]
    assert train(*arguments(tiny, images, run, *overrides)) == 0
    assert (run / "artifact" / "lora.safetensors").is_file()
    assert train(f"resume={run}", "trainer.max_steps=2") == 0
    assert [row["step"] for row in rows(run)] == ["1", "2"]
    assert export(f"run={run}", "format=kohya", f"hydra.run.dir={tmp_path / 'out'}") == 0
    assert sdtune("report", str(run)) == 0
    assert train("-m", *[a for a in arguments(tiny, images, run, *overrides) if "hydra.run" not in a],
                 "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}") == 0  # fmt: skip
    assert (tmp_path / "sweep/1/artifact/lora.safetensors").is_file()
    assert sdtune("report", str(tmp_path / "sweep")) == 0


def test_folder_may_be_named_after_a_value_of_hydra(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [o for o in arguments(tiny, images, tmp_path, "trainer.max_steps=1") if not o.startswith("hydra.run")]
    assert train(*overrides, f"hydra.run.dir={tmp_path}/${{hydra:runtime.choices.method}}") == 0
    assert (tmp_path / "lora" / "metrics.json").is_file()


def test_interpolation_without_a_value_is_one_line(
    tiny: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(*arguments(tiny, images, run, "name=${hydra:sweep.subdir}")) == 2
    assert "Missing mandatory value: hydra.job.num" in capsys.readouterr().err
    assert not run.exists()


def test_recipe_may_not_set_the_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "conf" / "experiment" / "mine.yaml"
    recipe.parent.mkdir(parents=True)
    recipe.write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n", encoding="utf-8")
    run = tmp_path / "run"
    assert train("-cd", str(tmp_path / "conf"), "experiment=mine", f"hydra.run.dir={run}") == 2
    assert capsys.readouterr().err == (
        "sdtune: hydra.mode: got MULTIRUN; remove it from the recipe; -m starts a sweep\n"
    )
    assert not run.exists()


@pytest.mark.parametrize(("mode", "key"), [((), "hydra.run.dir"), (("-m",), "hydra.sweep.dir")])
def test_folder_that_hydra_would_interpolate_is_refused(
    mode: tuple[str, ...], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*mode, override(key, tmp_path / "${x}")) == 2
    assert capsys.readouterr().err == (
        f"sdtune: {key}: {tmp_path}/${{x}} contains ${{, which Hydra interpolates; choose another folder\n"
    )
    assert not list(tmp_path.iterdir())
