"""Values of ``${hydra:...}`` interpolations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from sdtune.errors import UserError
from sdtune.files import read_saved_yaml, read_yaml
from sdtune.runs.compare import flat


@contextmanager
def as_current(whole: DictConfig, folder: Path | None = None) -> Iterator[None]:
    """Context manager in which ``${hydra:...}`` interpolations resolve to the values of ``whole``.

    Args:
        whole: a composed config, or a config that contains only its node ``hydra``.
        folder: value of ``hydra:runtime.output_dir``, which is missing before Hydra has started the job.
    """
    if folder is not None:
        with read_write(whole), open_dict(whole):
            whole.hydra.runtime.output_dir = str(folder.absolute())
    setup_globals()  # registers the resolver
    previous = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = whole
    try:
        yield
    finally:
        HydraConfig.instance().cfg = previous


def current_overrides() -> list[str]:
    """Overrides of the job whose config is current (:func:`as_current`), with their interpolations unresolved."""
    return unresolved(HydraConfig.get().overrides.task)


def saved_overrides(hydra_folder: Path, key: str | None = None) -> list[str]:
    """Overrides in ``overrides.yaml`` of ``hydra_folder``, with their interpolations unresolved.

    Raises:
        UserError: the file cannot be read, or is not a list; the message names the setting ``key``.
    """
    file = hydra_folder / "overrides.yaml"
    overrides = read_yaml(file, key)
    if not isinstance(overrides, ListConfig):
        raise UserError(f"{file} is not a list of overrides", key=key, remedy="restore it from a copy")
    return unresolved(overrides)


def unresolved(overrides: ListConfig) -> list[str]:
    """Texts of ``overrides``; iterating over a list of OmegaConf would resolve the interpolations in them."""
    texts = OmegaConf.to_container(overrides, resolve=False)
    assert isinstance(texts, list)
    return [str(text) for text in texts]


def resolved_config(
    hydra_folder: Path, key: str | None = None, read: Callable[[Path, str | None], Any] = read_yaml
) -> Any:
    """Resolved content of ``config.yaml`` in ``hydra_folder`` (``.hydra`` of a run); interpolations get its values.

    Raises:
        UserError: a file cannot be read, is not YAML, or has an interpolation without a value; the message names the
            setting ``key``.
    """
    file = hydra_folder / "config.yaml"
    saved = read(file, key)
    uses_hydra = "${hydra:" in file.read_text(encoding="utf-8")
    hydra = saved_hydra(hydra_folder, key) if uses_hydra else OmegaConf.create({"hydra": {}})
    try:
        with as_current(hydra):
            return OmegaConf.to_container(saved, resolve=True)
    except OmegaConfBaseException as error:
        first_line = str(error).partition("\n")[0]
        raise UserError(f"{file}: {first_line}", key=key, remedy="set what its interpolations need") from error


def of_environment(hydra_folder: Path) -> dict[str, Any]:
    """Settings of ``config.yaml`` whose value comes from an environment variable, unresolved, by dotted key.

    Such a value may be a secret, which must not be shown in a page that is shared.
    """
    file = hydra_folder / "config.yaml"
    if "${oc.env:" not in file.read_text(encoding="utf-8"):
        return {}
    saved = flat(OmegaConf.to_container(read_saved_yaml(file), resolve=False))
    return {key: value for key, value in saved.items() if "${oc.env:" in str(value)}


def saved_hydra(hydra_folder: Path, key: str | None = None) -> DictConfig:
    """Config with the node ``hydra`` of ``hydra.yaml`` in ``hydra_folder``; an empty node if the file is missing.

    Raises:
        UserError: the file cannot be read, or is not YAML; the message names the setting ``key``.
    """
    file = hydra_folder / "hydra.yaml"
    saved = read_yaml(file, key) if file.is_file() else None
    return saved if isinstance(saved, DictConfig) and "hydra" in saved else OmegaConf.create({"hydra": {}})
