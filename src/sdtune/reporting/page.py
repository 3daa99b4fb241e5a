"""Render the report as one HTML file, or as a folder if its images are too large for one file."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sdtune.errors import UserError
from sdtune.files import is_locked, write_text
from sdtune.quoting import shell_override
from sdtune.reporting import charts, facts, tables
from sdtune.reporting.collect import Run
from sdtune.reporting.images import ImageStore
from sdtune.reporting.ranking import Setting, group_by_setting, metrics, rankings, varied
from sdtune.reporting.samples import samples, sheets, training_copies
from sdtune.runs.metrics import OF_TRAINING, unit

MOST_BYTES = 15_000_000
"""Size of the page above which its images are files beside it."""

_MOST_DIFFERENCES = 12
"""Number of settings up to which a table compares their configs."""


@dataclass(frozen=True)
class Content:
    """Content of a page.

    Attributes:
        template: name of the template.
        values: values for the template.
        data: values for the page's script.
        images: keys of all images.
    """

    template: str
    values: dict[str, Any]
    data: dict[str, Any]
    images: list[str]


def write_report(
    runs: Sequence[Run], folder: Path, title: str, store: ImageStore | None = None, reload: float | None = None
) -> Path:
    """Write ``folder/report.html`` of ``runs``, atomically, and return its path.

    Above :data:`MOST_BYTES`, the page is ``folder/report/index.html``, with its images beside it.

    Args:
        store: images that earlier pages have read.
        reload: seconds after which the page reloads itself; None: never.
    """
    store = store or ImageStore()
    content = _single(runs[0], store) if len(runs) == 1 else _several(runs, folder, store)
    place = f"@{secrets.token_hex(16)}@"
    page = _rendered(content, title, place, reload)
    store.keep(content.images)
    file, beside = folder / "report.html", folder / _FOLDER
    is_large = len(page.encode()) + store.bytes_of(content.images) > MOST_BYTES
    if is_large and (beside / ".hydra").exists():
        raise UserError(
            f"{beside} is a run, but a report above {MOST_BYTES // 10**6} MB is written there",
            remedy="rename the run's folder",
        )
    store.folder = _IMAGES if is_large else ""
    urls = _escaped(json.dumps({key: store.url(key) for key in content.images}))
    page = page.replace(f'"{place}"', urls)
    if not is_large:
        write_text(file, page)
        _remove_folder(beside, set())
        return file
    store.write(beside / _IMAGES, content.images)
    write_text(beside / "index.html", page)
    write_text(file, _REDIRECT)
    _remove_folder(beside, set(content.images))
    return beside / "index.html"


_FOLDER, _IMAGES = "report", "images"
"""Folder of a large page, and the folder of the images in it."""

_REDIRECT = """<!doctype html>
<meta charset="utf-8">
<meta http-equiv="refresh" content="0; url=report/index.html">
<title>Report</title>
<p><a href="report/index.html">The report</a></p>
"""
"""``report.html`` beside a large page, so that an open page finds it."""


def _remove_folder(folder: Path, kept: set[str]) -> None:
    """Remove the images of an earlier page that are not ``kept``, and without any the page too; no other files."""
    for file in (folder / _IMAGES).glob("*.webp"):
        if file.stem not in kept and re.fullmatch(r"[0-9a-f]{16}", file.stem):
            file.unlink()
    if not kept and (folder / _IMAGES).is_dir():
        (folder / "index.html").unlink(missing_ok=True)
        for path in (folder / _IMAGES, folder):
            with suppress(OSError):  # it has other files
                path.rmdir()


def _rendered(content: Content, title: str, place: str, reload: float | None) -> str:
    """The page, with the text ``place`` instead of the addresses of its images."""
    environment = Environment(
        autoescape=True,
        loader=PackageLoader("sdtune.reporting", "assets"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    nonce = secrets.token_urlsafe(12)  # a script injected by a caption has no nonce and does not run
    data = {**content.data, "images": place, "reload": reload, "title": title}
    return environment.get_template(content.template).render(
        title=title,
        written=None if reload is None else f"{datetime.now():%H:%M:%S}",
        nonce=nonce,
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        style=Markup(_asset("report.css")),
        script=Markup(_asset("report.js")),
        data=Markup(_escaped(json.dumps(data, allow_nan=False))),
        **content.values,
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    """JSON that no text in it can end: not the element, and not a line of a script."""
    safe = text.replace("<", "\\u003c")
    return safe.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _several(runs: Sequence[Run], folder: Path, store: ImageStore) -> Content:
    settings = group_by_setting(runs)
    done = [run for run in runs if run.metrics]
    places = rankings(settings)
    order = [setting for _, table in places for setting, *_ in table]
    order += [setting for setting in settings if setting not in order]
    metric = places[0][0] if places else None
    numbers = {run.folder: number for number, run in enumerate(run for setting in order for run in setting.runs)}
    warning = facts.comparability(runs)
    shown = samples(order, numbers, store, with_base=not warning)
    winner = facts.winner(metric, places[0][1]) if metric is not None else None
    best = winner["run"] if winner is not None else order[0].runs[0]
    training, grids = training_copies(best, store, 4), sheets(best, store)
    keys = list(settings[0].own)
    values = {
        "facts": facts.facts(runs),
        "comparability": warning,
        "counts": _counts(runs),
        "resume_command": _resume_command(folder),
        "winner": winner,
        "training": training,
        "answer": _answer_images(shown.blocks, numbers[best.folder]),
        "rankings": [tables.ranking_table(metric, table, with_base=not warning) for metric, table in places],
        "charts": _charts(order, done, metric),
        "shared": _shared(done),
        "samples": shown.blocks,
        "omitted": shown.omitted,
        "labels": [setting.short_label for setting in order],
        "sheets": grids,
        "best": order[0].short_label,
        "runs": tables.runs_table(order, folder, metric),
        "failed": [(tables.run_name(run, folder), run.error) for run in runs if run.error],
        "differences": tables.differences(order, [key for key in varied(runs) if key not in keys])
        if len(order) <= _MOST_DIFFERENCES
        else {"labels": [], "rows": []},
        "reasons": tables.reasons(done),
        "curves": charts.curves(order, numbers),
        "can_compare": _can_compare(shown.blocks),
    }
    data = _data(values, order, numbers, folder)
    return Content("report.html.j2", values, data, _keys(shown.keys(), training, grids))


def _single(run: Run, store: ImageStore) -> Content:
    setting = Setting({}, (run,))
    numbers = {run.folder: 0}
    shown = samples([setting], numbers, store)
    training, grids = training_copies(run, store), sheets(run, store)
    values = {
        "facts": facts.facts([run], "command line"),
        "state": run.state,
        "error": run.error,
        "metrics": _before_and_after(run),
        "costs": facts.costs(run),
        "warning": facts.memorisation_warning(run.metrics),
        "artifact": facts.artifact(run),
        "command": facts.sampling_command(run),
        "repeat": tables.repeating_command(run),
        "folder": run.folder,
        "training": training,
        "counts": run.training.counts,
        "samples": shown.blocks,
        "sheets": grids,
        "settings": tables.settings_of(run),
        "reasons": run.reasons,
        "curves": charts.curves([setting], numbers),
        "charts": [],
        "labels": [run.folder.resolve().name],
        "can_compare": False,
    }
    data = _data(values, [setting], numbers, run.folder)
    return Content("run.html.j2", values, data, _keys(shown.keys(), training, grids))


def _data(
    values: Mapping[str, Any], order: Sequence[Setting], numbers: Mapping[Path, int], folder: Path
) -> dict[str, Any]:
    """Data of the page's script."""
    runs = [
        {"name": tables.run_name(run, folder), "setting": place, "seed": str(run.config.get("seed", ""))}
        for place, setting in enumerate(order)
        for run in setting.runs
    ]
    assert len(runs) == len(numbers)
    return {
        "labels": values["labels"],
        "runs": runs,
        "curves": values["curves"],
        "samples": values["samples"],
        "colors": charts.COLORS,
        "charts": [
            {"figure": json.loads(chart.figure.to_json()), "choices": [args for _, args in chart.choices]}
            for chart in values["charts"]
        ],
    }


def _keys(samples: set[str], *shown: Iterable[tuple[str, str]]) -> list[str]:
    """Keys of all images, sorted: of samples, of training images (key first), and of grids (key last)."""
    training, grids = shown
    return sorted({*samples, *(key for key, _ in training), *(key for _, key in grids)})


def _counts(runs: Sequence[Run]) -> str:
    counts = {state: sum(run.state == state for run in runs) for state in dict.fromkeys(run.state for run in runs)}
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _resume_command(folder: Path) -> str:
    """Command that continues a stopped sweep; empty otherwise."""
    if not (folder / "multirun.yaml").is_file() or (folder / "sweep.json").is_file() or is_locked(folder):
        return ""
    return f"sdtune train -m {shell_override('resume', folder)}"


def _shared(done: Sequence[Run]) -> str:
    """Note on runs that shared a backbone, whose costs are measured together."""
    counts = [int(run.metrics["shared_with"]) for run in done if run.metrics.get("shared_with", 1) > 1]
    if not counts:
        return ""
    together = " or ".join(map(str, sorted(set(counts))))
    return (
        f"{len(counts)} of {len(done)} runs trained {together} at the same time on one backbone (shared_with):"
        " their step times, peak memory and derived metrics are those of all these runs together."
    )


def _charts(settings: Sequence[Setting], done: Sequence[Run], metric: str | None) -> list[charts.Chart]:
    if metric is None:
        return []
    varied_settings = charts.heat_map(settings, metrics(done), metric) or charts.scatter_plot(settings, metric)
    drawn = [varied_settings, charts.cost_and_effect(settings, metric)]
    return [chart for chart in drawn if chart is not None]


def _answer_images(blocks: Sequence[Mapping[str, Any]], run: int) -> list[dict[str, Any]]:
    """For at most three prompts, the image of the base model and the last one of the best run, number ``run``."""
    shown: list[dict[str, Any]] = []
    for number, block in enumerate(blocks):
        steps: list[Any] = next((entry["steps"] for entry in block["cells"][0] if entry["run"] == run), [])
        if steps and steps[-1][0] > 0 and len(shown) < 3:
            shown.append(
                {"block": number, "run": run, "prompt": block["prompt"], "base": block["base"], "best": steps[-1][1]}
            )
    return shown


def _can_compare(blocks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two settings have samples of the same prompt and seed."""
    return any(sum(bool(cell) for cell in block["cells"]) > 1 for block in blocks)


def _before_and_after(run: Run) -> list[dict[str, Any]]:
    """Metrics of the base model and of the trained one."""
    measured = [key for key in run.metrics if not key.startswith(("base_", "ceiling_"))]
    measured = [key for key in measured if key not in OF_TRAINING or key == "validation_loss"]
    return [
        {
            **tables.column(key),
            "base": unit(run.metrics[f"base_{key}"], key) if f"base_{key}" in run.metrics else "",
            "value": unit(run.metrics[key], key),
        }
        for key in measured
    ]
