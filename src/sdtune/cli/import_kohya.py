"""``sdtune import-kohya CONFIG.toml [DATASET.toml]``: the sdtune command of a configuration of kohya's sd-scripts.

The formats are those of the options ``--config_file`` and ``--dataset_config`` of kohya's training scripts.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdtune.cli.kohya_options import Option, translate
from sdtune.errors import UserError
from sdtune.quoting import shell_override

_HELP = """usage: sdtune import-kohya CONFIG.toml [DATASET.toml]

Prints the sdtune command of a configuration of kohya's sd-scripts, and what has no counterpart in sdtune. CONFIG is
the file of --config_file, DATASET that of --dataset_config; a dataset file alone is accepted too. Nothing is trained.
"""

_DATASET_OPTIONS = {
    "batch_size": "train_batch_size",
    "resolution": "resolution",
    "flip_aug": "flip_aug",
    "random_crop": "random_crop",
    "caption_dropout_rate": "caption_dropout_rate",
    "alpha_mask": "alpha_mask",
    "keep_tokens": "keep_tokens",
    "shuffle_caption": "shuffle_caption",
    "caption_extension": "caption_extension",
    "color_aug": "color_aug",
    "face_crop_aug_range": "face_crop_aug_range",
    "enable_bucket": "enable_bucket",
    "bucket_no_upscale": "bucket_no_upscale",
    "min_bucket_reso": "min_bucket_reso",
    "max_bucket_reso": "max_bucket_reso",
    "bucket_reso_steps": "bucket_reso_steps",
    "conditioning_data_dir": "conditioning_data_dir",
}
"""Key of a dataset file -> the option of the training scripts that sets the same."""

_READ = ("image_dir", "class_tokens", "num_repeats", "is_reg", "subsets")
"""Keys of a dataset file that are translated here."""


@dataclass(frozen=True)
class Subset:
    """An image folder of a dataset file, with the settings that apply to it: its own, of its data set and general."""

    settings: Mapping[str, Any]

    @property
    def folder(self) -> str:
        return str(self.settings["image_dir"])

    @property
    def is_class(self) -> bool:
        return bool(self.settings.get("is_reg"))


def main(arguments: Sequence[str]) -> None:
    """Print the command, or the help.

    Raises:
        UserError: a file is missing, is not TOML, or is not a configuration of kohya.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(_HELP, end="")
        return
    if not 1 <= len(arguments) <= 2 or any(argument.startswith("-") for argument in arguments):
        raise UserError(
            f"expected one or two files, got {' '.join(arguments) or 'nothing'}",
            key="import-kohya",
            remedy="use sdtune import-kohya CONFIG.toml [DATASET.toml]",
        )
    contents = [_read(Path(argument).expanduser()) for argument in arguments]
    options = {key: value for content in contents if "datasets" not in content for key, value in _flat(content)}
    datasets = [content for content in contents if "datasets" in content]
    named = options.pop("dataset_config", None)
    if named is not None and not datasets:
        datasets = [_read(_beside(Path(arguments[0]).expanduser(), str(named)))]
    command, notes = converted(options, datasets[0] if datasets else {})
    print(command)
    for note in notes:
        print(f"# {note}")


def _beside(config: Path, named: str) -> Path:
    """The file ``named`` in ``config``: relative to the working folder as for kohya, or else beside ``config``."""
    path = Path(named).expanduser()
    return path if path.is_file() else config.parent / path.name


def _read(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", key="import-kohya", remedy="use an existing TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})", key="import-kohya", remedy="correct this file") from error
    if not content:
        raise UserError(f"{path} has no options", key="import-kohya", remedy="use a file of --config_file")
    datasets = content.get("datasets")
    if datasets is not None and not (isinstance(datasets, list) and all(isinstance(entry, dict) for entry in datasets)):
        raise UserError(f"{path}: datasets is not a list of tables", key="import-kohya", remedy="write [[datasets]]")
    if any("image_dir" not in subset for dataset in datasets or () for subset in dataset.get("subsets", ())):
        raise UserError(f"{path}: a subset has no image_dir", key="import-kohya", remedy="add it")
    return content


def _flat(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Options of a config file; the names of its tables have no meaning."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield key, value


def converted(options: Mapping[str, Any], dataset: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The sdtune command of kohya's ``options`` and ``dataset``, and notes about what it does not contain."""
    from_dataset, images, notes = _of_dataset(dataset)
    words = [word for key, value in {**options, **from_dataset}.items() if (word := _word(key, value)) is not None]
    translation = translate([Option.of(word) for word in words], "train")
    # The recipe chooses the method.
    remarks = [(option, remark) for option, remark in translation.remarks if not remark.startswith("choose the method")]
    notes += [f"{option.name}: {remark}" for option, remark in remarks]
    notes += [f"{option.name}: unknown, not translated" for option in translation.unknown]
    notes += [remark for remark in translation.other_defaults if not remark.startswith("begin with")]
    recipe = _recipe(options)
    if recipe == "sd15_lora":
        notes.append("for a model of SDXL, write experiment=sdxl_lora")
    texts = [f"experiment={recipe}", *([translation.overrides] if translation.overrides else []), *images]
    return f"sdtune train {' '.join(texts)}", notes


def _recipe(options: Mapping[str, Any]) -> str:
    """The recipe of sdtune for the training script of ``options``."""
    if "token_string" in options:
        return "sd15_textual_inversion"
    if "conditioning_data_dir" in options:
        return "sd15_controlnet"
    if any(key.startswith("network_") for key in options):
        return "sdxl_lora" if options.get("sdxl") else "sd15_lora"
    return "sd15_dreambooth" if "reg_data_dir" in options else "sd15_full"


def _word(key: str, value: Any) -> str | None:
    """The option of the command line that sets ``key`` to ``value``; None for an option that is off."""
    if value is False or value in ("", [], None):
        return None
    if value is True:
        return f"--{key}"
    return f"--{key}={' '.join(map(str, value)) if isinstance(value, list) else value}"


def _of_dataset(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Options of the training scripts for a dataset file, overrides of its image folders, and notes."""
    subsets = [
        Subset({**content.get("general", {}), **dataset, **subset})
        for dataset in content.get("datasets", ())
        for subset in dataset.get("subsets", ())
    ]
    subjects = [subset for subset in subsets if not subset.is_class]
    classes = [subset for subset in subsets if subset.is_class]
    if not subjects:
        return {}, [], []
    first, *others = subjects
    options = {_DATASET_OPTIONS[key]: value for key, value in first.settings.items() if key in _DATASET_OPTIONS}
    notes = [f"{key}: not translated" for key in first.settings if key not in _DATASET_OPTIONS and key not in _READ]
    notes += [
        f"{subset.folder}: one image folder per training; put its images below {first.folder}" for subset in others
    ]
    notes += [f"{subset.folder}: one folder of class images per training" for subset in classes[1:]]
    overrides = ["data=folder", shell_override("data.path", first.folder)]
    if "class_tokens" in first.settings:
        overrides.append(shell_override("data.prompt", first.settings["class_tokens"]))
    if first.settings.get("num_repeats", 1) != 1:
        overrides.append(f"data.repeats={first.settings['num_repeats']}")
    if classes:
        overrides.append(shell_override("data.class_path", classes[0].folder))
        overrides += [shell_override("data.class_prompt", tokens) for tokens in _class_tokens(classes[0])]
    return options, overrides, notes


def _class_tokens(subset: Subset) -> list[str]:
    return [str(subset.settings["class_tokens"])] if "class_tokens" in subset.settings else []
