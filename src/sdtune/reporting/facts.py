"""What the runs of a report have in common, and the best of them: the answer at the top of the page."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sdtune.files import is_snapshot
from sdtune.reporting.collect import Run
from sdtune.reporting.ranking import MetricStatistics, Place, Setting
from sdtune.runs.metrics import unit
from sdtune.runs.sample_command import sample_command

_COPY = 0.95
"""Mean CLIP similarity to the nearest training image from which a warning is shown. A convention: near-duplicates of
photos have similarities above it, different photos of one subject usually below."""

_EMBEDDINGS = "embeddings"
"""Folder of the embeddings of new tokens in an artifact; ``formats.embeddings``, which writes it, needs torch."""

_NOT_SHOWN = ("seed=", "name=", "trial=", "resume=", "hydra.", "trust=", "optimized_metric=")

Fact = tuple[str, str]
"""Name and text of a fact."""


def facts(runs: Sequence[Run], overrides: str = "common settings") -> list[Fact]:
    """Method, model, data, date, and the overrides that all runs have, under the name ``overrides``."""
    out = [
        ("method", _listed(map(method, runs))),
        ("model", _listed(map(_model, runs))),
        ("data", _listed(map(data, runs))),
        ("date", _dates(runs)),
        (overrides, " ".join(common_overrides(runs))),
    ]
    return [(name, text) for name, text in out if text]


def comparability(runs: Sequence[Run]) -> str:
    """Warning if the runs differ in what their metrics are measured with; empty otherwise."""
    differing = [name for name, of_run in (("model", _model), ("data", data)) if len({of_run(run) for run in runs}) > 1]
    if not differing:
        return ""
    return f"The runs differ in {' and '.join(differing)}, so their metrics may not be comparable. Filter the tables."


def _model(run: Run) -> str:
    return str(run.config.get("backbone.path", ""))


def method(run: Run) -> str:
    """Class name of the run's method."""
    return str(run.config.get("method._target_", "")).rpartition(".")[2]


def data(run: Run) -> str:
    """Folder of the images, or the data set of pocket, and the number of images."""
    path, count = run.config.get("data.path"), run.training.counts.get("images")
    name = str(path) if path else " ".join(filter(None, (_data_class(run), run.config.get("data.subject"))))
    return f"{name} ({count} image{'s' if count != 1 else ''})" if name and count is not None else name


def _data_class(run: Run) -> str:
    module, _, name = str(run.config.get("data._target_", "")).rpartition(".")
    return f"pocket's {name.lower()}" if module.startswith("sdtune.pocket") else name


def _listed(values: Iterable[str]) -> str:
    """Distinct values, the most frequent first; with their counts if there are several."""
    counts = Counter(value for value in values if value)
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} ({count} run{'s' if count > 1 else ''})" for value, count in counts.most_common(4)]
    return ", ".join(shown) + (f" and {len(counts) - 4} more" if len(counts) > 4 else "")


def _dates(runs: Sequence[Run]) -> str:
    started = min((run.started for run in runs if run.started is not None), default=None)
    finished = max((run.finished for run in runs if run.finished is not None), default=None)
    if started is None:
        return ""
    first = datetime.fromtimestamp(started)
    if finished is None:
        return f"{first:%Y-%m-%d %H:%M}"
    last = datetime.fromtimestamp(finished)
    return f"{first:%Y-%m-%d %H:%M} to {last:{'%H:%M' if first.date() == last.date() else '%Y-%m-%d %H:%M'}}"


def common_overrides(runs: Sequence[Run]) -> list[str]:
    """Overrides that the command lines of all runs have, in their order."""
    return [
        text
        for text in runs[0].overrides
        if not text.startswith(_NOT_SHOWN) and all(text in run.overrides for run in runs)
    ]


def artifact(run: Run) -> Path | None:
    """The file or folder that the run leaves for other programs; None if it has none."""
    folder = run.folder / "artifact"
    files = [
        file
        for file in (*folder.glob("*.safetensors"), *(folder / _EMBEDDINGS).glob("*.safetensors"))
        if not is_snapshot(file.stem) and not file.stem.startswith("learned_embeds")
    ]
    files.sort(key=lambda file: (file.parent != folder, file.stem == "pytorch_lora_weights", file.name))
    folders = [path for path in sorted(folder.glob("*")) if path.is_dir() and path.name != _EMBEDDINGS]
    folders = [path for path in folders if not is_snapshot(path.name)]
    return next(iter((*files, *folders)), None)


def sampling_command(run: Run) -> str:
    """Shell command that samples with ``run``."""
    prompt = next((image.prompt for image in run.images if image.prompt), None)
    prompt = prompt or next((caption for _, caption in run.training.shown if caption), "PROMPT")
    more = []
    if method(run) == "ControlNet":
        kind = run.config.get("data.control.name") or run.config.get("data.control.task")
        more.append(f"control=[{{image: FILE{f', preprocess: {kind}' if kind in ('canny', 'scribble') else ''}}}]")
    elif method(run) == "LoRA":
        more.append("strengths=0.5,0.75,1")
    return sample_command(run.folder, prompt, *more)


def winner(metric: str, places: Sequence[Place]) -> dict[str, Any]:
    """The best setting: its value, what is within its noise, its file, its command, its cost, and a warning."""
    setting, statistics, _ = places[0]
    run = setting.best_run(metric)
    base = setting.metric(f"base_{metric}")
    near = [other for other, _, is_near in places[1:] if is_near]
    return {
        "label": setting.short_label,
        "metric": metric,
        "value": shown(statistics, metric),
        "base": shown(base, metric),
        "near": _near(setting, statistics, places, near),
        "run": run,
        "artifact": artifact(run),
        "command": sampling_command(run),
        "costs": costs(run),
        "warning": memorisation_warning(run.metrics),
    }


def _near(setting: Setting, statistics: MetricStatistics, places: Sequence[Place], near: Sequence[Setting]) -> str:
    if len(places) == 1:
        return ""
    if statistics.spread is None:
        return "Its noise is unknown, because it has one seed: sweep over seed=0,1,2 to measure it."
    unknown = sum(is_near is None for _, _, is_near in places[1:])
    one_seed = f" The noise of {unknown} other settings is unknown (one seed)." if unknown else ""
    if not near:
        return f"No other of the {len(places) - unknown} settings with several seeds is within its noise.{one_seed}"
    names = "; ".join(other.short_label for other in near[:4]) + (
        f"; and {len(near) - 4} more" if len(near) > 4 else ""
    )
    cheapest = min((setting, *near), key=_seconds)
    hint = "" if cheapest is setting else f" The one that trains fastest is {cheapest.short_label}."
    return f"Within its noise, {len(near)} of the other {len(places) - 1}: {names}.{hint}{one_seed}"


def _seconds(setting: Setting) -> float:
    values = [seconds(run.metrics) for run in setting.runs]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("inf")


def seconds(metrics: Mapping[str, float]) -> float | None:
    """Time of all steps in seconds, from the median step; None if it is unknown."""
    if "median_step_seconds" not in metrics or "steps" not in metrics:
        return None
    return metrics["median_step_seconds"] * metrics["steps"]


def costs(run: Run) -> list[Fact]:
    """What the training of ``run`` took."""
    names = {
        "peak memory": "peak_memory_bytes",
        "size of the artifact": "artifact_bytes",
        "trained parameters": "trainable_parameters",
        "steps": "steps",
    }
    out = [(name, unit(run.metrics[key], key)) for name, key in names.items() if key in run.metrics]
    out += _rank_and_alpha(run)
    time = seconds(run.metrics)
    return out if time is None else [("time of all steps", unit(time, "seconds")), *out]


def _rank_and_alpha(run: Run) -> list[Fact]:
    """Rank and alpha of a LoRA, from the header of its file: the settings do not state the defaults."""
    file = artifact(run)
    if file is None or file.suffix != ".safetensors":
        return []
    try:
        with file.open("rb") as handle:
            size = int.from_bytes(handle.read(8), "little")
            metadata = json.loads(handle.read(min(size, _MOST_HEADER_BYTES))).get("__metadata__", {})
    except (OSError, ValueError):
        return []
    rank, alpha = metadata.get("ss_network_dim"), metadata.get("ss_network_alpha")
    return [("rank, alpha", f"{rank}, {alpha}")] if rank is not None else []


_MOST_HEADER_BYTES = 10_000_000


def memorisation_warning(metrics: Mapping[str, float]) -> str:
    """Warning for images that are almost copies of training images; empty otherwise."""
    value = metrics.get("memorisation")
    if value is None or value < _COPY:
        return ""
    return (
        f"Memorisation is high: the images are on average {value:.2f} similar to a training image (1 is a copy)."
        " Compare them with the training images; fewer steps or a lower learning rate memorise less."
    )


def shown(value: MetricStatistics | None, metric: str) -> str:
    """Mean, and standard deviation over seeds, with unit; empty for None."""
    if value is None:
        return ""
    return unit(value.mean, metric) + (f" ± {unit(value.spread, metric, 2)}" if value.spread is not None else "")
