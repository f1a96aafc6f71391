"""Findings on a terminal: an alert as one line, and an episode in full.

All text was redacted when the alert was made. Promises that no control character of a finding reaches the terminal.
"""

from __future__ import annotations

import re
from typing import Any

from rich.text import Text

from state.episodes import CLOSE, CREATE
from streamer.alerting import text as wording
from streamer.alerting.alert_reader import AlertEpisode, Finding, integer, own

SEVERITY = {1: "dim", 2: "cyan", 3: "yellow", 4: "red", 5: "bold red"}
_ACTIVITY = {1: "new", 2: "more", 3: "over"}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
SHORT = 8
"""Characters of a uid that identify it among some thousands."""


def one_line(finding: Finding, verbose: bool = False) -> Text:
    """Time, severity, activity, title, number of events and the beginning of the uid; verbose: also the description."""
    severity = finding.get("severity_id", 1)
    activity = finding.get("activity_id", CREATE)
    info = finding["finding_info"]
    quiet = "dim" if activity == CLOSE else ""
    text = Text(f"{wording.moment(integer(info.get('last_seen_time'))).removesuffix(' UTC')}  ", style=quiet)
    text.append(f"{_plain(finding.get('severity'))[:8]:8}  ", style=quiet or SEVERITY.get(severity, ""))
    text.append(f"{_verdict(finding) or _ACTIVITY.get(activity, '?'):4}  ", style=quiet)
    text.append(_plain(info.get("title")), style=quiet)
    if integer(finding.get("count")) > 1:
        text.append(f"  ×{integer(finding.get('count')):,}", style="bold")
    text.append(f"  {_plain(info.get('uid'))[:SHORT]}", style="dim")
    if verbose:
        text.append("\n" + "\n".join(f"    {row}" for row in _plain(info.get("desc")).splitlines()))
    return text


def full_text(episode: AlertEpisode) -> Text:
    """An episode: title, severity, confidence, risk, description, its findings one a line, and where its event lies."""
    explained, last = episode.most_unusual, episode.last
    info = explained["finding_info"]
    text = Text(_plain(info.get("title")), style=f"bold {SEVERITY.get(last.get('severity_id', 1), '')}".strip())
    text.append("\n")
    facts = [
        f"severity {_plain(last.get('severity'))}",
        f"confidence {_plain(last.get('confidence'))} ({integer(last.get('confidence_score'))} of 99)",
        f"risk {integer(last.get('risk_score'))} of 100",
        f"{integer(last.get('count')):,} event{'s' if integer(last.get('count')) != 1 else ''}",
        _plain(episode.verdict or last.get("status")).lower(),
    ]
    text.append(f"{'; '.join(facts)}\n\n", style="default")
    for row in _plain(info.get("desc")).splitlines():
        text.append(f"{row}\n", style="default")
    text.append("\n")
    for finding in episode.findings:
        text.append_text(one_line(finding))
        text.append("\n")
    source = own(explained).get("source")
    if isinstance(source, dict):
        where = f"-t {source.get('topic')} -p {source.get('partition')} -o {source.get('offset')} -c 1"
        text.append(f"\nThe event: kcat -b BROKER {_plain(where)}\n", style="dim")
    text.append(f"finding {_plain(episode.uid)}, alert {_plain(explained['metadata'].get('uid'))}", style="dim")
    return text


def _verdict(finding: Finding) -> str:
    return _plain(finding.get("verdict")).lower()


def _plain(value: Any) -> str:
    return _CONTROL.sub("·", str(value)) if value is not None else ""
