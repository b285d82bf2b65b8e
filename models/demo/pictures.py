"""Does balancing help searches by picture? Asks a running demo for what is like each of some images, plain
and balanced, and counts the results that show the same kind in the same colour, of those that there are
(capped recall@10).

    bsap demo --images 1000 &
    python3 models/demo/pictures.py http://127.0.0.1:8080
"""

import json
import random
import statistics
import sys
import urllib.request

K = 10
QUERIES = 600
SETTINGS = [(None, 0.0)] + [(n, w) for n in ("nnn", "softmax", "zscore") for w in (0.25, 0.5, 1.0)]


def ask(server, **body):
    request = urllib.request.Request(
        f"{server}/v1/search", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    return json.load(urllib.request.urlopen(request))


def same(a, b):
    return all(a["attributes"].get(name) == b["attributes"].get(name) for name in ("kind", "colour"))


def main():
    server = sys.argv[1].rstrip("/")
    images = ask(server, text="a picture", k=1000)["hits"]
    random.seed(1)
    there = {i["image_id"]: sum(same(i, j) for j in images) - 1 for i in images}
    chosen = [i for i in random.sample(images, len(images)) if there[i["image_id"]] >= 2][:QUERIES]
    plain = None
    print(f"{len(chosen)} images of {len(images)} asked for; capped recall@{K}, and gain over plain CLIP (95 %)")
    for normaliser, weight in SETTINGS:
        overrides = {"normaliser": normaliser, "weight": weight} if normaliser else {}
        shares = []
        for image in chosen:
            hits = ask(server, image_id=image["image_id"], k=K, **overrides)["hits"]
            shares.append(sum(same(image, hit) for hit in hits) / min(K, there[image["image_id"]]))
        plain = plain or shares
        gains = [a - b for a, b in zip(shares, plain)]
        draws = sorted(statistics.fmean(random.choices(gains, k=len(gains))) for _ in range(1000))
        name = f"{normaliser}, weight {weight}" if normaliser else "plain CLIP (the default)"
        print(
            f"| {name} | {statistics.fmean(shares):.3f} |"
            f" {statistics.fmean(gains):+.3f} ({draws[25]:+.3f} to {draws[974]:+.3f}) |"
        )


main()
