"""Embeddings imported, reranked and corrected elsewhere, against plain NumPy, PostgreSQL with pgvector, and answers
that Qdrant and OpenSearch gave.

check.py runs these tests with its own. The demo's embeddings become a catalogue again by `bsap import`.
"""

import base64
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import tomllib
import unittest
import urllib.error
import urllib.request

import numpy as np
import polars as pl
from program import BSAP, DEMO

try:
    import pgserver
    import psycopg2
except ImportError:
    pgserver = None

ROOT = pathlib.Path(__file__).resolve().parents[2]
CLIENT = ROOT / "docs/next-to-your-search/rerank.py"
sys.path.insert(0, str(CLIENT.parent))
sys.path.insert(0, str(ROOT / "tests/evaluate/opensearch"))
import rerank as client  # noqa: E402
from node import Node  # noqa: E402

JARS = os.environ.get("BSAP_OPENSEARCH_JARS")

TOP_K, TEMPERATURE = 8, 1.0
SPECS = {
    "live": ("nnn", 0.25),
    "softmax": ("softmax", 0.5),
    "zscore": ("zscore", 0.5),
    "range": ("range", 1.0),
}


def run(catalogue, *arguments, code=0, **variables):
    env = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(catalogue),
        "BSAP_TABLE__URL": str(catalogue / "catalogue"),
        "BSAP_MODEL__CHECKPOINT": str(DEMO / "demo-clip"),
        "BSAP_PROMPTS__SETS": '["demo"]',
        "BSAP_PROMPTS__TOP_K": str(TOP_K),
        "BSAP_PROMPTS__TEMPERATURE": str(TEMPERATURE),
        "BSAP_SEARCH__NORMALISER": SPECS["live"][0],
        "BSAP_SEARCH__WEIGHT": str(SPECS["live"][1]),
        "BSAP_FETCH__FILE_ROOTS": json.dumps([str(DEMO)]),
        "BSAP_ATTRIBUTES__KIND": "text",
        **variables,
    }
    done = subprocess.run([BSAP, *map(str, arguments)], env=env, capture_output=True, text=True)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    return done


def embed(catalogue, texts):
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("\n".join(json.dumps(text) for text in texts))
        file.flush()
        out = run(catalogue, "embed", "--checkpoint", DEMO / "demo-clip", "--texts", file.name).stdout
    return np.array([json.loads(line)["embedding"] for line in out.splitlines()], dtype=np.float64)


def stored(catalogue):
    """The newest rows of the table, by id."""
    (images,) = (catalogue / "catalogue").glob("generations/*/images")
    return pl.read_delta(str(images)).sort("image_id")


class Reference:
    """α and β of embeddings by the formulas, in f64."""

    def __init__(self, images, prompts, scale):
        aux = images @ prompts.T
        peak = aux.max(axis=1)
        lse = np.log(np.exp(scale * (aux - peak[:, None])).sum(axis=1)) / scale + peak
        top = np.sort(aux, axis=1)[:, -TOP_K:].mean(axis=1)
        std, width = np.maximum(aux.std(axis=1), 1e-3), np.maximum(peak - aux.min(axis=1), 1e-3)
        middle = lambda values: np.sort(values)[len(values) // 2]
        one = np.ones(len(images))
        self.parts = {
            "nnn": (one, -top, 1.0, 0.0),
            "softmax": (one, -lse, 1.0, 0.0),
            "zscore": (1 / std, -aux.mean(axis=1) / std, middle(std), middle(aux.mean(axis=1))),
            "range": (1 / width, -aux.min(axis=1) / width, middle(width), middle(aux.min(axis=1))),
        }

    def affine(self, normaliser, weight):
        alpha, beta, c, m = self.parts[normaliser]
        return weight * c * alpha + 1 - weight, weight * (c * beta + m)


class Server:
    """`bsap serve` on a free port."""

    def __init__(self, catalogue):
        self.catalogue = catalogue

    def __enter__(self):
        env = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.catalogue),
            "BSAP_TABLE__URL": str(self.catalogue / "catalogue"),
            "BSAP_MODEL__CHECKPOINT": str(DEMO / "demo-clip"),
            "BSAP_HTTP__LISTEN": "127.0.0.1:0",
            "BSAP_METRICS__LISTEN": "127.0.0.1:0",
            "BSAP_LOG__FORMAT": "json",
        }
        self.process = subprocess.Popen([BSAP, "serve"], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in self.process.stdout:
            found = [word for word in line.replace('"', " ").split() if word.startswith("http://127.0.0.1:")]
            if found and not found[0].endswith(":0/"):
                self.url = found[0].rstrip("/").rstrip(",")
                break
        else:
            raise AssertionError("bsap serve did not start")
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{self.url}/readyz"):
                    return self
            except urllib.error.URLError:
                time.sleep(0.05)
        raise AssertionError("bsap serve is not ready")

    def __exit__(self, *_):
        self.process.terminate()
        self.process.communicate()


class Indexes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        (images,) = (DEMO / "catalogue").glob("generations/*/images")
        table = pl.read_delta(str(images)).filter(~pl.col("deleted"))
        table = table.sort("sequence").unique("image_id", keep="last").sort("image_id")
        cls.folder = tempfile.TemporaryDirectory()
        cls.path = pathlib.Path(cls.folder.name)
        cls.ids = table["image_id"].to_list()
        cls.images = np.array(table["embedding"].to_list(), dtype=np.float64)
        # Another length and order than the table has: both must be restored.
        np.save(cls.path / "images.npy", (cls.images * 2.5).astype(np.float32))
        cls.uris = table["uri"].to_list()
        metadata = pl.DataFrame({"image_id": cls.ids, "uri": cls.uris, "kind": ["drawn"] * len(cls.ids), "n": range(len(cls.ids))})
        metadata.write_parquet(cls.path / "metadata.parquet")
        arguments = ["import", "--images", cls.path / "images.npy", "--metadata", cls.path / "metadata.parquet"]
        cls.arguments = arguments
        out = run(cls.path, *arguments, "--json", cls.path / "import.json")
        cls.printed = out.stdout
        cls.outcome = json.loads((cls.path / "import.json").read_text())
        prompts = tomllib.loads(run(cls.path, "prompts", "show", "demo").stdout)["texts"]
        cls.prompts = embed(cls.path, prompts)
        cls.queries = ["a red mug", "something striped", "two blue chairs", "a hat next to a bag"]
        cls.query_vectors = embed(cls.path, cls.queries)
        card = json.loads(run(cls.path, "model", "inspect", DEMO / "demo-clip", "--json").stdout)
        cls.scale = card["logit_scale"] * TEMPERATURE

    @classmethod
    def tearDownClass(cls):
        cls.folder.cleanup()

    def reference(self, images=None):
        return Reference(self.images if images is None else images, self.prompts, self.scale)

    def test_an_import_stores_every_row_once_as_it_was(self):
        count = len(self.ids)
        self.assertEqual((self.outcome["read"], self.outcome["stored"], self.outcome["skipped"]), (count, count, []))
        self.assertIn(f"{count} embeddings were not of length 1", self.printed)
        self.assertIn("does not declare them: n", self.printed)
        self.assertGreater(self.outcome["median_cosine"], 0.999)
        self.assertEqual(self.outcome["compared"], min(count, 64))
        table = stored(self.path)
        self.assertEqual(table["image_id"].to_list(), self.ids)
        self.assertEqual(table["uri"].to_list(), self.uris)
        np.testing.assert_allclose(np.array(table["embedding"].to_list()), self.images, atol=5e-4)
        again = json.loads(run(self.path, *self.arguments, "--json").stdout)
        self.assertEqual((again["stored"], again["already_stored"]), (0, count))
        self.assertEqual(len(stored(self.path)), count)
        run(self.path, "verify")

    def test_all_kinds_of_files_are_the_same_import(self):
        array = np.load(self.path / "images.npy")
        np.savez_compressed(self.path / "images.npz", a=array, b=array[:1])
        frame = pl.read_parquet(self.path / "metadata.parquet")
        rows = pl.Series("vector", array.tolist(), dtype=pl.List(pl.Float32))
        frame.with_columns(rows).write_parquet(self.path / "all.parquet")
        frame.write_csv(self.path / "metadata.csv")
        frame.write_csv(self.path / "metadata.tsv", separator="\t")
        (self.path / "ids.txt").write_text("\n".join(self.ids) + "\n")
        for arguments in [
            ["--images", self.path / "images.npz:a", "--metadata", self.path / "metadata.csv"],
            ["--images", self.path / "all.parquet", "--ids", "image_id"],
            ["--images", self.path / "all.parquet:vector", "--ids", self.path / "ids.txt"],
            ["--images", self.path / "images.npy", "--metadata", self.path / "metadata.csv", "--ids", self.path / "metadata.csv:image_id"],
            ["--images", self.path / "images.npy", "--metadata", self.path / "metadata.tsv", "--ids", self.path / "metadata.tsv:image_id"],
        ]:
            outcome = json.loads(run(self.path, "import", *arguments, "--json").stdout)
            self.assertEqual((outcome["stored"], outcome["already_stored"]), (0, len(self.ids)), arguments)

    def test_what_cannot_be_imported_is_refused_and_nothing_is_stored(self):
        other = self.path / "other"
        other.mkdir(exist_ok=True)
        rng = np.random.default_rng(3)
        np.save(other / "random.npy", rng.normal(size=self.images.shape))
        bad = np.load(self.path / "images.npy")
        bad[2, 1], bad[5] = np.nan, 0
        np.save(other / "bad.npy", bad)
        np.save(other / "short.npy", bad[:, :-1])
        (other / "ids.txt").write_text("\n".join(["a", "a", "", *self.ids[3:]]) + "\n")
        metadata = ["--metadata", self.path / "metadata.parquet"]
        for arguments, parts in [
            (["--images", other / "random.npy", *metadata], ["median cosine", "--accept-disagreement"]),
            (["--images", other / "bad.npy", *metadata], ["2 of", "row 2: embedding: column 1: NaN", "row 5: embedding: all values are 0"]),
            (["--images", other / "bad.npy", "--ids", other / "ids.txt"], ["row 1: image_id: \"a\" is that of row 0", "row 2: embedding", "image_id: is empty"]),
            (["--images", other / "short.npy", *metadata], ["short.npy", "values, those of the model"]),
            (["--images", other / "none.npy", "--metadata", other / "none.csv"], ["--images", "none.npy", "--metadata", "none.csv"]),
            (["--images", other / "random.npy", *metadata, "--uri", "where"], ["no column \"where\"", "image_id, kind, n, uri"]),
        ]:
            printed = run(other, "import", *arguments, code=2).stderr
            for part in parts:
                self.assertIn(part, printed)
            self.assertFalse((other / "catalogue/generations").exists(), arguments)
        out = run(other, "import", "--images", other / "bad.npy", *metadata, "--skip-invalid", "--json").stdout
        outcome = json.loads(out)
        self.assertEqual(([fault["row"] for fault in outcome["skipped"]], outcome["stored"]), ([2, 5], len(self.ids) - 2))
        outcome = run(other, "import", "--images", other / "random.npy", *metadata, "--accept-disagreement", "--json")
        self.assertEqual(json.loads(outcome.stdout)["stored"], len(self.ids))

    def test_corrections_are_those_of_the_formulas_in_the_order_of_the_ids(self):
        order = [len(self.ids) - 1 - i for i in range(len(self.ids))]
        ids = [self.ids[i] for i in order] + ["gone"]
        (self.path / "order.txt").write_text("\n".join(ids))
        specs = [f"live,normaliser={n},weight={w},name={name}" for name, (n, w) in SPECS.items()]
        arguments = [a for spec in specs for a in ("--configuration", spec)]
        arguments += ["--ids", self.path / "order.txt"]
        outcome = json.loads(run(self.path, "export", "corrections", *arguments, "--out", self.path / "c.npy", "--json").stdout)
        self.assertEqual((outcome["unknown"], outcome["rows"], outcome["complete"]), (["gone"], len(ids), True))
        numbers = np.load(self.path / "c.npy")
        self.assertEqual(numbers.shape, (len(ids), 2 * len(SPECS)))
        self.assertTrue(np.isnan(numbers[-1]).all())
        reference = self.reference()
        for column, (name, (normaliser, weight)) in enumerate(SPECS.items()):
            for number, expected in zip(numbers[:-1, 2 * column : 2 * column + 2].T, reference.affine(normaliser, weight)):
                np.testing.assert_allclose(number, expected[order], rtol=2e-4, atol=2e-5, err_msg=name)
        run(self.path, "export", "corrections", *arguments, "--out", self.path / "c.csv")
        frame = pl.read_csv(self.path / "c.csv", null_values=[""])
        self.assertEqual(frame.columns, ["image_id", *outcome["columns"]])
        np.testing.assert_allclose(frame.drop("image_id").to_numpy()[:-1], numbers[:-1], rtol=1e-6)

    def test_a_later_export_has_what_changed(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            (folder / "ids.txt").write_text("\n".join(self.ids))
            common = ["import", "--images", self.path / "images.npy"]
            run(folder, *common, "--ids", folder / "ids.txt")
            export = ["export", "corrections", "--out", folder / "c.parquet", "--json"]
            first = json.loads(run(folder, *export).stdout)
            self.assertEqual((first["complete"], first["rows"]), (True, len(self.ids)))
            np.save(folder / "few.npy", np.load(self.path / "images.npy")[3:5])
            (folder / "few.txt").write_text("new\n" + self.ids[4])
            run(folder, "import", "--images", folder / "few.npy", "--ids", folder / "few.txt")
            later = json.loads(run(folder, *export, "--since", first["table_version"]).stdout)
            self.assertEqual((later["complete"], later["rows"]), (False, 2))
            frame = pl.read_parquet(folder / "c.parquet")
            self.assertEqual(frame["image_id"].to_list(), sorted(["new", self.ids[4]]))
            none = json.loads(run(folder, *export, "--since", later["table_version"]).stdout)
            self.assertEqual(none["rows"], 0)
            refused = run(folder, *export, "--since", 10_000, code=2).stderr
            self.assertIn("10000", refused)
            refused = run(folder, *export, "--since", 1, "--configuration", "live,normaliser=zscore", code=2).stderr
            self.assertIn("without --since", refused)

    def expected(self, query, images, normaliser="nnn", weight=0.25):
        alpha, beta = self.reference(images).affine(normaliser, weight)
        raw = images @ self.query_vectors[query]
        return raw, alpha * raw + beta

    def test_reranking_is_that_of_numpy_for_known_and_foreign_images(self):
        rng = np.random.default_rng(5)
        foreign = rng.normal(size=(7, self.images.shape[1])) * 0.05 + self.images[:7]
        unit = foreign / np.linalg.norm(foreign, axis=1, keepdims=True)
        with Server(self.path) as server:
            for number, query in enumerate(self.queries):
                chosen = rng.choice(len(self.ids), size=30, replace=False)
                candidates = [{"id": self.ids[i], "score": float(i)} for i in chosen]
                halves = unit.astype("<f2")
                for i, row in enumerate(halves):
                    forms = [row.astype(float).tolist(), base64.b64encode(row.tobytes()).decode()]
                    forms.append(base64.b64encode(row.astype("<f4").tobytes()).decode())
                    candidates.append({"id": f"foreign {i}", "embedding": forms[i % 3]})
                candidates.append({"id": "gone"})
                answer = client.rerank(server.url, {"text": query}, candidates, explain=True)
                self.assertEqual(answer["unknown"], ["gone"])
                vectors = np.vstack([self.images[chosen], halves.astype(np.float64)])
                raw, balanced = self.expected(number, vectors)
                ids = [candidate["id"] for candidate in candidates[:-1]]
                place = {image: i for i, image in enumerate(ids)}
                self.assertEqual(sorted(place), sorted(one["id"] for one in answer["results"]))
                for score, name in [(raw, "raw"), (balanced, "balanced")]:
                    best = np.sort(score)[::-1]
                    for one in answer["results"]:
                        own = score[place[one["id"]]]
                        self.assertAlmostEqual(one[name]["score"], own, delta=2e-4)
                        self.assertAlmostEqual(best[one[name]["rank"] - 1], own, delta=4e-4)
                known = {one["id"]: one["known"] for one in answer["results"]}
                self.assertEqual(sum(known.values()), 30)
                own = [one["own"]["rank"] for one in sorted(answer["results"], key=lambda one: -(one["own"] or {"score": -1})["score"])[:30]]
                self.assertEqual(own, list(range(1, 31)))
            vector = self.query_vectors[0].tolist()
            by_vector = client.rerank(server.url, {"vector": vector}, candidates)
            by_text = client.rerank(server.url, {"text": self.queries[0]}, candidates)
            self.assertEqual([one["id"] for one in by_vector["results"]], [one["id"] for one in by_text["results"]])

    def test_recorded_answers_of_other_searches_are_read(self):
        first, second = self.ids[:2]
        foreign = self.images[2].tolist()
        answers = {
            "OpenSearch": {"took": 3, "hits": {"total": {"value": 3, "relation": "eq"}, "hits": [
                {"_index": "shop", "_id": first, "_score": 1.24}, {"_index": "shop", "_id": second, "_score": 1.2},
                {"_index": "shop", "_id": "new", "_score": 1.1, "_source": {"embedding": foreign}}]}},
            "Qdrant search": {"result": [
                {"id": first, "version": 1, "score": 0.24}, {"id": second, "version": 1, "score": 0.2},
                {"id": "new", "version": 2, "score": 0.1, "vector": foreign}], "status": "ok", "time": 0.001},
            "Qdrant query": {"result": {"points": [
                {"id": first, "version": 1, "score": 0.24, "payload": None}, {"id": second, "version": 1, "score": 0.2},
                {"id": "new", "version": 2, "score": 0.1, "vector": {"embedding": foreign}}]}, "status": "ok"},
            "rows": [{"id": first, "score": 3}, {"id": second, "score": 2}, {"id": "new", "score": 1, "embedding": foreign}],
        }
        printed = set()
        with Server(self.path) as server:
            for name, answer in answers.items():
                command = [sys.executable, CLIENT, "--server", server.url, "--text", "a red mug"]
                done = subprocess.run(command, input=json.dumps(answer), capture_output=True, text=True)
                self.assertEqual(done.returncode, 0, f"{name}: {done.stderr}")
                printed.add(done.stdout)
            lines = [json.dumps({"query": f"q{i}", "text": text, "answer": answers["rows"]}) for i, text in enumerate(self.queries)]
            (self.path / "pilot.jsonl").write_text("\n".join(lines))
            command = [sys.executable, CLIENT, "--server", server.url, "--queries", self.path / "pilot.jsonl", "--runs", self.path / "pilot"]
            subprocess.run(list(map(str, command)), check=True)
        self.assertEqual(len(printed), 1)
        (ranked,) = printed
        _, balanced = self.expected(0, self.images[:3])
        order = [[first, second, "new"][i] for i in np.argsort(-balanced)]
        self.assertEqual(ranked.split("\n")[:-1], order)
        (self.path / "qrels.txt").write_text("".join(f"q{i} 0 {order[0]} 1\nq{i} 0 {order[1]} 0\n" for i in range(len(self.queries))))
        runs = [a for name in ("old", "balanced") for a in ("--run", self.path / f"pilot/{name}.run")]
        report = json.loads(run(self.path, "evaluate", "rankings", "--qrels", self.path / "qrels.txt", *runs, "--json").stdout)
        self.assertEqual([pathlib.Path(one["name"]).stem for one in report["runs"]], ["old", "balanced"])

    @unittest.skipUnless(pgserver, "pgserver and psycopg2 are not installed")
    def test_pgvector_orders_by_the_exported_correction_as_rerank_does(self):
        run(self.path, "export", "corrections", "--out", self.path / "pg.csv")
        rows = pl.read_csv(self.path / "pg.csv")
        with tempfile.TemporaryDirectory() as folder:
            server = pgserver.get_server(folder, cleanup_mode="stop")
            with psycopg2.connect(server.get_uri()) as connection, connection.cursor() as cursor, Server(self.path) as bsap:
                cursor.execute("CREATE EXTENSION vector")
                cursor.execute(f"CREATE TABLE images (id text PRIMARY KEY, embedding vector({self.images.shape[1]}))")
                for image, vector in zip(self.ids, self.images):
                    cursor.execute("INSERT INTO images VALUES (%s, %s)", (image, str(vector.tolist())))
                cursor.execute("ALTER TABLE images ADD COLUMN alpha real NOT NULL DEFAULT 1, ADD COLUMN beta real NOT NULL DEFAULT 0")
                for image, alpha, beta in rows.iter_rows():
                    cursor.execute("UPDATE images SET alpha = %s, beta = %s WHERE id = %s", (alpha, beta, image))
                for number, query in enumerate(self.queries):
                    vector = str(self.query_vectors[number].tolist())
                    statement = "SELECT id FROM images ORDER BY alpha * -(embedding <#> %s) + beta DESC, id"
                    cursor.execute(statement, (vector,))
                    ordered = [row[0] for row in cursor.fetchall()]
                    answer = client.rerank(bsap.url, {"text": query}, [{"id": image} for image in self.ids])
                    self.same_order(ordered, answer)
            server.cleanup()

    @unittest.skipUnless(JARS, "BSAP_OPENSEARCH_JARS names no jars")
    def test_opensearch_orders_by_the_exported_correction_as_rerank_does(self):
        run(self.path, "export", "corrections", "--out", self.path / "os.csv")
        rows = pl.read_csv(self.path / "os.csv")
        vector = {"type": "knn_vector", "dimension": self.images.shape[1]}
        vector["method"] = {"name": "hnsw", "engine": "lucene", "space_type": "innerproduct"}
        properties = {"embedding": vector, "alpha": {"type": "float"}, "beta": {"type": "float"}}
        with Node(JARS) as node, Server(self.path) as bsap:
            node.request("PUT", "/images", {"settings": {"index.knn": True, "number_of_replicas": 0}, "mappings": {"properties": properties}})
            lines = []
            for (image, alpha, beta), embedding in zip(rows.iter_rows(), self.images, strict=True):
                lines += [{"index": {"_index": "images", "_id": image}}]
                lines += [{"embedding": embedding.tolist(), "alpha": alpha, "beta": beta}]
            body = "".join(json.dumps(line) + "\n" for line in lines).encode()
            self.assertFalse(node.request("POST", "/_bulk?refresh=true", body)["errors"])
            for number, query in enumerate(self.queries):
                script = {
                    "source": "doc['alpha'].value * innerProduct(params.query, doc['embedding']) + doc['beta'].value + 10",
                    "params": {"query": self.query_vectors[number].tolist()},
                }
                search = {"size": len(self.ids), "_source": False, "query": {"script_score": {"query": {"match_all": {}}, "script": script}}}
                found = node.request("POST", "/images/_search?allow_partial_search_results=false", search)
                candidates = client.candidates_of(found)
                self.assertEqual(len(candidates), len(self.ids))
                answer = client.rerank(bsap.url, {"text": query}, candidates)
                self.same_order([candidate["id"] for candidate in candidates], answer)

    def same_order(self, ordered, answer):
        """The same order, but for neighbours whose scores differ by less than f32 tells apart."""
        scores = {one["id"]: one["balanced"]["score"] for one in answer["results"]}
        for image, one in zip(ordered, answer["results"], strict=True):
            self.assertAlmostEqual(scores[image], one["balanced"]["score"], delta=4e-6)
        self.assertEqual(sorted(ordered), sorted(scores))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
