"""What `bsap evaluate` computes, against implementations that know nothing of bsap.

    check.py BSAP DEMO

DEMO is a folder that `bsap demo --once` left behind. Measures are compared with ir-measures
(trec_eval) on random data, intervals and tests with SciPy, statistics and normalisers with plain
f64 NumPy over the stored embeddings. arrays.py has the tests of `bsap evaluate arrays`, exchange.py those
of files that other programs write and read, indexes.py those of embeddings that are imported and ranked elsewhere.
"""

import json
import pathlib
import random
import sys
import tempfile
import tomllib
import unittest

import ir_measures
import numpy as np
import polars as pl
import scipy.stats
from arrays import RandomArrays, RealClip  # noqa: F401
from exchange import Read, Written  # noqa: F401
from indexes import Indexes  # noqa: F401
from program import DEMO, MEASURES, bsap

SET = "demo"
TOP_K = 8
NORMALISERS = ["softmax", "zscore", "range", "nnn"]


def embeddings(texts):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("\n".join(json.dumps(text) for text in texts))
        file.flush()
        out = bsap("embed", "--checkpoint", DEMO / "demo-clip", "--texts", file.name)
    return np.array([json.loads(line)["embedding"] for line in out.splitlines()], dtype=np.float64)


def rankings(path):
    """Query number to [(image id, score)], best first."""
    found = {}
    for line in path.read_text().splitlines():
        query, _, image, _, score, _ = line.split()
        found.setdefault(int(query), []).append((image.replace("%20", " "), float(score)))
    return found


class Measures(unittest.TestCase):
    """Random judgements and rankings, graded, with queries that have few or many right images."""

    @classmethod
    def setUpClass(cls):
        rng = random.Random(7)
        images = [f"i{n}" for n in range(300)]
        cls.qrels, cls.runs = {}, [{}, {}]
        for query in range(60):
            right = rng.sample(images, rng.choice([1, 2, 8, 40]))
            judged = {image: rng.choice([1, 1, 2, 3]) for image in right}
            judged.update({image: 0 for image in rng.sample(images, 5) if image not in judged})
            cls.qrels[f"q{query}"] = judged
            for quality, run in enumerate(cls.runs):
                bonus = 0.2 + 0.15 * quality
                scores = {image: rng.random() + bonus * (judged.get(image, 0) > 0) for image in images}
                top = sorted(scores, key=scores.get, reverse=True)[:100]
                run[f"q{query}"] = {image: scores[image] for image in top}
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            lines = [f"{q} 0 {i} {g}" for q, all in cls.qrels.items() for i, g in all.items()]
            (folder / "qrels.txt").write_text("\n".join(lines))
            for number, run in enumerate(cls.runs):
                lines = [f"{q} Q0 {i} 0 {s!r} t" for q, all in run.items() for i, s in all.items()]
                (folder / f"{number}.run").write_text("\n".join(lines))
            arguments = ["--run", folder / "0.run", "--run", folder / "1.run", "--json"]
            cls.report = json.loads(bsap("evaluate", "rankings", "--qrels", folder / "qrels.txt", *arguments))

    def values(self, run, measure):
        place = self.report["measures"].index(measure)
        return {query: values[place] for query, values in self.report["runs"][run]["by_query"].items()}

    def test_measures_are_those_of_ir_measures(self):
        for number, run in enumerate(self.runs):
            found = {}
            for metric in ir_measures.iter_calc(list(MEASURES), self.qrels, run):
                found.setdefault(MEASURES[metric.measure], {})[metric.query_id] = metric.value
            for name, expected in found.items():
                own = self.values(number, name)
                self.assertEqual(own.keys(), expected.keys())
                for query, value in expected.items():
                    self.assertAlmostEqual(own[query], value, places=9, msg=f"{name} {query}")
            first = self.values(number, "hit@1")
            for query, value in self.values(number, "false hit").items():
                self.assertEqual(value, 1 - first[query])
            recall = self.values(number, "recall@10")
            for query, value in self.values(number, "capped recall@10").items():
                total = sum(grade > 0 for grade in self.qrels[query].values())
                self.assertAlmostEqual(value, recall[query] * total / min(10, total), places=9)

    def test_intervals_and_tests_are_those_of_scipy(self):
        for name in ["hit@1", "nDCG@10", "MRR"]:
            place = self.report["measures"].index(name)
            old, new = self.values(0, name), self.values(1, name)
            gain = np.array([new[q] - old[q] for q in old])
            column = self.report["runs"][1]["columns"][place]
            self.assertAlmostEqual(column["gain"]["mean"], gain.mean(), places=9)
            rng = np.random.default_rng(1)
            options = {"method": "percentile", "n_resamples": 9999, "rng": rng}
            theirs = scipy.stats.bootstrap((gain,), np.mean, **options).confidence_interval
            spread = theirs.high - theirs.low
            self.assertAlmostEqual(column["gain"]["low"], theirs.low, delta=0.1 * spread)
            self.assertAlmostEqual(column["gain"]["high"], theirs.high, delta=0.1 * spread)
            options = {"permutation_type": "samples", "n_resamples": 9999, "rng": rng}
            theirs = scipy.stats.permutation_test((gain,), np.mean, **options).pvalue
            self.assertAlmostEqual(column["p_value"], theirs, delta=0.03)


class Rankings(unittest.TestCase):
    """The demo's catalogue under every normaliser, computed again in f64."""

    @classmethod
    def setUpClass(cls):
        (images,) = (DEMO / "catalogue").glob("generations/*/images")
        table = pl.read_delta(str(images)).filter(~pl.col("deleted")).sort("image_id")
        cls.ids = table["image_id"].to_list()
        assert len(set(cls.ids)) == len(cls.ids)
        cls.images = np.array(table["embedding"].to_list(), dtype=np.float64)
        cls.prompts = tomllib.loads(bsap("prompts", "show", SET))["texts"]
        cls.aux = cls.images @ embeddings(cls.prompts).T
        cls.queries = ["a red mug", "something striped", "two blue chairs", "a hat next to a bag", "a kite"]
        cls.raw = embeddings(cls.queries) @ cls.images.T
        specs = [f"set={SET},normaliser={n},weight={w},name={n}-{w}" for n in NORMALISERS for w in (0.25, 1)]
        cls.right = right = cls.ids[:3]
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            lines = [json.dumps({"text": text, "relevant": right}) for text in cls.queries]
            (folder / "q.jsonl").write_text("\n".join(lines))
            arguments = [a for spec in specs for a in ("--configuration", spec)]
            arguments += ["--queries", folder / "q.jsonl", "--k", "1,40", "--json", "-", "--runs", folder]
            cls.report = json.loads(bsap("evaluate", *arguments))
            cls.runs = {path.stem: rankings(path) for path in folder.glob("*.run")}
        cls.scale = cls.report["models"][0]["logit_scale"]

    def statistics(self):
        aux, scale = self.aux, self.scale
        top = np.sort(aux, axis=1)[:, -TOP_K:].mean(axis=1)
        peak = aux.max(axis=1)
        lse = np.log(np.exp(scale * (aux - peak[:, None])).sum(axis=1)) / scale + peak
        return aux.mean(axis=1), aux.std(axis=1), aux.min(axis=1), peak, lse, top

    def affine(self, normaliser):
        """α, β, and the constants c and m that bring them on the scale of raw scores."""
        mean, std, low, high, lse, top = self.statistics()
        std, width = np.maximum(std, 1e-3), np.maximum(high - low, 1e-3)
        middle = lambda values: np.sort(values)[len(values) // 2]
        return {
            "softmax": (1.0, -lse, 1.0, 0.0),
            "zscore": (1 / std, -mean / std, middle(std), middle(mean)),
            "range": (1 / width, -low / width, middle(width), middle(low)),
            # s − λ · mean of the k nearest references, as NNNRetriever of nnn-retrieval 1.0.1 has it.
            "nnn": (1.0, -top, 1.0, 0.0),
        }[normaliser]

    def compare(self, name, scores):
        """A run holds the best by `scores`: equal scores, and an order that no clear gap contradicts."""
        for number, own in enumerate(scores, start=1):
            ranked = self.runs[name][number]
            place = {image: i for i, image in enumerate(self.ids)}
            best = np.sort(own)[::-1]
            for rank, (image, score) in enumerate(ranked):
                self.assertAlmostEqual(score, own[place[image]], delta=2e-5, msg=name)
                self.assertAlmostEqual(own[place[image]], best[rank], delta=4e-5, msg=name)

    def test_raw_is_the_cosine(self):
        self.compare("raw", self.raw)

    def test_normalisers_are_their_formulas(self):
        for normaliser in NORMALISERS:
            alpha, beta, c, m = self.affine(normaliser)
            for weight in (0.25, 1):
                scores = weight * (c * (alpha * self.raw + beta) + m) + (1 - weight) * self.raw
                self.compare(f"{normaliser}-{weight}", scores)

    def test_softmax_ranks_as_inverted_softmax(self):
        # exp(L·s) over its sum for the image, over all prompts: inverted softmax (arXiv 1702.03859).
        sums = np.exp(self.scale * self.aux).sum(axis=1)
        for number, raw in enumerate(self.raw, start=1):
            inverted = np.exp(self.scale * raw) / sums
            expected = [self.ids[i] for i in np.argsort(-inverted, kind="stable")[:40]]
            found = [image for image, _ in self.runs["softmax-1"][number]]
            agree = sum(a == b for a, b in zip(found, expected))
            # f32 may swap neighbours whose scores agree to six digits; nothing else.
            self.assertGreaterEqual(agree, 38, f"query {number}")
            self.assertEqual(set(found[:20]), set(expected[:20]))

    def test_hubness_is_the_skewness_of_k_occurrence(self):
        for outcome in self.report["configurations"]:
            counts = dict.fromkeys(self.ids, 0)
            for ranked in self.runs[outcome["name"]].values():
                for image, _ in ranked:
                    counts[image] += 1
            values = list(counts.values())
            self.assertAlmostEqual(outcome["hubness"]["skewness"], scipy.stats.skew(values), places=6)
            self.assertAlmostEqual(outcome["hubness"]["never_ranked_share"], values.count(0) / len(values), places=9)

    def test_stability_is_counted_against_the_baseline(self):
        raw = self.runs["raw"]
        for outcome in self.report["configurations"][1:]:
            own = self.runs[outcome["name"]]
            ids = lambda ranked: [image for image, _ in ranked]
            first = [ids(own[q])[0] != ids(raw[q])[0] for q in raw]
            any_changed = [ids(own[q]) != ids(raw[q]) for q in raw]
            overlap = [len(set(ids(own[q])) & set(ids(raw[q]))) / len(raw[q]) for q in raw]
            stability = outcome["stability"]
            self.assertAlmostEqual(stability["top_hit_changed"]["mean"], np.mean(first), places=9)
            self.assertAlmostEqual(stability["any_changed"]["mean"], np.mean(any_changed), places=9)
            self.assertAlmostEqual(stability["overlap"]["mean"], np.mean(overlap), places=9)

    def test_the_first_right_image_is_looked_for_in_the_whole_ranking(self):
        place = self.report["measures"].index("MRR")
        order = np.argsort(-self.raw, axis=1, kind="stable")
        right = [self.ids.index(image) for image in self.right]
        expected = np.mean([1 / (1 + min(list(row).index(i) for i in right)) for row in order])
        raw = self.report["configurations"][0]
        self.assertEqual(raw["name"], "raw")
        self.assertAlmostEqual(raw["overall"]["measures"][place]["value"]["mean"], expected, places=6)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
