#!/usr/bin/env python3
"""Ranks what another search has found, by `POST /v1/rerank` of `bsap serve`. Needs nothing but Python.

    rerank.py --server http://127.0.0.1:8080 --text "a red mug" < answer.json
    rerank.py --server http://127.0.0.1:8080 --queries queries.jsonl --runs pilot

The first form reads one answer of Elasticsearch, OpenSearch or Qdrant from standard input, and prints ids in the
balanced order. The second reads one line per query, {"query": "q1", "text": "a red mug", "answer": {…}}, and writes
the old and the balanced ranking as TREC runs for `bsap evaluate rankings`. BSAP_KEY is the API key, if one is needed.
"""

import argparse
import base64
import json
import os
import pathlib
import struct
import sys
import urllib.error
import urllib.request


def candidates_of(answer, vector="embedding"):
    """Candidates from an answer of Elasticsearch or OpenSearch (`hits.hits`), of Qdrant (`result`, `result.points`),
    or from rows of `id`, `score` and, if the catalogue does not know them, `embedding`."""
    if isinstance(answer, list):
        found = [(row["id"], row.get("score"), row.get("embedding")) for row in answer]
    elif "hits" in answer:
        hits = answer["hits"]["hits"]
        found = [(hit["_id"], hit.get("_score"), hit.get("_source", {}).get(vector)) for hit in hits]
    elif "result" in answer:
        points = answer["result"]
        points = points["points"] if isinstance(points, dict) else points
        found = [(point["id"], point.get("score"), named_vector(point.get("vector"), vector)) for point in points]
    else:
        raise ValueError("the answer has neither hits (Elasticsearch, OpenSearch) nor result (Qdrant)")
    candidates = []
    for image, score, embedding in found:
        candidate = {"id": str(image)}
        if score is not None:
            candidate["score"] = score
        if embedding is not None:
            candidate["embedding"] = encode(embedding)
        candidates.append(candidate)
    return candidates


def named_vector(vectors, name):
    """Qdrant returns one vector, or several by name."""
    return vectors.get(name) if isinstance(vectors, dict) else vectors


def encode(embedding):
    """Base64 of 32-bit floats: a third of the size of numbers, and nothing is rounded."""
    return base64.b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()


def rerank(server, query, candidates, **settings):
    """The answer of `/v1/rerank`. `query` is {"text": …} or {"vector": […]}; settings are fields of the request."""
    body = json.dumps({**query, "candidates": candidates, **settings}).encode()
    request = urllib.request.Request(f"{server.rstrip('/')}/v1/rerank", body, {"content-type": "application/json"})
    if key := os.environ.get("BSAP_KEY"):
        request.add_header("authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code}: {error.read().decode()}") from None


def balanced_ids(candidates, answer):
    """All ids: those that were ranked in the balanced order, then the unknown ones in the old order."""
    unknown = set(answer["unknown"])
    return [one["id"] for one in answer["results"]] + [one["id"] for one in candidates if one["id"] in unknown]


def write_runs(server, lines, folder):
    """Writes `old.run` and `balanced.run`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "old.run", "w") as old, open(folder / "balanced.run", "w") as balanced:
        for line in lines:
            query = json.loads(line)
            candidates = candidates_of(query["answer"])
            answer = rerank(server, {"text": query["text"]}, candidates)
            rankings = [(old, "old", [one["id"] for one in candidates])]
            rankings.append((balanced, "balanced", balanced_ids(candidates, answer)))
            for file, name, ids in rankings:
                for rank, image in enumerate(ids, 1):
                    # Spaces separate the fields of a run.
                    image = image.replace("%", "%25").replace(" ", "%20")
                    file.write(f"{query['query']} Q0 {image} {rank} {len(ids) - rank + 1} {name}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", required=True, help="address of bsap serve")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", help="query; the answer of the other search comes from standard input")
    what.add_argument("--queries", type=pathlib.Path, help="JSON lines of query, text and answer")
    parser.add_argument("--runs", type=pathlib.Path, help="folder for old.run and balanced.run")
    args = parser.parse_args()
    if args.queries:
        if not args.runs:
            parser.error("--queries needs --runs")
        with open(args.queries) as lines:
            write_runs(args.server, lines, args.runs)
        return
    candidates = candidates_of(json.load(sys.stdin))
    answer = rerank(args.server, {"text": args.text}, candidates)
    print("\n".join(balanced_ids(candidates, answer)))


if __name__ == "__main__":
    main()
