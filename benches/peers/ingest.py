"""From events in Kafka to stored rows: `bsap ingest` beside a Python pipeline as one would write it.

    just peers ingest                    CLIP ViT-B/32 with random weights
    just peers ingest --model demo       the small CLIP that comes with bsap

Both consume the same topic of a real Apache Kafka, with the same pictures and the same checkpoint, in
turn, in one run. The Python side is transformers on PyTorch with Pillow, confluent-kafka and deltalake:
batches of 32, the next one decoded by threads while the model computes, offsets committed after the
rows. It keeps what a plain index keeps, without order, deletes, retries, dead letters or fencing.

A run's clock starts when its first picture has been embedded (joining a group and loading a model are
not what is measured) and stops when the last row is committed.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.parse

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/parity"), str(ROOT / "tests/kafka")]
import broker

BATCH = 32
PROMPTS = "demo"


class Kafka:
    def __init__(self, jars, folder):
        command, self.address = broker.prepared(jars, folder)
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def fill(self, topic, events):
        from confluent_kafka import Producer
        from confluent_kafka.admin import AdminClient, NewTopic

        admin = AdminClient({"bootstrap.servers": self.address})
        deadline = time.monotonic() + 60
        while True:
            try:
                made = admin.create_topics([NewTopic(t, 2, 1) for t in (topic, f"{topic}.dead-letters")], operation_timeout=10)
                for future in made.values():
                    future.result()
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        producer = Producer({"bootstrap.servers": self.address, "enable.idempotence": True})
        for event in events:
            producer.produce(topic, json.dumps(event), key=event["image_id"])
        producer.flush()

    def end(self):
        self.process.terminate()
        self.process.wait()


class Python:
    """The pipeline that is compared with."""

    def __init__(self, checkpoint, prompts):
        import torch
        from transformers import AutoProcessor, CLIPModel

        torch.set_num_threads(os.cpu_count())
        self.torch = torch
        self.model = CLIPModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(checkpoint)
        with torch.inference_mode():
            tokens = self.processor(text=prompts, padding=True, truncation=True, return_tensors="pt")
            texts = self.model.get_text_features(**tokens).pooler_output
            self.prompts = texts / texts.norm(dim=-1, keepdim=True)
        self.threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def load(self, message):
        from PIL import Image

        event = json.loads(message.value())
        path = urllib.parse.unquote(urllib.parse.urlparse(event["uri"]).path)
        with Image.open(path) as picture:
            pixels = self.processor.image_processor(picture.convert("RGB"), return_tensors="pt")
        return event, pixels["pixel_values"]

    def run(self, address, topic, table, count):
        """Pictures a second."""
        import pyarrow as pa
        from confluent_kafka import Consumer, TopicPartition
        from deltalake import write_deltalake

        torch = self.torch
        settings = {"bootstrap.servers": address, "group.id": f"python-{time.time()}"}
        consumer = Consumer({**settings, "auto.offset.reset": "earliest", "enable.auto.commit": False})
        consumer.subscribe([topic])
        stored, first = 0, None

        def prefetch():
            messages = consumer.consume(BATCH, 0.5)
            return messages, [self.threads.submit(self.load, message) for message in messages]

        pending = prefetch()
        while stored < count:
            (messages, futures), pending = pending, prefetch()
            if not futures:
                continue
            events, pixels = zip(*(future.result() for future in futures))
            with torch.inference_mode():
                images = self.model.get_image_features(pixel_values=torch.cat(pixels)).pooler_output
                images = images / images.norm(dim=-1, keepdim=True)
                scores = images @ self.prompts.T
                logits = scores * self.model.logit_scale.exp()
                columns = {
                    "mean": scores.mean(1), "std": scores.std(1, unbiased=False), "min": scores.amin(1),
                    "max": scores.amax(1), "lse": logits.logsumexp(1), "topk_mean": scores.topk(8).values.mean(1),
                }
            rows = {
                "image_id": [event["image_id"] for event in events],
                "uri": [event["uri"] for event in events],
                "embedding": pa.array(list(images.half().numpy()), type=pa.list_(pa.float16())).cast(pa.list_(pa.float32())),
                **{name: column.numpy() for name, column in columns.items()},
            }
            write_deltalake(table, pa.table(rows), mode="append")
            ends = {(m.topic(), m.partition()): m.offset() + 1 for m in messages}
            consumer.commit(offsets=[TopicPartition(*place, end) for place, end in ends.items()], asynchronous=False)
            stored += len(events)
            if first is None:
                first, before = time.monotonic(), stored
        seconds = time.monotonic() - first
        consumer.close()
        return (stored - before) / seconds


def bsap(program, checkpoint, address, topic, folder, pictures, count):
    """Pictures a second, from the worker's own log."""
    log = folder / "worker.log"
    settings = {
        "KAFKA__BROKERS": address, "SOURCE__TOPIC": topic, "SOURCE__GROUP": topic, "SOURCE__ORDERING": "sequence",
        "DEAD_LETTER__TOPIC": f"{topic}.dead-letters", "FETCH__FILE_ROOTS": str(pictures),
        "MODEL__CHECKPOINT": str(checkpoint), "PROMPTS__SETS": PROMPTS, "TABLE__URL": str(folder / "catalogue"),
        "LOG__FORMAT": "json", "LOG__FILE": str(log),
    }
    env = dict(os.environ, **{f"BSAP_{key}": value for key, value in settings.items()})
    worker = subprocess.Popen([program, "ingest"], env=env, stdout=subprocess.DEVNULL)
    try:
        while True:
            time.sleep(0.2)
            if worker.poll() is not None:
                sys.exit(f"the worker ended: {log.read_text()[-2000:]}")
            lines = (json.loads(line) for line in (log.read_text().splitlines() if log.exists() else []))
            commits = [line for line in lines if line.get("event") == "commit.succeeded"]
            if sum(batch["succeeded"] for batch in commits) >= count:
                break
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait()
    moments = [moment(batch["timestamp"]) for batch in commits]
    after_first = sum(batch["succeeded"] for batch in commits[1:])
    waited = sum(batch["model_wait_ms"] for batch in commits[1:])
    seconds = moments[-1] - moments[0]
    return after_first / seconds, waited / 1e3 / seconds


def moment(text):
    import datetime

    return datetime.datetime.fromisoformat(re.sub(r"Z$", "+00:00", text)).timestamp()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["clip-b32", "demo"], default="clip-b32")
    parser.add_argument("--count", type=int, default=640, help="pictures a run")
    parser.add_argument("--side", type=int, default=640, help="width and height of a picture in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bsap", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--kafka", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint = ROOT / "models/demo"
    if args.model == "clip-b32":
        import parity

        checkpoint = args.work / "clip-b32"
        if not (checkpoint / "model.safetensors").exists():
            parity.MODELS["clip-b32"](checkpoint)
    listed = subprocess.run([args.bsap, "prompts", "show", PROMPTS], check=True, capture_output=True, text=True)
    prompts = tomllib.loads(listed.stdout)["texts"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        pictures = folder / "pictures"
        draw = ["demo", "render", "--count", str(args.count), "--side", str(args.side), "--out", str(pictures)]
        subprocess.run([args.bsap, *draw], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        files = sorted(file for file in pictures.iterdir() if file.suffix == ".jpg")
        events = [{"image_id": file.stem, "sequence": 1, "uri": file.as_uri()} for file in files]
        kafka = Kafka(args.kafka, folder)
        try:
            python = Python(checkpoint, prompts)
            rates = {"bsap": [], "Python": []}
            for number in range(args.rounds):
                topic = f"images-{number}"
                kafka.fill(topic, events)
                place = folder / str(number)
                place.mkdir()
                rate, waited = bsap(args.bsap, checkpoint, kafka.address, topic, place, pictures, len(files))
                rates["bsap"].append(rate)
                rates["Python"].append(python.run(kafka.address, topic, str(place / "delta"), len(files)))
                print(
                    f"round {number + 1}: bsap {rate:.1f} pictures/s (its model waited {waited:.0%} of the time), "
                    f"Python {rates['Python'][-1]:.1f}", flush=True,
                )
        finally:
            kafka.end()
    ratios = [ours / theirs for ours, theirs in zip(rates["bsap"], rates["Python"])]
    middle = {side: statistics.median(values) for side, values in rates.items()}
    print(f"{args.model}, {len(files)} JPEGs of {args.side}×{args.side}, {args.rounds} rounds, {os.cpu_count()} cores")
    print(f"bsap   {middle['bsap']:8.1f} pictures/s")
    print(f"Python {middle['Python']:8.1f} pictures/s")
    print(f"ratio  {statistics.median(ratios):8.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
