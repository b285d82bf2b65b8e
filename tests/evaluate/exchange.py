"""What `bsap evaluate` exchanges with other programs: rankings and judgements that it writes and reads,
against pytrec_eval (trec_eval's own code) and ir-measures, and query files as spreadsheets and scripts
write them.

check.py runs these tests with its own.
"""

import csv
import json
import pathlib
import random
import re
import tempfile
import unittest

import ir_measures
import numpy as np
import polars as pl
import pytrec_eval
from ir_measures import AP, nDCG
from program import DEMO, MEASURES, bsap, run_bsap

PYTREC_EVAL = {"recip_rank": "MRR", "map": "MAP", "ndcg_cut_10": "nDCG@10", "P_10": "precision@10", "recall_10": "recall@10"}
# A zero with a sign, as a number of its own.
NEGATIVE_ZERO = re.compile(r"(?<![\d.eE])-0(\.0*)?(?![\d.])")


def theirs(qrels, run):
    """Measures by query, of ir-measures and of pytrec_eval, which must agree."""
    found = {}
    for metric in ir_measures.iter_calc(list(MEASURES), qrels, run):
        found.setdefault(metric.query_id, {})[MEASURES[metric.measure]] = metric.value
    for query, values in pytrec_eval.RelevanceEvaluator(qrels, set(PYTREC_EVAL)).evaluate(run).items():
        for name, value in values.items():
            assert abs(found[query][PYTREC_EVAL[name]] - value) < 1e-9, (query, name)
    return found


def read(folder, name):
    """What other programs read of the files that bsap wrote."""
    qrels, run = {}, {}
    for judgement in ir_measures.read_trec_qrels(str(folder / "qrels.txt")):
        qrels.setdefault(judgement.query_id, {})[judgement.doc_id] = judgement.relevance
    for result in ir_measures.read_trec_run(str(folder / f"{name}.run")):
        run.setdefault(result.query_id, {})[result.doc_id] = result.score
    return qrels, run


class Written(unittest.TestCase):
    """Rankings and judgements that bsap writes."""

    def check(self, report, folder, names):
        for name in names:
            qrels, run = read(folder, name)
            values = theirs(qrels, run).values()
            (own,) = [c for c in report["configurations"] if c["name"] == name]
            own = {m: c["value"]["mean"] for m, c in zip(report["measures"], own["overall"]["measures"])}
            for measure in MEASURES.values():
                expected = np.mean([value[measure] for value in values])
                self.assertAlmostEqual(own[measure], expected, places=6, msg=f"{name} {measure}")
            text = (folder / f"{name}.run").read_text()
            self.assertNotRegex(text, NEGATIVE_ZERO)
            for ranked in run.values():
                scores = np.array(list(ranked.values())).astype(np.float32)
                self.assertTrue((np.diff(scores) < 0).all(), name)
            # Read by bsap itself, they are the same again.
            again = run_bsap("evaluate", "rankings", "--qrels", folder / "qrels.txt", "--run", folder / f"{name}.run", "--json")
            self.assertNotIn("warning", again.stderr)
            again = json.loads(again.stdout)
            for measure in MEASURES.values():
                place = again["measures"].index(measure)
                mean = np.mean([values[place] for values in again["runs"][0]["by_query"].values()])
                self.assertAlmostEqual(own[measure], mean, places=6, msg=f"{name} {measure}")

    def test_copies_of_images_have_the_same_rank_everywhere(self):
        rng = np.random.default_rng(5)
        # Ten images, so that runs hold whole rankings; each is there twice, and scores tie.
        images = np.repeat(rng.normal(size=(5, 16)), 2, axis=0)
        queries, prompts = rng.normal(size=(60, 16)), rng.normal(size=(30, 16))
        # Nearly at right angles to every image: scores of almost zero, some below.
        images[:, 15] = 0
        queries[:3, :15] *= 1e-12
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for name, array in {"images": images, "queries": queries, "prompts": prompts}.items():
                np.save(folder / f"{name}.npy", array)
            with open(folder / "pairs.csv", "w", newline="") as file:
                pairs = [(query, image) for query in range(60) for image in rng.choice(10, 2, replace=False)]
                csv.writer(file).writerows([["query", "image"], *pairs])
            arrays = [f"--{name}={folder / name}.npy" for name in ["images", "queries", "prompts"]]
            arrays += ["--relevant", folder / "pairs.csv", "--json", "-", "--runs", folder / "runs"]
            report = bsap("evaluate", "arrays", *arrays)
            self.assertNotRegex(report, NEGATIVE_ZERO)
            self.check(json.loads(report)["report"], folder / "runs", ["raw", "default"])

    def test_grades_that_are_no_whole_numbers_are_exchanged(self):
        (images,) = (DEMO / "catalogue").glob("generations/*/images")
        ids = pl.read_delta(str(images)).filter(~pl.col("deleted"))["image_id"].to_list()
        rng = random.Random(3)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            texts = ["a red mug", "something striped", "two blue chairs", "a hat next to a bag"]
            judged = [{i: rng.choice([0, 0.25, 0.5, 1, 3]) for i in rng.sample(ids, 30)} for _ in texts]
            lines = [json.dumps({"text": t, "relevant": j}) for t, j in zip(texts, judged)]
            (folder / "q.jsonl").write_text("\n".join(lines))
            arguments = ["--queries", folder / "q.jsonl", "--configuration", "live", "--json", "-", "--runs", folder / "runs"]
            report = json.loads(bsap("evaluate", *arguments, "--k", f"1,5,10,{len(ids)}"))
            last = max(int(m.split("@")[1]) for m in report["measures"] if "@" in m)
            qrels, run = read(folder / "runs", "live")
            expected = ir_measures.calc_aggregate([nDCG @ last, AP], qrels, run)
            (own,) = [c for c in report["configurations"] if c["name"] == "live"]
            own = {m: c["value"]["mean"] for m, c in zip(report["measures"], own["overall"]["measures"])}
            self.assertAlmostEqual(own[f"nDCG@{last}"], expected[nDCG @ last], places=6)
            self.assertAlmostEqual(own["MAP"], expected[AP], places=6)


class Read(unittest.TestCase):
    """Rankings and query files that other programs wrote."""

    def test_ties_are_ordered_as_in_trec_eval_and_reported(self):
        rng = random.Random(11)
        images = [f"i{n}" for n in range(80)]
        qrels = {f"q{n}": {image: rng.choice([0, 1, 2]) for image in rng.sample(images, 20)} for n in range(40)}
        # A third of the scores tie exactly, a third in f32 alone.
        score = lambda: round(rng.random(), 1) + rng.choice([0, 1e-12, rng.random()])
        run = {query: {image: score() for image in images} for query in qrels}
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            lines = [f"{q} 0 {i} {g}" for q, judged in qrels.items() for i, g in judged.items()]
            (folder / "qrels.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
            lines = [f"{q}\tQ0\t{i}\t0\t{s!r}\tt" for q, ranked in run.items() for i, s in ranked.items()]
            (folder / "tied.run").write_bytes("\n".join(lines).encode("utf-16"))
            done = run_bsap("evaluate", "rankings", "--qrels", folder / "qrels.txt", "--run", folder / "tied.run", "--json")
        self.assertRegex(done.stderr, r"warning: .*tied.run: \d+ results have the score of an earlier")
        report = json.loads(done.stdout)
        self.assertGreater(report["runs"][0]["tied_results"], 100)
        for query, expected in theirs(qrels, run).items():
            for measure, value in expected.items():
                own = report["runs"][0]["by_query"][query][report["measures"].index(measure)]
                self.assertAlmostEqual(own, value, places=9, msg=f"{query} {measure}")

    def test_query_files_of_spreadsheets_and_scripts_are_read_alike(self):
        rows = [("a red mug", "mug-1", "1"), ("a red mug", "mug-2", "2"), ("stripes; many, of them", "hat-1", "1")]
        table = lambda separator: "".join(
            separator.join(f'"{field}"' for field in row) + "\r\n" for row in [("text", "image_id", "grade"), *rows]
        )
        objects = [
            {"text": "a red mug", "relevant": {"mug-1": 1, "mug-2": 2}},
            {"text": "stripes; many, of them", "relevant": ["hat-1"]},
        ]
        files = {
            "lines.jsonl": "\n".join(map(json.dumps, objects)).encode(),
            "array.json": json.dumps(objects, indent=2).encode(),
            "comma.csv": table(",").encode(),
            "semicolon.csv": table(";").encode("utf-8-sig"),
            "tabs.tsv": table("\t").encode("utf-16"),
        }
        prints = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = pathlib.Path(folder) / name
                path.write_bytes(content)
                report = json.loads(bsap("evaluate", "--queries", path, "--json", "-"))
                prints[name] = report["queries"]["fingerprint"]
        for name, fingerprint in prints.items():
            self.assertEqual(fingerprint, prints["lines.jsonl"], name)
