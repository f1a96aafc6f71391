"""A report as one HTML page without scripts and without anything to load.

Promises that all text from alerts is escaped, and that the page's content security policy forbids scripts and loading,
whatever a title holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from streamer.alerting import text as wording
from streamer.alerting.alert_reader import AlertEpisode, Finding, integer, own
from streamer.report.report import DECADES, Days, Report, Scores

_LEVELS = ("informational", "low", "medium", "high", "critical")
_NAMES = (("auroc", "AUROC"), ("ap", "AP"), ("recall_at_20fp", "recall before the 20th false alarm"))
_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#667085;--line:#e3e7ed;--page:#f6f7f9;--card:#fff;--blue:#3b6fd4;
--s1:#98a2b3;--s2:#3aa0b5;--s3:#e0a21b;--s4:#e0652b;--s5:#c3263f}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#98a2b3;--line:#2c3440;--page:#12161c;--card:#1a2029;
--blue:#7aa2f0}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;margin:0}h2{font-size:18px;margin:36px 0 12px}
.soft{color:var(--soft)}.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 18px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:22px}
.tiles b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:right}th{font-weight:600;color:var(--soft)}
th:first-child,td:first-child{text-align:left}.tight td:first-child{white-space:nowrap}
td.best{font-weight:700}tr:last-child td{border-bottom:0}
svg{display:block;width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}
details{margin-bottom:8px}summary{cursor:pointer;list-style:none;display:flex;gap:12px;align-items:baseline}
summary::-webkit-details-marker{display:none}.tag{flex:none;width:92px;color:#fff;border-radius:5px;padding:1px 8px;
font-size:12px;text-align:center}.grow{flex:1;overflow-wrap:anywhere}.num{flex:none;color:var(--soft)}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.5 ui-monospace,monospace;margin:12px 0}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:14px}.bar{height:8px;border-radius:4px;
background:var(--blue);display:inline-block;vertical-align:middle}
"""


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f'<div class="soft">made {wording.moment(report.made_ms)} from {escape(", ".join(report.sources))}</div>',
        _tiles(report.counts),
    ]
    if report.evaluation:
        parts.append(_section("Scorecard", _evaluation(report)))
    if report.bars:
        legend = " ".join(f'<span style="color:var(--s{i + 1})">■</span> {name}' for i, name in enumerate(_LEVELS))
        parts.append(_section("Alerts over time", f'{_alerts(report)}<div class="soft">{legend}</div>'))
    if report.days is not None:
        parts.append(_section("Budget", _budget(report.days)))
    if report.scores is not None:
        parts.append(_section("Scores", _scores(report.scores), card=False))
    if report.repairs:
        rows = "".join(f"<tr><td>{escape(part)}</td></tr>" for part in report.repairs.split("; "))
        parts.append(_section("Repairs of recent events", f"<table>{rows}</table>"))
    if report.drift:
        rows = "".join(f"<tr><td>{escape(part)}</td></tr>" for part in report.drift.split("; "))
        parts.append(_section("Drift of the last day and week", f"<table>{rows}</table>"))
    if report.causes:
        parts.append(_section("What was unusual", _causes(report.causes)))
    if report.top:
        rows = "".join(_episode(episode, opened=i == 0) for i, episode in enumerate(report.top))
        parts.append(_section("Top episodes", rows, card=False))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>"
    )


def _section(title: str, inner: str, card: bool = True) -> str:
    return f"<section><h2>{title}</h2>{f'<div class=card>{inner}</div>' if card else inner}</section>"


def _tiles(counts: Sequence[tuple[str, str]]) -> str:
    tiles = "".join(f'<div class="card"><b>{value}</b><span class="soft">{name}</span></div>' for name, value in counts)
    return f'<div class="tiles">{tiles}</div>'


def _evaluation(report: Report) -> str:
    results = report.evaluation
    best = {name: max((_number(r.get(name)) for r in results.values()), default=0.0) for name, _ in _NAMES}
    budgets = sorted({int(n) for result in results.values() for n in result.get("budget", {})})
    head = "".join(f"<th>{title}</th>" for _, title in _NAMES)
    head += "".join(f"<th>at {n} a day: false of alerts, recall</th>" for n in budgets)
    rows = []
    for name, result in results.items():
        cells = "".join(_figure(result.get(key), _number(result.get(key)) == best[key]) for key, _ in _NAMES)
        for n in budgets:
            spent = result.get("budget", {}).get(str(n))
            recall = "" if not spent or spent["recall"] is None else f", {spent['recall']:.3f}"
            figure = f"{spent['false_alarms']} of {spent['alerts']}{recall}" if spent else ""
            cells += f"<td>{figure}</td>"
        rows.append(f"<tr><td>{escape(str(name).replace('_', ' '))}</td>{cells}</tr>")
    return f"<table class=tight><tr><th>detector</th>{head}</tr>{''.join(rows)}</table>"


def _figure(value: Any, best: bool) -> str:
    return f"<td{' class=best' if best else ''}>{f'{value:.3f}' if isinstance(value, float) else '–'}</td>"


def _alerts(report: Report) -> str:
    """Stacked bars, the most severe alerts at the bottom."""
    width, height, axis = 960, 150, 22
    most = max(sum(bar) for _, bar in report.bars)
    step = width / len(report.bars)
    shapes = []
    for i, (start, bar) in enumerate(report.bars):
        top = float(height)
        for level in range(5, 0, -1):
            tall = bar[level - 1] / most * (height - 16)
            top -= tall
            if tall:
                place = f'x="{i * step + 1:.1f}" y="{top:.1f}" width="{max(step - 2, 1):.1f}" height="{tall:.1f}"'
                shapes.append(f'<rect {place} fill="var(--s{level})"><title>{_clock(start)}: {sum(bar)}</title></rect>')
    edges = ((0, "start"), (len(report.bars) - 1, "end"))
    for i, anchor in edges[: min(len(report.bars), 2)]:
        x = 0 if anchor == "start" else width
        place = f'x="{x}" y="{height + axis - 6}" text-anchor="{anchor}"'
        shapes.append(f"<text {place}>{_clock(report.bars[i][0])}</text>")
    shapes.append(f'<text x="{width}" y="10" text-anchor="end">at most {most}</text>')
    box = f'viewBox="0 0 {width} {height + axis}" role="img" aria-label="alerts over time"'
    return f"<svg {box}>{''.join(shapes)}</svg>"


def _budget(days: Days) -> str:
    most = max([count for _, count in days.spent] + [math.ceil(days.promised or 0)])
    rows = [
        f'<tr><td>{datetime.fromtimestamp(day / 1000, UTC):%a %Y-%m-%d}</td><td style="text-align:left;width:70%">'
        f'<span class="bar" style="width:{100 * count / most:.1f}%"></span></td><td>{count:,}</td></tr>'
        for day, count in days.spent
    ]
    promised = "" if days.promised is None else f"Promised: at most about {days.promised:g} a day from normal traffic. "
    threshold = "" if days.threshold is None else f"The threshold was {_threshold_range(days.threshold)}."
    return f"<table>{''.join(rows)}</table><p class=soft>{promised}{threshold}</p>"


def _threshold_range(thresholds: tuple[float, float]) -> str:
    low, high = (f"{wording.one_in(-math.log(p))}" for p in thresholds)
    return low if low == high else f"between {low} and {high}"


def _scores(scores: Scores) -> str:
    most = max(scores.decades)
    rows = []
    for i, count in enumerate(scores.decades):
        expected = scores.n * (10.0**-i - (0 if i == DECADES - 1 else 10.0 ** -(i + 1)))
        if not count and expected < 0.5:
            continue
        width = 100 * math.log1p(count) / math.log1p(most)
        name = f"1 in {_short(i)} to {_short(i + 1)}" if i < DECADES - 1 else f"rarer than 1 in {_short(i)}"
        rows.append(
            f'<tr><td>{name}</td><td style="text-align:left;width:45%"><span class="bar" style="width:{width:.1f}%">'
            f"</span></td><td>{count:,}</td><td class=soft>{_about(expected)}</td></tr>"
        )
    head = "<tr><th>p-value</th><th></th><th>events</th><th>if all were normal</th></tr>"
    rows.insert(0, head)
    table = f'<table class="tight">{"".join(rows)}</table><p class="soft">Bars are logarithmic.</p>'
    return f'<div class="two"><div class="card">{table}</div><div class="card">{_drift(scores)}</div></div>'


def _drift(scores: Scores) -> str:
    width, height = 440, 130
    top = max(*scores.parts, 0.02) * 1.1
    places = [
        (width * (i + 0.5) / len(scores.parts), height * (1 - share / top)) for i, share in enumerate(scores.parts)
    ]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="var(--blue)"/>' for x, y in places)
    even = height * (1 - 0.01 / top)
    levels = "".join(
        f"<tr><td>at or under {level:g}</td><td>{share:.2%}</td><td>{share / level:.1f} times</td></tr>"
        for level, share in scores.levels
    )
    return (
        f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="drift">'
        f'<line x1="0" x2="{width}" y1="{even:.1f}" y2="{even:.1f}" stroke="var(--soft)" stroke-dasharray="4 4"/>'
        f'<polyline points="{path}" fill="none" stroke="var(--blue)" stroke-width="2"/>{dots}'
        f'<text x="0" y="{height + 14}">first events</text>'
        f'<text x="{width / 2:g}" y="{height + 14}" text-anchor="middle">- - 1 %, as in training</text>'
        f'<text x="{width}" y="{height + 14}" text-anchor="end">last events</text></svg>'
        f"<table><tr><th>p-values</th><th>share of events</th><th>of what training says</th></tr>{levels}</table>"
    )


def _causes(causes: Sequence[tuple[str, int]]) -> str:
    most = causes[0][1]
    rows = "".join(
        f'<tr><td>{escape(wording.cause(cause))} <span class="soft">{escape(cause)}</span></td>'
        f'<td style="text-align:left;width:35%"><span class="bar" style="width:{100 * n / most:.1f}%"></span></td>'
        f"<td>{n:,}</td></tr>"
        for cause, n in causes
    )
    return f"<table>{rows}</table>"


def _episode(episode: AlertEpisode, *, opened: bool) -> str:
    last, explained = episode.last, episode.most_unusual
    info, level = explained["finding_info"], min(max(integer(last.get("severity_id")), 1), 5)
    seen = wording.moment(integer(last.get("start_time"))).removesuffix(" UTC")
    count = integer(last.get("count"))
    facts = f"risk {integer(last.get('risk_score'))} of 100, confidence {escape(str(last.get('confidence')).lower())}, "
    facts += escape(str(episode.verdict or last.get("status")).lower())
    return (
        f'<details class="card"{" open" if opened else ""}><summary>'
        f'<span class="tag" style="background:var(--s{level})">{_LEVELS[level - 1]}</span>'
        f'<span class="grow">{escape(str(info.get("title")))}</span>'
        f'<span class="num">{f"×{count:,} " if count > 1 else ""}{seen}</span></summary>'
        f'<p class="soft">{facts}</p><pre>{escape(str(info.get("desc")))}</pre>'
        f"{_timeline(explained)}{_history(episode.findings)}"
        f'<p class="soft">finding {escape(episode.uid)}</p></details>'
    )


def _timeline(finding: Finding) -> str:
    rows = [
        f'<tr><td>{wording.moment(integer(entry.get("time")))}</td><td style="text-align:left">'
        f'{escape(str(entry.get("summary")))}</td><td style="text-align:left;width:25%"><span class="bar" '
        f'style="width:{100 * _number(entry.get("share")):.0f}%"></span></td></tr>'
        for entry in own(finding).get("timeline") or []
        if isinstance(entry, dict)
    ]
    head = "<tr><th>timeline</th><th></th><th>less surprising without it</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>" if rows else ""


def _history(findings: Iterable[Finding]) -> str:
    rows = [
        f"<tr><td>{wording.moment(integer(finding.get('end_time')))}</td>"
        f"<td style='text-align:left'>{escape(str(finding.get('verdict') or finding.get('activity_name')))}</td>"
        f"<td>{integer(finding.get('count')):,}</td><td>{escape(str(finding.get('severity')))}</td></tr>"
        for finding in findings
    ]
    return f"<table><tr><th>until</th><th></th><th>events</th><th>severity</th></tr>{''.join(rows)}</table>"


def _clock(ms: int) -> str:
    return wording.moment(ms).removesuffix(":00 UTC")


def _short(decade: int) -> str:
    """A power of ten as text: 3 is "1 k"."""
    return f"{10 ** (decade % 3)}{('', ' k', ' M', ' G', ' T')[decade // 3]}"


def _about(x: float) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}" if x >= 0.01 else "under 0.01"


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
