"""Breaks one thing at a time in a running system, and asserts that the log event, the metric and the
alert that the runbook names come within the time that it promises, and that the alert ends once the
thing is fixed. Everything is real: Apache Kafka, MinIO, workers and a query worker as processes of
their own, Prometheus with the rules of ops/prometheus.

Arguments: the program `bsap`, the folder of Kafka's jars, the program `minio`. In the short form all
times in the rules are divided by SPEED (see `rules`), and the promises with them; with BSAP_OPS_LONG
set, the rules are as they are.
"""

import datetime
import json
import os
import pathlib
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.parse
import urllib.request
import zlib

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/kafka"))
import broker
from broker import free_port

BSAP, JARS, MINIO = sys.argv[1:4]
SPEED = 1 if os.environ.get("BSAP_OPS_LONG") else 10
# What does not shrink with the rules: looks every few seconds, connections that are made again.
SLACK = 30
KEYS = {"MINIO_ROOT_USER": "bsap", "MINIO_ROOT_PASSWORD": "bsap-on-loopback"}
PICTURES = 60


def wait(what, seconds, found):
    """Waits until `found` gives something; how many seconds that took."""
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if found():
            return time.monotonic() - started
        time.sleep(0.25)
    raise AssertionError(f"waited {seconds:.0f} s in vain until {what}")


def get(url):
    with urllib.request.urlopen(url, timeout=5) as answer:
        return answer.read()


def rules():
    """The alert rules, with all of their times divided by SPEED."""
    units = {"s": 1, "m": 60, "h": 3600}

    def shorter(found):
        seconds = int(found[2]) * units[found[3]] / SPEED
        return f"{found[1]}{max(1, round(seconds))}s{found[4]}"

    text = (ROOT / "ops/prometheus/bsap.rules.yml").read_text()
    text = re.sub(r"(for: )(\d+)([smh])()$", shorter, text, flags=re.M)
    text = re.sub(r"(\[)(\d+)([smh])(\])", shorter, text)
    # Seconds that an age or a time is compared with.
    return re.sub(r"> (60|120)\b", lambda found: f"> {int(found[1]) // SPEED}", text)


def promised(alert):
    """Seconds within which the runbook says that an alert fires."""
    page = (ROOT / f"ops/runbook/{alert}.md").read_text()
    count, unit = re.search(r"Fires within (\d+) (minute|hour)", page).groups()
    return int(count) * {"minute": 60, "hour": 3600}[unit]


class Process:
    """A program that is started again when it ends, as an orchestrator does."""

    def __init__(self, fixture, name, command, variables):
        self.log = fixture.folder / f"{name}.log"
        self.metrics = f"127.0.0.1:{free_port()}"
        env = {key: value for key, value in os.environ.items() if not key.startswith("BSAP_")}
        env |= fixture.settings | {"BSAP_LOG__FILE": str(self.log), "BSAP_METRICS__LISTEN": self.metrics}
        self.command, self.env = [BSAP, *command], env | variables
        self.errors = open(self.log.with_suffix(".stderr"), "a")
        self.wanted, self.child = True, None
        self.launch()
        self.keeper = threading.Thread(target=self.keep, daemon=True)
        self.keeper.start()

    def launch(self):
        self.child = subprocess.Popen(self.command, env=self.env, stdout=self.errors, stderr=self.errors)

    def keep(self):
        while self.wanted:
            if self.child.poll() is not None:
                time.sleep(2)
                if self.wanted:
                    self.launch()
            time.sleep(0.2)

    def lines(self, since):
        """Its own whole lines of its log from a time on; its libraries' have no event."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in lines if "event" in line and line["timestamp"] >= since]

    def end(self):
        self.wanted = False
        self.keeper.join()
        self.child.send_signal(signal.SIGCONT)
        self.child.kill()
        self.child.wait()
        self.errors.close()


class Server:
    """A server that can be killed and started again, with what it has stored."""

    def __init__(self, command, log, ready, env=None):
        self.command, self.log, self.ready = command, log, ready
        self.env, self.child = dict(os.environ, **(env or {})), None
        self.start()

    def start(self):
        with open(self.log, "a") as log:
            self.child = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=log)
        try:
            wait(f"{self.command[0]} is ready; see {self.log}", 90, self.is_ready)
        except AssertionError:
            print(self.log.read_text()[-3000:])
            raise

    def is_ready(self):
        try:
            return self.ready()
        except Exception:
            return False

    def kill(self):
        if self.child.poll() is None:
            self.child.kill()
            self.child.wait()


class Fixture:
    def __init__(self, folder):
        self.folder = folder
        self.servers, self.processes, self.number = [], [], 0
        self.flow = None

    def start(self):
        self.kafka()
        self.bucket(free_port())
        pictures = self.folder / "pictures"
        render = [BSAP, "demo", "render", "--out", pictures, "--count", str(PICTURES), "--side", "96"]
        subprocess.run(render, check=True, capture_output=True)
        self.settings = {
            "BSAP_KAFKA__BROKERS": self.brokers,
            "BSAP_SOURCE__ORDERING": "sequence",
            "BSAP_MODEL__CHECKPOINT": str(ROOT / "models/demo"),
            "BSAP_PROMPTS__SETS": "demo",
            "BSAP_FETCH__FILE_ROOTS": str(pictures),
            "BSAP_TABLE__URL": "s3://bsap/catalogue",
            "BSAP_INGEST__COMMIT_MS": "300",
            "BSAP_INGEST__HEARTBEAT_SECONDS": "1",
            "BSAP_SEARCH__DRIFT_INTERVAL_SECONDS": "1",
            "BSAP_LOG__FORMAT": "json",
            **self.store,
        }
        self.producer = Producer({"bootstrap.servers": self.brokers, "log_level": 0})
        self.worker = self.started("worker", ["ingest"], LOSE_DEVICE_WHILE=str(self.folder / "worker-lost"))
        self.address = f"127.0.0.1:{free_port()}"
        lost = str(self.folder / "query-lost")
        self.query = self.started("query", ["serve", "--listen", self.address], LOSE_DEVICE_WHILE=lost)
        for picture in range(PICTURES):
            self.upsert(f"{picture:06}.jpg")
        self.begin_flow()
        self.prometheus(free_port())

    def begin_flow(self):
        self.flowing = True
        self.flow = threading.Thread(target=self.keep_flowing, daemon=True)
        self.flow.start()

    def end_flow(self):
        self.flowing = False
        if self.flow:
            self.flow.join()

    def kafka(self):
        command, self.brokers = broker.prepared(JARS, self.folder)
        admin = AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})
        ready = lambda: admin.list_topics(timeout=1).brokers
        self.broker = Server(command, self.folder / "kafka.log", ready)
        self.servers.append(self.broker)
        topics = ["images", "images.dead-letters", "disk", "disk.dead-letters"]
        for made in admin.create_topics([NewTopic(topic, 2, 1) for topic in topics]).values():
            made.result(30)

    def bucket(self, port):
        address = f"http://127.0.0.1:{port}"
        command = [MINIO, "server", "--quiet", "--address", f"127.0.0.1:{port}", self.folder / "minio"]
        ready = lambda: get(f"{address}/minio/health/live") is not None
        self.minio = Server(command, self.folder / "minio.log", ready, KEYS | {"MINIO_BROWSER": "off"})
        self.servers.append(self.minio)
        user = ":".join(KEYS.values())
        sign = ["curl", "-sf", "--aws-sigv4", "aws:amz:us-east-1:s3", "--user", user, "-X", "PUT"]
        subprocess.run([*sign, "--retry", "20", "--retry-all-errors", f"{address}/bsap"], check=True)
        options = {"endpoint": address, "allow_http": "true", "region": "us-east-1"}
        options |= {"access_key_id": KEYS["MINIO_ROOT_USER"], "secret_access_key": KEYS["MINIO_ROOT_PASSWORD"]}
        self.store = {f"BSAP_TABLE__STORE_OPTIONS__AWS_{key.upper()}": value for key, value in options.items()}

    def prometheus(self, port):
        (self.folder / "rules.yml").write_text(rules())
        (self.folder / "prometheus.yml").write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n"
            "rule_files: [rules.yml]\n"
            "scrape_configs: [{job_name: bsap, file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]}]\n"
        )
        self.monitored()
        data = f"--storage.tsdb.path={self.folder / 'prometheus'}"
        config = f"--config.file={self.folder / 'prometheus.yml'}"
        command = ["prometheus", config, data, f"--web.listen-address=127.0.0.1:{port}"]
        self.monitor = f"http://127.0.0.1:{port}"
        ready = lambda: get(f"{self.monitor}/-/ready") is not None
        self.servers.append(Server(command, self.folder / "prometheus.log", ready))

    def monitored(self):
        targets = [process.metrics for process in self.processes]
        new = self.folder / "targets.new"
        new.write_text(json.dumps([{"targets": targets}]))
        new.rename(self.folder / "targets.json")

    def started(self, name, command, **variables):
        process = Process(self, name, command, variables)
        self.processes.append(process)
        self.monitored()
        return process

    def ended(self, process):
        self.processes.remove(process)
        self.monitored()
        process.end()

    def send(self, value, topic="images"):
        try:
            self.producer.produce(topic, value if isinstance(value, bytes) else json.dumps(value))
            self.producer.poll(0)
        except BufferError:
            pass

    def upsert(self, name, topic="images", ahead=0):
        self.number += 1
        at = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=ahead)
        uri = (self.folder / "pictures" / name).as_uri()
        event = {"image_id": name, "uri": uri, "sequence": self.number, "event_time": at.isoformat()}
        self.send(event, topic)

    def search(self, text):
        """Searches; the status of the answer."""
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}/v1/search", json.dumps({"text": text}).encode(), headers)
        try:
            return urllib.request.urlopen(request, timeout=10).status
        except urllib.error.HTTPError as refused:
            return refused.code

    def keep_flowing(self):
        """Images that change, all the time."""
        round_number = 0
        while self.flowing:
            for topic in ("images", "disk"):
                self.upsert(f"{round_number % PICTURES:06}.jpg", topic)
            round_number += 1
            time.sleep(0.4)

    def alerts(self):
        found = json.loads(get(f"{self.monitor}/api/v1/alerts"))["data"]["alerts"]
        return [alert["labels"] for alert in found if alert["state"] == "firing"]

    def fires(self, alert, process):
        of = lambda labels: labels.get("instance", process.metrics) == process.metrics
        return any(labels["alertname"] == alert and of(labels) for labels in self.alerts())

    def value(self, expression):
        query = urllib.parse.urlencode({"query": expression})
        return json.loads(get(f"{self.monitor}/api/v1/query?{query}"))["data"]["result"]

    def close(self):
        self.end_flow()
        for process in list(self.processes):
            process.end()
        for server in self.servers:
            server.kill()


def blank(side=96):
    """A white picture."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + b"\xff" * 3 * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(row * side)) + chunk(b"IEND", b"")


class Faults(unittest.TestCase):
    fixture, rows = None, []

    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        fixture = cls.fixture = Fixture(pathlib.Path(folder.name))
        # Also where it does not start.
        cls.addClassCleanup(fixture.close)
        fixture.start()
        stored = lambda: any(line["event"] == "commit.succeeded" for line in fixture.worker.lines(""))
        wait("the worker stores", 90, stored)
        wait("the query worker is ready", 90, lambda: fixture.value("bsap_snapshot_ready == 1"))
        images = f"bsap_snapshot_images >= {PICTURES}"
        wait("all pictures are served", 90, lambda: fixture.value(images))

    @classmethod
    def tearDownClass(cls):
        print(f"\nrules {'as they are' if SPEED == 1 else f'with their times divided by {SPEED}'}; seconds", file=sys.stderr)
        head = ("fault", "log event", "metric", "alert", "promised", "to fire", "to clear")
        rows = [tuple(map(str, row)) for row in [head, *cls.rows]]
        widths = [max(map(len, column)) for column in zip(*rows)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)), file=sys.stderr)

    def prove(self, fault, process, event, metric, alert, broken, fixed):
        """`event` is a name, what a line of it must be like, and how that is shown."""
        fixture = self.fixture
        wait(f"{alert} is quiet before", 90, lambda: not fixture.fires(alert, process))
        since = datetime.datetime.now(datetime.timezone.utc).isoformat()
        name, like, shown = event
        within = promised(alert) / SPEED + (SLACK if SPEED > 1 else 0)
        began = time.monotonic()
        broken()
        try:
            logged = lambda: any(line["event"] == name and like(line) for line in process.lines(since))
            wait(f"{metric} holds", within, lambda: fixture.value(metric))
            wait(f"{alert} fires", within, lambda: fixture.fires(alert, process))
            fired = time.monotonic() - began
            # How long a store is tried before the log tells does not shrink with the rules.
            wait(f"{process.log.name} has {shown}", promised(alert), logged)
        finally:
            fixed()
        cleared = wait(f"{alert} ends", within + 60, lambda: not fixture.fires(alert, process))
        self.assertLessEqual(fired, promised(alert))
        self.rows.append((fault, shown, metric, alert, promised(alert), f"{fired:.0f}", f"{cleared:.0f}"))

    def ask(self, question, process):
        """What a query over logs answers from those of a process."""
        text = process.log.read_text()
        whole = text[: text.rfind("\n") + 1]
        # A container's log has lines of standard output and error too.
        whole = "serving on http://127.0.0.1:8080/\n7\n" + whole
        command = ["jq", "-nR", "-f", ROOT / f"ops/queries/{question}.jq"]
        return json.loads(subprocess.run(command, input=whole, check=True, capture_output=True, text=True).stdout)

    def test_0_logs_answer_the_four_questions(self):
        fixture = self.fixture
        fixture.send(b"this is no event")
        self.assertEqual(fixture.search("a red mug"), 200)
        dead_lettered = lambda: self.ask("losing", fixture.worker)["by_code"]
        wait("a message is dead-lettered", 30, dead_lettered)
        alive = self.ask("alive", fixture.worker)
        self.assertEqual((alive["starts"], alive["ended"], alive["fatal"]), (1, False, None))
        self.assertIn(alive["last"]["event"], ("heartbeat", "start"))
        keeping_up = self.ask("keeping-up", fixture.worker)
        self.assertGreaterEqual(keeping_up["ok"], PICTURES)
        self.assertGreater(keeping_up["commit_ms"], 0)
        lag = lambda: self.ask("keeping-up", fixture.worker)["lag"] != "unknown"
        wait("the lag is known", 30, lag)
        losing = self.ask("losing", fixture.worker)
        self.assertEqual((losing["lost"], sum(losing["by_code"].values())), (0, 1))
        good = self.ask("how-good", fixture.query)
        self.assertEqual((good["searches"], good["failed"]), (1, 0))
        self.assertLessEqual(good["moved_share"], 1)
        self.assertEqual(good["balance"]["calibrated"], False)

    def test_1_broker_gone(self):
        fixture = self.fixture
        event = ("source.error", lambda line: True, "source.error")
        up = f'bsap_kafka_brokers_up{{instance="{fixture.worker.metrics}"}} == 0'
        self.prove("broker gone", fixture.worker, event, up, "BsapKafkaUnreachable", fixture.broker.kill, fixture.broker.start)

    def test_2_bucket_gone(self):
        fixture = self.fixture
        event = ("retry", lambda line: line["stage"] == "table", "retry: stage table")
        lag = f'bsap_lag_messages{{instance="{fixture.worker.metrics}"}} > 0'
        self.prove("bucket gone", fixture.worker, event, lag, "BsapNotStoring", fixture.minio.kill, fixture.minio.start)

    def test_3_bucket_gone_for_queries(self):
        fixture = self.fixture
        event = ("table.refresh_failed", lambda line: True, "table.refresh_failed")
        old = f"time() - bsap_last_table_refresh_time_seconds > {60 / SPEED}"
        self.prove("bucket gone", fixture.query, event, old, "BsapAnswersStale", fixture.minio.kill, fixture.minio.start)

    def test_4_disk_full(self):
        fixture, disk = self.fixture, self.fixture.folder / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk]
        if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
            self.skipTest("a small file system cannot be mounted here")
        overrides = {"BSAP_SOURCE__TOPIC": "disk", "BSAP_SOURCE__GROUP": "disk", "BSAP_DEAD_LETTER__TOPIC": "disk.dead-letters"}
        worker = fixture.started("disk", ["ingest"], BSAP_TABLE__URL=str(disk / "catalogue"), **overrides)
        try:
            wait("it stores", 90, lambda: any(line["event"] == "commit.succeeded" for line in worker.lines("")))
            event = ("retry", lambda line: "space" in line["error"], "retry: no space")
            lag = f'bsap_lag_messages{{instance="{worker.metrics}"}} > 0'
            filling = lambda: subprocess.run(["dd", "if=/dev/zero", f"of={disk / 'full'}", "bs=64k"], stderr=subprocess.DEVNULL)
            self.prove("disk full", worker, event, lag, "BsapNotStoring", filling, (disk / "full").unlink)
        finally:
            fixture.ended(worker)
            subprocess.run(["umount", "-l", disk], check=True)

    def test_5_bad_deploy(self):
        fixture, new = self.fixture, []
        wrong = str(ROOT / "tests/fixtures/clip-gelu")
        deploy = lambda: new.append(fixture.started("new", ["ingest"], BSAP_MODEL__CHECKPOINT=wrong))
        since = datetime.datetime.now(datetime.timezone.utc).isoformat()
        began = time.monotonic()
        deploy()
        process, alert = new[0], "BsapRestarting"
        within = promised(alert) / SPEED + SLACK
        try:
            fatal = lambda: any(line["event"] == "fatal" and "fingerprint" in line["error"] for line in process.lines(since))
            wait("the log says why it ends", within, fatal)
            restarts = f'changes(bsap_start_time_seconds{{instance="{process.metrics}"}}[15m]) > 2'
            wait("restarts are counted", within, lambda: fixture.value(restarts))
            wait(f"{alert} fires", within, lambda: fixture.fires(alert, process))
            fired = time.monotonic() - began
        finally:
            fixture.ended(process)
        cleared = wait(f"{alert} ends", within + 60, lambda: not fixture.fires(alert, process))
        self.assertLessEqual(fired, promised(alert))
        self.rows.append(("bad deploy", "fatal: model fingerprint", "bsap_start_time_seconds", alert, promised(alert), f"{fired:.0f}", f"{cleared:.0f}"))

    def test_6_poison_flood(self):
        fixture, flooding = self.fixture, threading.Event()

        def flood():
            while not flooding.wait(0.05):
                fixture.send(b"this is no event")

        thread = threading.Thread(target=flood, daemon=True)
        event = ("dead_letter", lambda line: line["stage"] == "decode_event", "dead_letter: decode_event")
        dead_letters = f'rate(bsap_dead_letters_total{{instance="{fixture.worker.metrics}"}}[10s]) > 1'
        self.prove("poison flood", fixture.worker, event, dead_letters, "BsapDeadLetters", thread.start, flooding.set)
        suppressed = lambda: any(line["event"] == "log.suppressed" and line["suppressed_event"] == "dead_letter" for line in fixture.worker.lines(""))
        wait("the log says what was suppressed", 20, suppressed)

    def test_7_stuck_worker(self):
        fixture = self.fixture
        alert, process = "BsapDown", fixture.worker
        wait("it is quiet before", 60, lambda: not fixture.fires(alert, process))
        within = promised(alert) / SPEED + SLACK
        stopped = datetime.datetime.now(datetime.timezone.utc)
        began = time.monotonic()
        process.child.send_signal(signal.SIGSTOP)
        try:
            wait(f"{alert} fires", within, lambda: fixture.fires(alert, process))
            fired = time.monotonic() - began
            silent = (stopped + datetime.timedelta(seconds=1)).isoformat()
            self.assertEqual(process.lines(silent), [], "it says nothing")
            self.assertTrue(fixture.value(f'up{{instance="{process.metrics}"}} == 0'))
        finally:
            process.child.send_signal(signal.SIGCONT)
            resumed = datetime.datetime.now(datetime.timezone.utc).isoformat()
        cleared = wait(f"{alert} ends", within + 60, lambda: not fixture.fires(alert, process))
        wait("it says that it is alive", 30, lambda: any(line["event"] == "heartbeat" for line in process.lines(resumed)))
        self.assertLessEqual(fired, promised(alert))
        self.rows.append(("stuck worker", "no heartbeat", "up == 0", alert, promised(alert), f"{fired:.0f}", f"{cleared:.0f}"))

    def test_8_clock_skew(self):
        fixture, ending = self.fixture, threading.Event()

        def ahead():
            while not ending.wait(0.2):
                fixture.upsert("000001.jpg", ahead=45)

        thread = threading.Thread(target=ahead, daemon=True)
        event = ("commit.succeeded", lambda line: line.get("event_age_ms", 0) < 0, "commit.succeeded: event_age_ms below 0")
        early = f'rate(bsap_event_age_seconds_bucket{{le="0.001", instance="{fixture.worker.metrics}"}}[10s]) > 0'
        # What flows has the right time: a commit's age is that of its oldest event.
        fixture.end_flow()
        try:
            self.prove("clock skew", fixture.worker, event, early, "BsapClockSkew", thread.start, ending.set)
        finally:
            fixture.begin_flow()

    def test_9_over_correction_drift(self):
        fixture, folder = self.fixture, self.fixture.folder
        truth = map(json.loads, (folder / "pictures/truth.jsonl").read_text().splitlines())
        judged = {caption["captions"][0]: caption["file"] for caption in truth}
        queries = folder / "judged.jsonl"
        queries.write_text("".join(json.dumps({"text": t, "relevant": [f]}) + "\n" for t, f in judged.items()))
        command = [BSAP, "evaluate", "--queries", queries, "--calibrate", "live", "--store"]
        env = dict(os.environ, **fixture.settings)

        def calibrate():
            subprocess.run(command, env=env, check=True, capture_output=True)

        calibrate()
        calibrated = lambda: any(line["event"] == "balance.drift" and line["calibrated"] for line in fixture.query.lines(""))
        wait("the query worker knows what was usual", 60, calibrated)

        def blanks():
            """A producer sends blank pictures."""
            for i in range(3 * PICTURES):
                name = f"blank-{i}.png"
                (folder / "pictures" / name).write_bytes(blank())
                fixture.upsert(name)

        far = lambda line: abs(line["drift"]) > 0.5 or abs(line["std"] / line["std_baseline"] - 1) > 0.25
        event = ("balance.drift", lambda line: line["calibrated"] and far(line), "balance.drift: drift")
        metric = "abs(bsap_balance_drift) > 0.5 or abs(bsap_balance_std_ratio - 1) > 0.25"
        self.prove("over-correction drift", fixture.query, event, metric, "BsapStatisticsDrift", blanks, calibrate)

    def test_a_gpu_lost_by_a_worker(self):
        fixture, lost = self.fixture, self.fixture.folder / "worker-lost"
        event = ("fatal", lambda line: "the device is lost" in line["error"], "fatal: the model failed")
        # Started again it ends at once, as long as the device stays lost: too soon for a monitor to see it.
        down = f'up{{instance="{fixture.worker.metrics}"}} == 0'
        self.prove("GPU lost, worker", fixture.worker, event, down, "BsapDown", lost.touch, lost.unlink)
        since = datetime.datetime.now(datetime.timezone.utc).isoformat()
        stores = lambda: any(line["event"] == "commit.succeeded" for line in fixture.worker.lines(since))
        wait("it stores again", 60, stores)

    def test_b_gpu_lost_by_a_query_worker(self):
        fixture, lost, ending, answers = self.fixture, self.fixture.folder / "query-lost", threading.Event(), set()

        def ask():
            number = 0
            while not ending.wait(0.3):
                # Those that were asked before are remembered.
                answers.add(fixture.search(f"a mug number {number}"))
                number += 1

        def lose():
            lost.touch()
            threading.Thread(target=ask, daemon=True).start()

        event = ("model.failed", lambda line: line["consecutive_failures"] > 2, "model.failed: consecutive_failures")
        failed = f'increase(bsap_log_events_total{{event="model.failed", instance="{fixture.query.metrics}"}}[10s]) > 0'
        self.prove("GPU lost, query worker", fixture.query, event, failed, "BsapModelFailing", lose, lost.unlink)
        ending.set()
        self.assertEqual(answers, {200, 500})
        self.assertEqual(fixture.search("a mug after all"), 200)


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[4:]], verbosity=2)
