"""Create a W&B dashboard of a sweep: ``python docs/wandb_dashboard.py ENTITY/PROJECT --group SWEEP``.

Saves a workspace view with W&B's public workspace API (``pip install -e '.[dashboard]'``) and prints its URL. The
runs of the sweep must be online or synced. The account is that of ``wandb login`` or ``WANDB_API_KEY``.
"""

from __future__ import annotations

import argparse
import sys

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb.errors import CommError, UsageError

from sdtune.reporting.ranking import LOWER_IS_BETTER

STEP = "trainer/global_step"


def dashboard(
    entity: str, project: str, group: str | None, metric: str, over: list[str], log: list[str]
) -> ws.Workspace:
    """Build the workspace view; it is not yet saved.

    Args:
        group: the sweep's folder name, which is the W&B group of its runs; None for all runs of the project.
        metric: the metric of ``metrics.json`` to compare.
        over: config keys that the sweep varies, such as ``method.rank``.
        log: keys of ``over`` with a logarithmic axis.
    """
    final = wr.SummaryMetric(f"final/{metric}")
    axes = [wr.ParallelCoordinatesPlotColumn(wr.Config(key), log=key in log) for key in over]
    costs = ("median_step_seconds", "peak_memory_bytes", "trainable_parameters", "artifact_bytes")
    comparison = [
        wr.ParallelCoordinatesPlot(columns=[*axes, wr.ParallelCoordinatesPlotColumn(final)]),
        wr.ParameterImportancePlot(with_respect_to=f"final/{metric}"),
        *(wr.ScatterPlot(x=wr.Config(key), y=final, log_x=key in log) for key in over),
    ]
    curves = [
        wr.LinePlot(x=STEP, y=["loss"], smoothing_factor=0.9, smoothing_type="exponentialTimeWeighted"),
        wr.LinePlot(x=STEP, y=["validation_loss"]),
        wr.LinePlot(x=STEP, y=["grad_norm"], log_y=True),
        wr.LinePlot(x=STEP, metric_regex="lr/.*"),
    ]
    samples = [wr.MediaBrowser(media_keys=["samples"]), wr.WeavePanelSummaryTable(table_name="before_after")]
    cost = [wr.ScatterPlot(x=wr.SummaryMetric(f"final/{key}"), y=final, log_x=True) for key in costs]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"sdtune: {group or 'all runs'}",
        sections=[
            ws.Section(name="Comparison", panels=comparison, is_open=True),
            ws.Section(name="Curves", panels=curves, is_open=True),
            ws.Section(name="Samples", panels=samples, is_open=True),
            ws.Section(name="Metric against cost", panels=cost),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP),
        runset_settings=ws.RunsetSettings(
            filters=[ws.Metric("Group").isin([group])] if group else [],
            order=[ws.Ordering(ws.Summary(f"final/{metric}"), ascending=metric in LOWER_IS_BETTER)],
            pinned_columns=[f"summary:final/{metric}", *map(_column, over)],
        ),
    )


def _column(key: str) -> str:
    first, dot, rest = key.partition(".")
    return f"config:{first}.value{dot}{rest}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python docs/wandb_dashboard.py", description=__doc__.split("\n")[0])
    parser.add_argument("project", metavar="ENTITY/PROJECT")
    parser.add_argument("--group", help="folder name of the sweep; default: all runs of the project")
    parser.add_argument("--metric", default="subject_gain", help="metric of metrics.json to compare")
    parser.add_argument(
        "--over", nargs="*", default=["method.rank", "optimizer.lr"], help="config keys that the sweep varies"
    )
    parser.add_argument("--log", nargs="*", default=["optimizer.lr"], help="keys of --over with a logarithmic axis")
    arguments = parser.parse_args()
    entity, slash, project = arguments.project.partition("/")
    if not (entity and slash and project):
        print(f"{arguments.project} is not ENTITY/PROJECT, such as my-team/sdtune", file=sys.stderr)
        raise SystemExit(2)
    view = dashboard(entity, project, arguments.group, arguments.metric, arguments.over, arguments.log)
    try:
        view.save()
    except (UsageError, CommError) as error:
        print(f"W&B: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(view.url)


if __name__ == "__main__":
    main()
