"""What the dashboards share: variables, panels with unit and description, links to the runbook. No query lives here."""

from __future__ import annotations

from collections.abc import Sequence

from grafana_foundation_sdk.builders import common as shapes
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.handbook import number_of

__all__ = ["SOURCE", "TAG", "Targets", "choice", "curves", "heat", "number", "page", "rows", "steps"]

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${source}")
TAG = "resilience"
Targets = Sequence[tuple[str, str]]
"""(query, legend) pairs."""
Thresholds = Sequence[tuple[float | None, str]]


def _link(title: str, url: str) -> builders.DashboardLink:
    return builders.DashboardLink(title).url(url).type(models.DashboardLinkType.LINK)


def _links(alerts: Sequence[str]) -> list[builders.DashboardLink]:
    """From a panel to what the runbook says of the alerts that look at the same numbers."""
    return [_link(f"Runbook: {name}", f"/d/resilience-runbook?viewPanel={number_of(name)}") for name in alerts]


def steps(*found: tuple[float | None, str]) -> builders.ThresholdsConfig:
    """Thresholds from the lowest value up; the first one starts at None."""
    listed = [models.Threshold(value=value, color=color) for value, color in found]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(listed)


def _query(expr: str, legend: str, ref: int, *, instant: bool = False) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expr).legend_format(legend).ref_id(chr(ord("A") + ref)).datasource(SOURCE)
    return query.instant() if instant else query.range()


def number(
    title: str,
    expr: str,
    *,
    unit: str,
    says: str,
    limits: Thresholds = ((None, "green"),),
    alerts: Sequence[str] = (),
    legend: str = "{{run}}",
    width: int = 4,
) -> stat.Panel:
    """One number for each series, coloured by `limits`."""
    panel = stat.Panel().title(title).description(says).unit(unit).datasource(SOURCE).height(4).span(width)
    panel = panel.thresholds(steps(*limits)).color_mode(common.BigValueColorMode.BACKGROUND)
    panel = panel.reduce_options(shapes.ReduceDataOptions().calcs(["lastNotNull"])).links(_links(alerts))
    return panel.with_target(_query(expr, legend, 0, instant=True))


def curves(
    title: str,
    targets: Targets,
    *,
    unit: str,
    says: str,
    limits: Thresholds = (),
    alerts: Sequence[str] = (),
    stacked: bool = False,
    width: int = 12,
) -> timeseries.Panel:
    """Series over time; `limits` are drawn as lines."""
    panel = timeseries.Panel().title(title).description(says).unit(unit).datasource(SOURCE).height(8).span(width)
    panel = panel.links(_links(alerts)).min(0).fill_opacity(30 if stacked else 8).line_width(1)
    legend = shapes.VizLegendOptions().display_mode(common.LegendDisplayMode.TABLE).show_legend(True)
    panel = panel.legend(legend.placement(common.LegendPlacement.BOTTOM).calcs(["lastNotNull", "max"]))
    if stacked:
        panel = panel.stacking(shapes.StackingConfig().mode(common.StackingMode.NORMAL))
    if limits:
        style = shapes.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(steps(*limits)).thresholds_style(style)
    for index, (expr, legend_text) in enumerate(targets):
        panel = panel.with_target(_query(expr, legend_text, index))
    return panel


def heat(title: str, expr: str, *, unit: str, says: str, alerts: Sequence[str] = ()) -> heatmap.Panel:
    """The buckets of a histogram over time; `expr` gives them by `le`."""
    panel = heatmap.Panel().title(title).description(says).datasource(SOURCE).height(8).span(12).calculate(False)
    panel = panel.color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Spectral").steps(64))
    panel = panel.y_axis(heatmap.YAxisConfig().unit(unit)).links(_links(alerts))
    return panel.with_target(_query(expr, "{{le}}", 0).format(PromQueryFormat.HEATMAP))


def rows(
    title: str,
    expr: str,
    *,
    says: str,
    unit: str = "short",
    limits: Thresholds = ((None, "transparent"),),
    alerts: Sequence[str] = (),
    opens: Sequence[tuple[str, str]] = (),
    width: int = 12,
) -> table.Panel:
    """The series as a table; `opens` are links of each row, (title, URL)."""
    panel = table.Panel().title(title).description(says).unit(unit).datasource(SOURCE).height(8).span(width)
    panel = panel.thresholds(steps(*limits)).links(_links(alerts))
    if opens:
        panel = panel.data_links([_link(name, url) for name, url in opens])

    panel = panel.with_transformation(_without(("Time", "__name__", "alertstate", "job", "instance")))
    return panel.with_target(_query(expr, "", 0, instant=True).format(PromQueryFormat.TABLE))


def _without(columns: Sequence[str]) -> models.DataTransformerConfig:
    return models.DataTransformerConfig(id_val="organize", options={"excludeByName": dict.fromkeys(columns, True)})


def choice(name: str, label: str, query: str, says: str) -> builders.QueryVariable:
    """A variable with several values, all of them at first."""
    variable = builders.QueryVariable(name).label(label).description(says).datasource(SOURCE).query(query)
    variable = (
        variable.multi(True).include_all(True).all_value(".*").refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
    )
    variable = variable.sort(models.VariableSort.ALPHABETICAL_ASC)
    return variable.current(models.VariableOption(text="All", value="$__all"))


def page(uid: str, title: str, says: str) -> builders.Dashboard:
    """An empty dashboard with the variables that all have: data source, run, node."""
    board = builders.Dashboard(title).uid(uid).description(says).tags([TAG]).refresh("15s").time("now-6h", "now")
    board = board.readonly().timezone("browser").tooltip(models.DashboardCursorSync.CROSSHAIR)
    others = builders.DashboardLink("Resilience").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    board = board.link(others.include_vars(True).keep_time(True))
    board = board.with_variable(builders.DatasourceVariable("source").label("Data source").type("prometheus"))
    board = board.with_variable(
        choice("run", "Run", "label_values(resilience_coordinator_up, run)", "Runs whose coordinators are scraped")
    )
    return board.with_variable(
        choice(
            "node",
            "Node",
            'label_values(resilience_device_info{run=~"$run"}, node)',
            "Nodes whose devices the runs offer or have cordoned",
        )
    )
