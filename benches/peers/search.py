"""Balanced search by bsap beside libraries that search exactly, on the same vectors, in turn, in one run.

    just peers search [rows]

A balanced score α·(q·v) + β is the dot product of (q, 1) and (α·v, β): that is what the others get, so
that they rank by the same score. bsap gives both rankings and all places from its one scan; the others
give one. Every side may use all cores. Recall is against scores in f64.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import tempfile
import time

import faiss
import lancedb
import numpy as np
import pyarrow as pa
import usearch.index

K = 100
ROUNDS = 5
AT_ONCE = 16
# Candidates that the quantised index hands to re-ranking, for each result.
CANDIDATES = 10


class Bsap:
    """benches/search.rs, which answers a line with a round."""

    def __init__(self, program, rows, folder):
        environment = os.environ | {"BSAP_BENCH_PEERS": folder}
        self.process = subprocess.Popen(
            [program, str(rows)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = json.loads(self.process.stdout.readline())

    def ask(self, what):
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def one_by_one(self):
        answer = self.ask("one")
        return answer["ms"], answer["ids"]

    def together(self):
        return self.ask("together")["ms"]


def one_by_one(search, queries):
    times, found = [], []
    for query in queries:
        started = time.perf_counter()
        ids = search(query[None, :])
        times.append((time.perf_counter() - started) * 1e3)
        found.append(ids[0])
    return times, found


def together(search, queries):
    some = np.ascontiguousarray(np.concatenate([queries, queries])[:AT_ONCE])
    started = time.perf_counter()
    search(some)
    return (time.perf_counter() - started) * 1e3 / AT_ONCE


def peers(rows, folder):
    """Name to a function of queries, a row each, to places of the best rows, a row each."""
    width = rows.shape[1]
    flat = faiss.IndexFlatIP(width)
    flat.add(rows)
    yield "FAISS IndexFlatIP", lambda q: flat.search(q, K)[1]

    quantised = faiss.IndexScalarQuantizer(width, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT)
    quantised.train(rows[:: max(1, len(rows) // 100_000)])
    quantised.add(rows)

    def ranked_again(queries):
        found = quantised.search(queries, K * CANDIDATES)[1]
        scores = [rows[ids] @ query for ids, query in zip(found, queries)]
        return [ids[np.argsort(-s)[:K]] for ids, s in zip(found, scores)]

    yield f"FAISS IndexScalarQuantizer, {CANDIDATES * K} ranked again in f32", ranked_again

    def plain(queries):
        scores = rows @ queries.T
        best = np.argpartition(-scores, K, axis=0)[:K].T
        return [ids[np.argsort(-s[ids])] for ids, s in zip(best, scores.T)]

    yield "numpy (BLAS)", plain

    def dense(queries):
        return usearch.index.search(rows, queries, K, usearch.index.MetricKind.IP, exact=True).keys.reshape(-1, K)

    yield "usearch, exact", dense

    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), width)
    table = pa.table({"id": pa.array(np.arange(len(rows), dtype=np.int32)), "vector": values})
    lance = lancedb.connect(folder).create_table("rows", table)

    def flat_table(queries):
        one = lambda q: lance.search(q).distance_type("dot").limit(K).select(["id", "_distance"]).to_arrow()
        return [one(query)["id"].to_numpy() for query in queries]

    yield "LanceDB, flat", flat_table


def recall(found, scores):
    """Share of places whose image scores as much as the K-th best; ties aside."""
    good = 0
    for ids, s in zip(found, scores):
        kth_score = np.partition(s, -K)[-K] - 1e-9
        good += int((s[np.asarray(ids, dtype=np.int64)] >= kth_score).sum())
    return good / (K * len(scores))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bench", required=True, help="the built benches/search.rs")
    parser.add_argument("rows", nargs="?", type=int, default=200_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bsap = Bsap(args.bench, args.rows, folder)
        load = lambda name: np.fromfile(f"{folder}/{name}", dtype="<f4").reshape(-1, bsap.about["width"])
        rows, queries = load("rows.f32"), load("queries.f32")
        numbers = np.fromfile(f"{folder}/ids.u32", dtype="<u4")
        place = np.empty(numbers.max() + 1, dtype=np.int64)
        place[numbers] = np.arange(len(numbers))
        parts = np.array_split(rows, max(1, len(rows) // 50_000))
        exact = np.concatenate([part.astype(np.float64) @ queries.T.astype(np.float64) for part in parts]).T
        sides = dict(peers(rows, folder))
        times = {name: [] for name in ["bsap", *sides]}
        many = {name: [] for name in times}
        recalls = {}
        for _ in range(ROUNDS):
            ms, ids = bsap.one_by_one()
            times["bsap"] += ms
            many["bsap"].append(bsap.together())
            recalls["bsap"] = recall([place[i] for i in ids], exact)
            for name, search in sides.items():
                ms, found = one_by_one(search, queries)
                times[name] += ms
                many[name].append(together(search, queries))
                recalls[name] = recall(found, exact)
    versions = ["faiss-cpu", "numpy", "usearch", "lancedb"]
    print(f"{len(rows)} rows of {rows.shape[1] - 1}, k = {K}, {os.cpu_count()} cores;", end=" ")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in versions))
    print(f"| | one query, ms | times bsap | {AT_ONCE} at once, ms a query | times bsap | recall@{K} |")
    print("| --- | --- | --- | --- | --- | --- |")
    one, all_ = statistics.median(times["bsap"]), statistics.median(many["bsap"])
    for name in times:
        a, b = statistics.median(times[name]), statistics.median(many[name])
        print(f"| {name} | {a:.2f} | {a / one:.1f} | {b:.2f} | {b / all_:.1f} | {recalls[name]:.4f} |")


main()
