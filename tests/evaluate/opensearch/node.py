"""One node of OpenSearch with its k-NN plugin, from the jars that pom.xml names."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zipfile

VERSION = "2.19.1"
# Jars of the two modules, by the beginning of their names; all others belong to the program.
MODULES = {
    "lang-painless": (
        "org.opensearch.painless.PainlessPlugin",
        ("lang-painless-", "opensearch-scripting-painless-spi-", "antlr4-runtime-", "asm-"),
        ['permission java.lang.RuntimePermission "createClassLoader"', 'permission java.lang.RuntimePermission "getClassLoader"'],
    ),
    "transport-netty4": (
        "org.opensearch.transport.Netty4Plugin",
        ("transport-netty4-client-", "netty-"),
        [
            'permission java.io.FilePermission "/proc/sys/net/core/somaxconn", "read"',
            'permission java.net.SocketPermission "*", "accept,connect"',
            'permission java.lang.RuntimePermission "*", "setContextClassLoader"',
            'permission java.lang.RuntimePermission "getClassLoader"',
            'permission java.util.PropertyPermission "sun.nio.ch.bugLevel", "write"',
        ],
    ),
}
LOG = """status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %m%n
rootLogger.level = info
rootLogger.appenderRef.console.ref = console
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def make_home(jars, home):
    for folder in ("bin", "extensions", "lib", "modules", "plugins/opensearch-knn"):
        (home / folder).mkdir(parents=True)
    for jar in jars.glob("*.jar"):
        module = next((name for name, (_, begins, _) in MODULES.items() if jar.name.startswith(begins)), None)
        target = home / "modules" / module if module else home / "lib"
        target.mkdir(exist_ok=True)
        os.link(jar, target / jar.name) if jars.stat().st_dev == home.stat().st_dev else shutil.copy(jar, target)
    for module, (name, _, permissions) in MODULES.items():
        folder = home / "modules" / module
        lines = [f"name={module}", f"description={module}", f"version={VERSION}", f"opensearch.version={VERSION}"]
        lines += ["java.version=17", f"classname={name}", "extended.plugins=", "has.native.controller=false"]
        (folder / "plugin-descriptor.properties").write_text("\n".join(lines) + "\n")
        (folder / "plugin-security.policy").write_text("grant {\n" + "".join(f"  {p};\n" for p in permissions) + "};\n")
    (archive,) = jars.glob("opensearch-knn-*.zip")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(home / "plugins/opensearch-knn")


class Node:
    """A running node; `request` sends it JSON."""

    def __init__(self, jars):
        self.jars = pathlib.Path(jars)

    def __enter__(self):
        self.folder = tempfile.TemporaryDirectory()
        root = pathlib.Path(self.folder.name)
        home, data = root / "home", root / "node"
        make_home(self.jars, home)
        for folder in ("config", "data", "logs", "tmp"):
            (data / folder).mkdir(parents=True)
        http, transport = free_ports(2)
        settings = {
            "cluster.name": "test", "node.name": "n0", "path.data": data / "data", "path.logs": data / "logs",
            "network.host": "127.0.0.1", "http.port": http, "transport.port": transport, "discovery.type": "single-node",
            "cluster.routing.allocation.disk.threshold_enabled": "false", "indices.breaker.total.use_real_memory": "false",
        }
        (data / "config/opensearch.yml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
        (data / "config/log4j2.properties").write_text(LOG)
        # The program refuses to run as root.
        for path in [root, *root.rglob("*")]:
            if os.getuid() == 0 and not path.is_relative_to(home):
                os.chown(path, 65534, 65534)
            path.chmod(path.stat().st_mode | 0o055 if path.is_dir() else path.stat().st_mode | 0o044)
        flags = ["-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Djava.security.manager=allow"]
        flags += [f"-Djava.io.tmpdir={data}/tmp", "-Dlog4j2.disable.jmx=true", "-Dlog4j.shutdownHookEnabled=false"]
        flags += ["-Dio.netty.allocator.numDirectArenas=0", "-Dio.netty.noUnsafe=true", f"-Dopensearch.path.home={home}"]
        flags += [f"-Dopensearch.path.conf={data}/config", "-Dopensearch.distribution.type=tar"]
        flags += ["-Dopensearch.bundled_jdk=false", "-cp", f"{home}/lib/*"]
        user = {"user": 65534, "group": 65534, "extra_groups": []} if os.getuid() == 0 else {}
        self.log = open(root / "log", "w+")
        command = ["java", *flags, "org.opensearch.bootstrap.OpenSearch"]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=subprocess.STDOUT, cwd=home, **user)
        self.url = f"http://127.0.0.1:{http}"
        for _ in range(600):
            try:
                self.request("GET", "/_cluster/health?wait_for_status=yellow&timeout=1s")
                return self
            except (urllib.error.URLError, ConnectionError):
                if self.process.poll() is not None:
                    break
                time.sleep(0.2)
        self.log.seek(0)
        text = self.log.read()
        self.__exit__()
        raise AssertionError(f"OpenSearch did not start: {text[-3000:]}")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.log.close()
        self.folder.cleanup()

    def request(self, method, path, body=None):
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        kind = "application/x-ndjson" if isinstance(body, bytes) else "application/json"
        request = urllib.request.Request(self.url + path, data, {"content-type": kind}, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
