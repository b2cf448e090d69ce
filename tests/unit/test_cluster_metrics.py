"""Alert rules and dashboard: they name only metrics that diki_ray serves, fire when they should, and a real Prometheus
answers every panel from a real scrape (where one is installed; Debian has it)."""

import json
import lzma
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from cluster_overlays import ROOT, SERVE_OVERLAYS, configuration_of, of_kind, ray_cluster, tool
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from ray.dashboard.modules.metrics import dashboards as ray_dashboards

from diki_ray import config
from diki_ray.runs.telemetry import Telemetry
from diki_ray.serving.front import Connections, Front
from diki_ray.serving.loaded_model import ModelMetrics
from diki_ray.serving.metrics import Metrics, together
from diki_ray.serving.settings import Limits

PROMETHEUS = ROOT / "cluster" / "prometheus"
ALERTS = yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["spec"]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana" / "diki.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{p['title']} {t['refId']}": t["expr"] for p in PANELS for t in p["targets"]}
UNTRIED = "alert rules and dashboard were NOT tried (Debian: apt-get install prometheus)"


def observed():
    """The registry of a run in which everything has happened once."""
    telemetry = Telemetry(config.load(ROOT / "configs" / "debug.yaml"), "own")
    telemetry.phase.state("train")
    for series in vars(telemetry).values():
        if isinstance(series, Gauge | Counter):
            series = series.labels(*("x" for _ in series._labelnames)) if series._labelnames else series
            series.inc()
    telemetry.summary.labels("forgetting").set(0.5)
    telemetry.weight.labels("x", "learnt").set(0.5)
    telemetry.weight.labels("x", "unlearnt").set(0.1)
    return telemetry.registry


class Served:
    """Collects what a front and two replicas of a server tell, in which everything has happened once."""

    def __init__(self):
        cache = SimpleNamespace(num_bytes=1)
        snapshots = SimpleNamespace(
            current=SimpleNamespace(version=3, tasks=("warm",)),
            class_features=SimpleNamespace(kept=cache, passing=cache),
            stale_since=None,
            failures=1,
        )
        self.metrics, self.model = Metrics("debug"), ModelMetrics(snapshots)
        limits = Limits()
        self.connections = Connections(limits)
        front = Front("", limits, self.connections)
        counting = (self.metrics, self.model, self.connections, front)
        for series in (s for of in counting for s in vars(of).values()):
            if isinstance(series, Counter | Gauge | Histogram):
                self.count(series.labels(*("x" for _ in series._labelnames)) if series._labelnames else series)

    @staticmethod
    def count(series):
        series.observe(1) if isinstance(series, Histogram) else series.inc()

    def collect(self):
        told = [*self.metrics.registry.collect(), *text_string_to_metric_families(self.model.exposed())]
        yield from together({"a": told, "b": told})
        yield from self.connections.registry.collect()


def test_every_metric_in_alerts_and_dashboard_exists():
    ours = {
        sample.name for source in (observed(), Served()) for family in source.collect() for sample in family.samples
    }
    rules = [rule["expr"] for group in ALERTS["groups"] for rule in group["rules"]]
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    text = "\n".join([*rules, *variables, *QUERIES.values()])
    text = re.sub(r"{[^}]*}", "", text)  # without labels: one is called diki_phase
    named = set(re.findall(r"\bdiki_\w+", text))
    assert named - ours == set()
    shown = {name for name in ours if not name.endswith("_created")} - {"diki_build_info", "diki_up"}
    assert shown - named == set(), "served and shown nowhere"
    rays = "".join(p.read_text() for p in Path(ray_dashboards.__file__).parent.glob("*_panels.py"))
    rays += (Path(ray_dashboards.__file__).parent / "default_grafana_dashboard_base.json").read_text()
    assert {name for name in re.findall(r"\bray_node\w+", text) if name not in rays} == set()


@pytest.mark.parametrize("file", ["pod-monitor.yaml", "pod-monitor-serve.yaml", "rules.yaml"])
def test_what_to_scrape_and_the_alerts_are_what_the_prometheus_operator_takes(file):
    schemas = json.loads(lzma.decompress((ROOT / "tests/prometheus_operator/types.json.xz").read_bytes()))
    thing = yaml.safe_load((PROMETHEUS / file).read_text())
    assert thing["apiVersion"] == "monitoring.coreos.com/v1"
    validator = jsonschema.Draft202012Validator(schemas[thing["kind"]])
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(thing)] == []
    assert not validator.is_valid(thing | {"spec": thing["spec"] | {"selektor": {}}})


def test_the_dashboard_has_the_variables_of_rays_own():
    ours = {v["name"]: v for v in DASHBOARD["templating"]["list"]}
    assert set(ours) == {"datasource", "SessionName", "Instance", "Cluster", "Run"}
    used = set(re.findall(r"\$(\w+)|\${(\w+)}", json.dumps(DASHBOARD)))
    assert {a or b for a, b in used} - {"__all"} == set(ours)


def test_every_port_that_prometheus_scrapes_is_open_to_it():
    monitor = yaml.safe_load((PROMETHEUS / "pod-monitor.yaml").read_text())
    scraped = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    head = ray_cluster("gpu")["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    (policy,) = of_kind("gpu", "NetworkPolicy")
    (rule,) = [r for r in policy["spec"]["ingress"] if "monitoring" in json.dumps(r["from"])]
    assert {port["port"] for port in rule["ports"]} == scraped <= set(ports)
    served = configuration_of("gpu")[0].telemetry
    assert (served.port, served.host) == (ports["diki-metrics"], "0.0.0.0")
    assert served.linger_s >= 2 * float(monitor["spec"]["podMetricsEndpoints"][-1]["interval"].removesuffix("s"))


@pytest.mark.parametrize("overlay", SERVE_OVERLAYS)
def test_the_server_lets_prometheus_in_with_the_token_that_it_asks_for(overlay):
    (endpoint,) = yaml.safe_load((PROMETHEUS / "pod-monitor-serve.yaml").read_text())["spec"]["podMetricsEndpoints"]
    (service,) = of_kind(overlay, "RayService")
    (policy,) = of_kind(overlay, "NetworkPolicy")
    scraped = [rule for rule in policy["spec"]["ingress"] if "monitoring" in json.dumps(rule["from"])]
    cluster = service["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {"port": ports[endpoint["port"]]} in [port for rule in scraped for port in rule["ports"]]
        (token,) = [e["valueFrom"]["secretKeyRef"] for e in container["env"] if e["name"] == "DIKI_SERVE_TOKEN"]
        assert token == endpoint["authorization"]["credentials"]


@pytest.fixture
def alerts(tmp_path):
    """A folder with the alert rules as Prometheus itself reads them."""
    (tmp_path / "groups.yaml").write_text(yaml.safe_dump(ALERTS))
    return tmp_path


def test_alerts_fire_when_they_should_and_only_then(alerts):
    promtool = tool("promtool", UNTRIED)
    shutil.copy(PROMETHEUS / "rules_test.yaml", alerts)
    subprocess.run([promtool, "check", "rules", "groups.yaml"], cwd=alerts, check=True)
    subprocess.run([promtool, "test", "rules", "rules_test.yaml"], cwd=alerts, check=True)
    tried = (PROMETHEUS / "rules_test.yaml").read_text()
    assert {r["alert"] for g in ALERTS["groups"] for r in g["rules"] if f'"{r["alert"]}"' not in tried} == set()


def test_metrics_keep_to_the_conventions_of_prometheus():
    exposition = generate_latest(observed())
    done = subprocess.run(
        [tool("promtool", UNTRIED), "check", "metrics"], input=exposition, capture_output=True, check=False
    )
    assert done.stdout + done.stderr == b""


@pytest.fixture
def prometheus(alerts):
    """Asks a Prometheus that scrapes a run's and a server's metrics each second: query -> list of series."""
    served = CollectorRegistry(auto_describe=False)
    served.register(Served())
    servers = [start_http_server(0, "127.0.0.1", registry) for registry in (observed(), served)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    addresses = [f"127.0.0.1:{server.server_port}" for server, _ in servers]
    target = {"targets": addresses, "labels": {"ray_io_cluster": "diki"}}
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["groups.yaml"],
        "scrape_configs": [{"job_name": "diki", "static_configs": [target]}],
    }
    (alerts / "prometheus.yaml").write_text(yaml.safe_dump(settings))
    options = ["--config.file=prometheus.yaml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with open(alerts / "log", "w") as log:
        process = subprocess.Popen([tool("prometheus", UNTRIED), *options], cwd=alerts, stdout=log, stderr=log)

    def ask(path, **parameters):
        url = f"http://{address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)["data"]

    def ready():
        try:
            twice = 'count_over_time({__name__=~"diki_up|diki_serve_tasks"}[1m]) >= 2'
            return len(ask("query", query=twice)["result"]) == 3  # the run, and two replicas
        except OSError:
            return False

    try:
        wait_for(ready, (alerts / "log").read_text)
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=20)
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()


def wait_for(condition, explanation, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, explanation()
        time.sleep(0.2)


def test_a_real_prometheus_answers_every_panel_and_raises_alerts_from_a_real_scrape(prometheus):
    def filled(query):
        for name, value in {"Cluster": ".*", "Run": "debug", "SessionName": ".+", "Instance": ".+"}.items():
            query = query.replace(f"${name}", value)
        return query

    answers = {title: prometheus("query", query=filled(query))["result"] for title, query in QUERIES.items()}
    assert {title for title, series in answers.items() if not series and "ray_node" not in QUERIES[title]} == set()
    assert all(
        "run" in series["metric"] for title in answers for series in answers[title] if "ray" not in QUERIES[title]
    )
    firing = {a["labels"]["alertname"] for a in prometheus("alerts")["alerts"] if a["state"] == "firing"}
    assert firing == {"DikiForgetting", "DikiStoreDamaged"}  # and the rest is quiet: see `observed`
