"""What `deploy/` holds fits together: the images have what is installed, compose starts what exists, the dashboard
shows what the service measures. No image is built here: that needs a Docker daemon."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from loop_harness import create

from encoder.ocsf.decoder import decode
from encoder.ocsf.events import Message
from streamer.errors import ConfigurationError
from streamer.service.metrics import Metrics, serve
from streamer.settings import Settings, leaves, variable

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"


def dockerfile() -> list[str]:
    """Its instructions, each on one line."""
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


def compose() -> Any:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def test_the_linters_find_nothing() -> None:
    for command in (
        ["hadolint", "deploy/Dockerfile"],
        ["yamllint", "--strict", "--config-data", "{extends: relaxed, rules: {line-length: {max: 120}}}", "deploy"],
    ):
        tool = Path(sys.executable).with_name(command[0])
        done = subprocess.run([tool, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_image_installs_what_the_repository_holds_and_runs_as_nobody_in_particular(tmp_path: Path) -> None:
    lines = dockerfile()
    copied = [line.split()[1:] for line in lines if line.startswith("COPY ") and "--from" not in line]
    kept = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    for *sources, target in copied:
        for source in sources:
            assert source in kept
            place = tmp_path / (source if target == "./" else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, place)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=tmp_path, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = subprocess.check_output(["git", "ls-files", "encoder", "state", "streamer"], cwd=ROOT, text=True).split()
    assert {name for name in names if ".dist-info/" not in name} >= set(tracked)

    stages = [line.split()[-1] for line in lines if line.startswith("FROM ")]
    assert stages == ["build", "build-cpu", "build-cuda", "runtime", "cuda", "cpu"]
    (user,) = [line for line in lines if line.startswith("USER ")]
    assert user.split()[1].split(":")[0] not in ("root", "0")
    assert any("HNSWLIB_NO_NATIVE=1" in line for line in lines)
    assert 'ARG TORCH_CPU_INDEX=""' in lines
    assert "://" not in "".join(lines)  # Whose index it is, is for whoever builds to say.


def test_metrics_are_for_this_host_alone_unless_it_is_an_image() -> None:
    assert any("RIPCURRENT_METRICS_ADDRESS=0.0.0.0" in line for line in dockerfile() if line.startswith("ENV "))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for address, answers in ((Settings().metrics_address, False), ("0.0.0.0", True)):
        server = serve(Metrics(), address, port, alive=lambda: "", ready=lambda: "")
        try:
            assert urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5).status == 200
            # Another address of this host stands for its address in a network.
            with nullcontext() if answers else pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=5).close()
        finally:
            server.shutdown()
            server.server_close()
    with pytest.raises(ConfigurationError, match=rf"metrics_port {port} .* metrics_address 192\.0\.2\.1"):
        serve(Metrics(), "192.0.2.1", port, alive=lambda: "", ready=lambda: "")


def test_compose_names_only_what_exists() -> None:
    tree = compose()
    services = tree["services"]
    known = {variable(name) for name, _ in leaves()}
    topics = set(re.findall(r"^ *make (\S+)", services["topics"]["command"][-1], re.MULTILINE))
    defaults = {name: field.default for name, field in leaves()}
    for name, service in services.items():
        for other in service.get("depends_on", {}):
            assert other in services, (name, other)
            needs = service["depends_on"][other]["condition"]
            assert needs != "service_healthy" or "healthcheck" in services[other], (name, other)
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in tree["volumes"], volume
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), port
        if service["image"].startswith("ripcurrent:"):
            assert service["build"]["target"] in {"cpu", "cuda"}
            environment = service["environment"]
            assert set(environment) <= known
            assert environment["RIPCURRENT_EVENTS"] in topics
    written = {defaults[name] for name in ("alerts", "dead_letters", "ledger")} | {"scores"}
    assert topics == {"events"} | written
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    (found,) = job["dns_sd_configs"]
    assert found["names"] == ["ripcurrent"]
    assert found["port"] == defaults["metrics_port"]


def test_the_dashboard_shows_what_is_measured() -> None:
    dashboard = orjson.loads((DEPLOY / "grafana/dashboards/ripcurrent.json").read_bytes())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    shown = {name for text in expressions for name in re.findall(r"\bripcurrent_\w+", text)}
    measured = set()
    for family in Metrics().registry.collect():
        ends = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        measured |= {family.name + end for end in ends}
    assert shown - measured == set()
    assert len(shown) > 20
    places = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places)), "panels lie on each other"
    assert max(x for x, _ in places) < 24


@pytest.mark.extended
def test_the_simulated_company_has_a_past_and_goes_on(
    kafka: str, unique: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(DEPLOY))
    import feed

    topics = create(kafka, unique("feed"), partitions=2)
    monkeypatch.setenv("RIPCURRENT_KAFKA_BOOTSTRAP_SERVERS", kafka)
    monkeypatch.setenv("RIPCURRENT_EVENTS", topics.events)
    monkeypatch.setattr(feed, "EVENTS_PER_DAY", 2600)
    thursday_noon = 1_763_640_000_000 // feed.DAY * feed.DAY + feed.DAY // 2
    assert time.gmtime(thursday_noon // 1000).tm_wday == 3
    past = feed.history(tmp_path / "history.ndjson", thursday_noon)
    days = {orjson.loads(line)["time"] // feed.DAY for line in (tmp_path / "history.ndjson").read_bytes().splitlines()}
    today = thursday_noon // feed.DAY
    assert days == set(range(today - 10, today))
    assert past > 10_000

    before = thursday_noon - 600_000
    sent = feed.live(before, 600)  # Ten minutes that are over: nothing is waited for.
    messages = [
        Message(topics.events, m.partition(), m.offset(), m.timestamp()[1], m.value()) for m in topics.read("events")
    ]
    events, rejects = decode(messages)
    assert len(events) == sent > 0
    assert rejects == []
    assert before <= min(events.time) <= max(events.time) < thursday_noon
