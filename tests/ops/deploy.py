"""What deploy/ and ops/ hold is whole: charts render to valid objects, configurations load, rules and
dashboards name only metrics that there are. Arguments: the program `bsap`, and `helm`.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import kubernetes_validate
import yaml

BSAP, HELM = sys.argv[1:3]
CHART = "deploy/helm/bsap"
# Objects of other programs, whose schemas Kubernetes does not have.
FOREIGN = {"ScaledObject", "PodMonitor"}
EVERYTHING = [
    "--set", "worker.gpu=1",
    "--set", "compact.schedule=17 * * * *",
    "--set", "prometheusOperator=true",
    "--set", "secretName=bsap-secrets",
    "--set", "modelClaim=models",
    "--set", "worker.keda.authentication=kafka",
]
NOTHING = [
    "--set", "worker.keda.enabled=false",
    "--set", "query.hpa.enabled=false",
    "--set", "podDisruptionBudget=false",
    "--set", "networkPolicy.enabled=false",
]


def helm(*arguments):
    return subprocess.run([HELM, *arguments], check=True, capture_output=True, text=True).stdout


def rendered(values):
    return [one for one in yaml.safe_load_all(helm("template", "shop", CHART, *values)) if one]


def metrics():
    page = pathlib.Path("ops/metrics.md").read_text()
    return dict(re.findall(r"^\| `(bsap_\w+)` \| (\w+) ", page, re.M))


def named(expression):
    """Metrics that an expression names, without the suffixes of histograms."""
    known = metrics()
    for name in re.findall(r"\bbsap_\w+", expression):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        yield base if known.get(base) == "histogram" else name


class Deploy(unittest.TestCase):
    def test_the_chart_lints(self):
        self.assertIn("0 chart(s) failed", helm("lint", "--strict", CHART))

    def test_what_the_chart_renders_is_valid_kubernetes(self):
        for values in ([], EVERYTHING, NOTHING):
            kinds = set()
            for one in rendered(values):
                kinds.add(one["kind"])
                if one["kind"] not in FOREIGN:
                    kubernetes_validate.validate(one, "1.30", strict=True)
            self.assertLessEqual({"ConfigMap", "Deployment", "Service", "ServiceAccount"}, kinds)
            wanted = {"ScaledObject", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"}
            self.assertEqual(wanted & kinds, set() if values is NOTHING else wanted)
        self.assertLessEqual({"CronJob", "PodMonitor"}, {one["kind"] for one in rendered(EVERYTHING)})

    def test_pods_are_not_root_and_are_probed(self):
        for one in rendered(EVERYTHING):
            if one["kind"] != "Deployment":
                continue
            pod = one["spec"]["template"]["spec"]
            self.assertTrue(pod["securityContext"]["runAsNonRoot"])
            container = pod["containers"][0]
            self.assertTrue(container["securityContext"]["readOnlyRootFilesystem"])
            ports = {port["name"] for port in container["ports"]}
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                self.assertIn(container[probe]["httpGet"]["port"], ports)
            if one["metadata"]["name"].endswith("worker"):
                self.assertEqual(container["resources"]["limits"]["nvidia.com/gpu"], 1)

    def test_query_workers_are_open_only_where_that_is_asked_for(self):
        for values, opened in ([], False), (["--set", "query.allowUnauthenticated=true"], True):
            query = next(one for one in rendered(values)
                         if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("query"))
            names = {one["name"] for one in query["spec"]["template"]["spec"]["containers"][0]["env"]}
            self.assertEqual("BSAP_HTTP__ALLOW_UNAUTHENTICATED" in names, opened)
        key = ["--set", "config.http.keys[0].name=shop,config.http.keys[0].scopes={search}",
               "--set", "config.http.keys[0].hash=sha256:" + 64 * "0"]
        config = next(one for one in rendered(key) if one["kind"] == "ConfigMap")
        self.assertIn('name = "shop"', self.load(config["data"]["bsap.toml"]))

    def test_query_workers_may_ask_the_workers(self):
        objects = rendered([])
        query = next(one for one in objects if one["kind"] == "Deployment" and one["metadata"]["name"].endswith("query"))
        env = {one["name"]: one["value"] for one in query["spec"]["template"]["spec"]["containers"][0]["env"]}
        host, port = re.fullmatch(r"http://([\w-]+):(\d+)", env["BSAP_HTTP__WORKER_METRICS_URLS"]).groups()
        service = next(one for one in objects if one["kind"] == "Service" and one["metadata"]["name"] == host)
        self.assertEqual((service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"]), ("None", int(port)))
        worker = next(one for one in objects if one["kind"] == "Deployment" and one["metadata"]["name"] == host)
        labels = worker["spec"]["template"]["metadata"]["labels"]
        self.assertLessEqual(service["spec"]["selector"].items(), labels.items())
        policy = next(one for one in objects if one["kind"] == "NetworkPolicy" and one["metadata"]["name"] == host)
        allowed = [source for rule in policy["spec"]["ingress"] for source in rule["from"]]
        labels = query["spec"]["template"]["metadata"]["labels"]
        reached = [one["podSelector"]["matchLabels"].items() <= labels.items() for one in allowed if "podSelector" in one]
        self.assertIn(True, reached)

    def test_the_charts_configuration_loads(self):
        for one in rendered(EVERYTHING):
            if one["kind"] == "ConfigMap":
                shown = self.load(one["data"]["bsap.toml"])
                self.assertIn('listen = "0.0.0.0:9464"', shown)
                self.assertIn("interval_seconds = 0", shown)

    def test_numbers_of_a_values_file_load(self):
        with tempfile.TemporaryDirectory() as folder:
            values = pathlib.Path(folder) / "values.yaml"
            values.write_text("config: {search: {memory_mib: 4096}, fetch: {max_bytes: 33554432}, ingest: {max_in_flight_messages: 256}}")
            config = next(one for one in rendered(["-f", values]) if one["kind"] == "ConfigMap")
        shown = self.load(config["data"]["bsap.toml"])
        for line in ("memory_mib = 4096", "max_bytes = 33554432", "max_in_flight_messages = 256"):
            self.assertIn(f"\n{line}\n", shown)

    def load(self, text):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "bsap.toml"
            file.write_text(text)
            shown = subprocess.run([BSAP, "--config", file, "config", "show"], capture_output=True, text=True)
        self.assertEqual(shown.returncode, 0, shown.stderr)
        return shown.stdout

    def test_compose_mounts_what_there_is(self):
        folder = pathlib.Path("deploy/compose")
        services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
        self.assertLessEqual({"kafka", "minio", "worker", "query", "prometheus", "grafana"}, set(services))
        volumes = {one for service in services.values() for one in service.get("volumes", [])}
        mounted = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", one).split(":")[0] for one in volumes]
        for place in mounted:
            if place.startswith("."):
                self.assertTrue((folder / place).exists(), place)

    def test_rules_name_metrics_that_there_are_and_have_pages(self):
        rules = yaml.safe_load(pathlib.Path("ops/prometheus/bsap.rules.yml").read_text())
        known = metrics()
        alerts = [rule for group in rules["groups"] for rule in group["rules"]]
        for alert in alerts:
            for name in named(alert["expr"]):
                self.assertIn(name, known, alert["alert"])
            page = pathlib.Path(alert["annotations"]["runbook"]).read_text()
            self.assertIn(alert["expr"], page, "the page shows the rule as it is")
            for event in re.findall(r'event="([^"]+)"', alert["expr"]):
                self.assertIn(f"| `{event}` |", pathlib.Path("ops/log-events.md").read_text())
        pages = {page.stem for page in pathlib.Path("ops/runbook").glob("Bsap*.md")}
        self.assertEqual(pages, {alert["alert"] for alert in alerts})

    def test_runbooks_name_events_that_there_are(self):
        events = set(re.findall(r"^\| `([\w.]+)` \|", pathlib.Path("ops/log-events.md").read_text(), re.M))
        dotted = {name for name in events if "." in name}
        for page in pathlib.Path("ops/runbook").glob("Bsap*.md"):
            prefixes = {name.split(".")[0] for name in dotted}
            for name in re.findall(r"`([a-z]+\.[a-z_]+)`", page.read_text()):
                if name.split(".")[0] in prefixes - {"search", "source", "log", "http", "metrics", "table", "model", "maintenance"}:
                    self.assertIn(name, events, page.name)

    def test_dashboards_name_metrics_that_there_are(self):
        known = metrics()
        for file in pathlib.Path("ops/grafana").glob("*.json"):
            board = json.loads(file.read_text())
            expressions = [t["expr"] for panel in board["panels"] for t in panel.get("targets", [])]
            self.assertGreater(len(expressions), 8)
            for expression in expressions:
                for name in named(expression):
                    self.assertIn(name, known, file.name)

    def test_prometheus_agrees(self):
        run = lambda *command: subprocess.run(command, check=True, capture_output=True, cwd="ops/prometheus")
        run("promtool", "check", "rules", "bsap.rules.yml")
        run("promtool", "test", "rules", "bsap.rules.test.yml")
        text = pathlib.Path("deploy/compose/prometheus.yml").read_text()
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "prometheus.yml"
            file.write_text(text)
            rules = pathlib.Path("ops/prometheus/bsap.rules.yml").read_text()
            (file.parent / "bsap.rules.yml").write_text(rules)
            run("promtool", "check", "config", str(file))

    def test_every_alert_is_tested(self):
        rules = pathlib.Path("ops/prometheus/bsap.rules.yml").read_text()
        tests = pathlib.Path("ops/prometheus/bsap.rules.test.yml").read_text()
        for alert in re.findall(r"alert: (\w+)", rules):
            self.assertIn(f"{alert} fires", tests)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
