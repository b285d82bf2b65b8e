"""One broker of Apache Kafka on loopback, from the jars that `tests/run kafka` fetches."""

import pathlib
import socket
import subprocess

LOGGING = pathlib.Path(__file__).with_name("log4j2.xml")
CLUSTER = "4L6g3nShT-eMCtK--X86sw"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def prepared(jars, folder):
    """Formats storage in `folder`; the command that runs the broker, and its address."""
    port, controller = free_port(), free_port()
    properties = folder / "kafka.properties"
    properties.write_text(
        "process.roles=broker,controller\nnode.id=0\n"
        f"listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n"
        f"advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n"
        "controller.listener.names=CONTROLLER\n"
        f"controller.quorum.voters=0@127.0.0.1:{controller}\n"
        f"log.dirs={folder / 'kafka'}\n"
        "offsets.topic.replication.factor=1\noffsets.topic.num.partitions=2\n"
        "transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n"
        "share.coordinator.state.topic.replication.factor=1\ngroup.initial.rebalance.delay.ms=0\n"
    )
    logging = f"-Dlog4j2.configurationFile={LOGGING}"
    java = ["java", "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", logging, "-cp", f"{jars}/*"]
    storage = [*java, "kafka.tools.StorageTool", "format", "--cluster-id", CLUSTER, "--config", properties]
    subprocess.run(storage, check=True, stdout=subprocess.DEVNULL)
    return [*java, "kafka.Kafka", properties], f"127.0.0.1:{port}"
