"""`bsap evaluate arrays` against plain NumPy, which shares no code with it: on random arrays, and on
embeddings by real CLIP models if they are there (`$BSAP_REAL_CLIP`, or `../shared/real-clip`).

check.py runs these tests with its own.
"""

import csv
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

import numpy as np
import polars as pl

BSAP = sys.argv[1]
ROOT = pathlib.Path(__file__).resolve().parents[2]
REAL = pathlib.Path(os.environ.get("BSAP_REAL_CLIP", ROOT / "../shared/real-clip"))
REAL_SETS = ["amazon997", "coco500", "flickr8k", "imagenet4k"]
LOGIT_SCALE, FIT_K, MIN_FIT_QUERIES = 100.0, 16, 64
# One of each normaliser, with settings that no default has.
RUNS = {
    "nnn": {"normaliser": "nnn", "weight": 0.5, "top_k": 16},
    "nnn-few": {"normaliser": "nnn", "weight": 1, "top_k": 3, "lambda": 0.75},
    "softmax": {"normaliser": "softmax", "weight": 0.5, "temperature": 0.5},
    "softmax-own": {"normaliser": "softmax", "weight": 0.25, "temperature": 1},
    "zscore": {"normaliser": "zscore", "weight": 0.5},
    "range": {"normaliser": "range", "weight": 1},
}


def evaluate(folder, arrays, pairs, *more):
    """The JSON report, and α and β by run."""
    with open(folder / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["query", "image"], *pairs])
    arguments = [f"--{name}={source}" for name, source in arrays.items()]
    for name, run in RUNS.items():
        spec = ",".join(f"{key}={value}" for key, value in run.items())
        arguments += ["--configuration", f"{spec},name={name}"]
    arguments += ["--relevant", folder / "pairs.csv", "--json", folder / "report.json", "--transforms", folder / "ab"]
    done = subprocess.run([BSAP, "evaluate", "arrays", *map(str, [*arguments, *more])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    transforms = {path.stem: np.load(path) for path in (folder / "ab").glob("*.npy")}
    return json.loads((folder / "report.json").read_text()), transforms


def unit(array):
    array = np.asarray(array, dtype=np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def correction(scores):
    """Mean of the best sixteen scores of each row."""
    return np.sort(scores, axis=1)[:, -FIT_K:].mean(axis=1)


class Reference:
    """What NumPy computes from the same arrays."""

    def __init__(self, images, queries, prompts, pairs, unanswerable=None):
        self.images, self.queries, self.prompts = unit(images), unit(queries), unit(prompts)
        self.unanswerable = None if unanswerable is None else unit(unanswerable)
        self.right = [set() for _ in self.queries]
        for query, image in pairs:
            self.right[query].add(image)
        self.raw = self.queries @ self.images.T
        self.aux = self.images @ self.prompts.T

    def affine(self, run):
        """α and β with weight and scale constants."""
        aux, w = self.aux, run.get("weight", 0.25)
        scale = LOGIT_SCALE * run.get("temperature", 0.25)
        peak = aux.max(axis=1)
        lse = np.log(np.exp(scale * (aux - peak[:, None])).sum(axis=1)) / scale + peak
        mean, std = aux.mean(axis=1), np.maximum(aux.std(axis=1), 1e-3)
        low, width = aux.min(axis=1), np.maximum(peak - aux.min(axis=1), 1e-3)
        top = np.sort(aux, axis=1)[:, -run.get("top_k", 16) :].mean(axis=1)
        middle = lambda values: np.sort(values)[len(values) // 2]
        alpha, beta, c, m = {
            "raw": (1.0, 0.0, 1.0, 0.0),
            "softmax": (1.0, -lse, 1.0, 0.0),
            "zscore": (1 / std, -mean / std, middle(std), middle(mean)),
            "range": (1 / width, -low / width, middle(width), middle(low)),
            "nnn": (1.0, -run.get("lambda", 1) * top, 1.0, 0.0),
        }[run["normaliser"]]
        if run["normaliser"] == "raw":
            w = 0
        return w * c * alpha + (1 - w) + 0 * mean, w * (c * beta + m) + 0 * mean

    def measures(self, run):
        alpha, beta = self.affine(run)
        scores = alpha * self.raw + beta
        order = np.argsort(-scores, axis=1, kind="stable")
        values = {"hit_at_1": [], "recall_at_10": [], "map": []}
        for ranked, right in zip(order, self.right):
            if not right:
                continue
            ranks = np.flatnonzero(np.isin(ranked, list(right))) + 1
            values["hit_at_1"].append(float(ranks[0] == 1))
            values["recall_at_10"].append((ranks <= 10).sum() / len(right))
            values["map"].append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
        found = {name: np.mean(all) for name, all in values.items()}
        found["false_hits"] = 1 - found["hit_at_1"]
        if self.unanswerable is not None:
            judged = np.array([bool(right) for right in self.right])
            yes = scores.max(axis=1)[judged][:, None]
            no = (alpha * (self.unanswerable @ self.images.T) + beta).max(axis=1)[None, :]
            found["auroc"] = ((yes > no) + (yes == no) / 2).mean()
        return found

    def fit(self):
        return np.corrcoef(correction(self.aux), correction(self.raw.T))[0, 1]

    def concentration(self):
        own = correction(self.aux)
        return (own[self.raw.argmax(axis=1)].mean() - own.mean()) / own.std()


class Agreement(unittest.TestCase):
    def check(self, report, transforms, reference):
        runs = {run["name"]: run for run in report["runs"]}
        self.assertEqual(list(runs), ["raw", "default", *RUNS])
        raw = reference.measures({"normaliser": "raw"})
        for name, run in runs.items():
            expected = reference.measures(run)
            for measure, value in expected.items():
                self.assertAlmostEqual(run[measure], value, delta=1e-6, msg=f"{name} {measure}")
            for measure in ["hit_at_1", "recall_at_10", "map", "false_hits"]:
                gain = run["gain"][measure]
                self.assertAlmostEqual(gain["mean"], expected[measure] - raw[measure], delta=1e-6, msg=f"{name} {measure}")
                self.assertLessEqual(gain["low"], gain["mean"])
                self.assertGreaterEqual(gain["high"], gain["mean"])
            if name != "raw":
                for own, theirs in zip(transforms[name].T, reference.affine(run)):
                    np.testing.assert_allclose(own, theirs, rtol=0, atol=1e-6, err_msg=name)
        for name, settings in RUNS.items():
            for key, value in settings.items():
                self.assertEqual(runs[name][key], value)
        bank = report["bank"]
        self.assertEqual(bank["texts"], len(reference.prompts))
        if len(reference.queries) < MIN_FIT_QUERIES:
            self.assertIsNone(bank["fit"])
            return
        self.assertEqual(bank["fit"]["queries"], len(reference.queries))
        self.assertAlmostEqual(bank["fit"]["value"], reference.fit(), delta=1e-6)
        self.assertLess(bank["fit"]["low"], bank["fit"]["value"])
        self.assertGreater(bank["fit"]["high"], bank["fit"]["value"])
        self.assertAlmostEqual(bank["concentration"], reference.concentration(), delta=1e-6)


class RandomArrays(Agreement):
    """Clusters, so that rankings are neither perfect nor chance."""

    def arrays(self, seed, images, queries, prompts, dimension):
        rng = np.random.default_rng(seed)
        centre = rng.normal(size=dimension)
        topics = centre + rng.normal(size=(40, dimension))
        near = lambda n, noise: topics[rng.integers(40, size=n)] + noise * rng.normal(size=(n, dimension))
        pictures = near(images, 0.7) * rng.uniform(0.1, 9, size=(images, 1))
        right = [rng.choice(images, size=rng.integers(0, 5), replace=False) for _ in range(queries)]
        texts = np.array([pictures[r].mean(axis=0) if len(r) else topics[0] for r in right])
        texts = texts + rng.normal(size=texts.shape)
        pairs = [(query, int(image)) for query, all in enumerate(right) for image in all]
        rng.shuffle(pairs)
        return pictures, texts, near(prompts, 1.0), pairs, rng.normal(size=(70, dimension)) + centre

    def test_every_form_of_an_array_gives_what_numpy_computes(self):
        for seed, (sizes, kind) in enumerate([
            ((900, 150, 100, 64), np.float64),
            ((1000, 63, 9, 33), np.float32),
            ((500, 80, 1, 16), np.float16),
        ]):
            images, queries, prompts, pairs, none = (
                a.astype(kind) if isinstance(a, np.ndarray) else a for a in self.arrays(seed, *sizes)
            )
            reference = Reference(images, queries, prompts, pairs, none)
            with tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                np.save(folder / "images.npy", np.asfortranarray(images))
                np.savez_compressed(folder / "texts.npz", queries=queries, prompts=prompts)
                columns = {"id": list(range(len(none))), "vector": none.astype(np.float64).tolist()}
                pl.DataFrame(columns, schema_overrides={"vector": pl.List(pl.Float64)}).write_parquet(folder / "none.parquet")
                arrays = {
                    "images": folder / "images.npy",
                    "queries": f"{folder}/texts.npz:queries",
                    "prompts": f"{folder}/texts.npz:prompts",
                    "unanswerable": f"{folder}/none.parquet:vector",
                }
                self.check(*evaluate(folder, arrays, pairs), reference)

    def test_a_folder_of_clip_retrieval_is_read_in_the_order_of_its_parts(self):
        images, queries, prompts, pairs, _ = self.arrays(7, 600, 90, 40, 24)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for part in ["img_emb", "metadata", "q/text_emb", "q/metadata"]:
                (folder / part).mkdir(parents=True)
            for number, rows in enumerate(np.array_split(np.arange(600), 12)):
                np.save(folder / f"img_emb/img_emb_{number}.npy", images[rows].astype(np.float32))
                paths = [f"{row}.jpg" for row in rows]
                pl.DataFrame({"image_path": paths}).write_parquet(folder / f"metadata/metadata_{number}.parquet")
            np.save(folder / "q/text_emb/text_emb_0.npy", queries.astype(np.float32))
            captions = [f"caption {row}" for row in range(90)]
            pl.DataFrame({"caption": captions}).write_parquet(folder / "q/metadata/metadata_0.parquet")
            np.save(folder / "prompts.npy", prompts)
            arrays = {"images": folder, "queries": folder / "q", "prompts": folder / "prompts.npy"}
            report, transforms = evaluate(folder, arrays, pairs, "--report", folder / "report.html")
            reference = Reference(images.astype(np.float32), queries.astype(np.float32), prompts, pairs)
            self.check(report, transforms, reference)
            page = (folder / "report.html").read_text()
            self.assertIn(".jpg", page)
            self.assertIn("caption ", page)

    def test_wrong_inputs_are_refused_by_file_row_and_value(self):
        images, queries, prompts, pairs, _ = self.arrays(1, 50, 20, 10, 8)
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            good = {"images": images, "queries": queries, "prompts": prompts}
            broken = images.copy()
            broken[17, 3] = np.nan
            zero = queries.copy()
            zero[4] = 0
            header = [["query", "image"]]
            cases = [
                ("images", broken, "row 17: column 3: NaN"),
                ("images", images[:0], "(0, 8)"),
                ("images", images[0], "(8,)"),
                ("images", images.astype(np.int32), "<i4"),
                ("queries", zero, "row 4: all values are 0"),
                ("prompts", prompts[:, :7], "rows of 7 values"),
                ("relevant", header + [[0, 50]], "line 2: image 50"),
                ("relevant", header + [[0, 1], [20, 1]], "line 3: query 20"),
                ("relevant", header + [[0, 1], [0, 1]], "line 3: query 0 and image 1"),
                ("relevant", header + [["x", 1]], 'line 2: query "x"'),
                ("relevant", header, "no pairs"),
                ("relevant", [["image", "query"], [0, 1]], "line 1"),
            ]
            for name, bad, reason in cases:
                for other, array in good.items():
                    np.save(folder / f"{other}.npy", bad if other == name else array)
                with open(folder / "pairs.csv", "w", newline="") as file:
                    csv.writer(file).writerows(bad if name == "relevant" else header + pairs)
                arguments = [f"--{other}={folder}/{other}.npy" for other in good]
                arguments += ["--relevant", str(folder / "pairs.csv")]
                done = subprocess.run([BSAP, "evaluate", "arrays", *arguments], capture_output=True, text=True)
                self.assertEqual(done.returncode, 2, done.stderr)
                file = "pairs.csv" if name == "relevant" else f"{name}.npy"
                self.assertIn(file, done.stderr)
                self.assertIn(reason, done.stderr)
                self.assertEqual(done.stdout, "")


@unittest.skipUnless(REAL.is_dir(), f"{REAL} has no embeddings by real CLIP models")
class RealClip(Agreement):
    """Half of the texts as bank, the other half as queries, split by target image."""

    def test_the_four_sets_give_what_numpy_computes(self):
        for name in REAL_SETS:
            with self.subTest(name), tempfile.TemporaryDirectory() as folder:
                folder = pathlib.Path(folder)
                data = np.load(REAL / f"{name}.npz")
                images, texts, relevant = data["images"], data["texts"], data["relevant"]
                first = {}
                for text, image in relevant:
                    first.setdefault(int(text), int(image))
                order = np.random.default_rng(0).permutation(np.unique(list(first.values())))
                half = set(order[: len(order) // 2].tolist())
                queries = [text for text, image in first.items() if image in half]
                # A query that is a prompt too gives all images that it describes best one score under
                # `range`: an order of equal scores is nobody's.
                asked = {texts[query].tobytes() for query in queries}
                bank = [text for text, image in first.items() if image not in half]
                bank = [text for text in bank if texts[text].tobytes() not in asked]
                of_bank = {int(image) for text, image in relevant if int(text) in set(bank)}
                keep = [image for image in range(len(images)) if image not in of_bank]
                place = {image: row for row, image in enumerate(keep)}
                number = {text: row for row, text in enumerate(queries)}
                pairs = [
                    (number[int(text)], place[int(image)])
                    for text, image in relevant
                    if int(text) in number and int(image) in place
                ]
                arrays = {}
                for part, array in [("images", images[keep]), ("queries", texts[queries]), ("prompts", texts[bank])]:
                    arrays[part] = folder / f"{part}.npy"
                    np.save(arrays[part], array)
                reference = Reference(images[keep], texts[queries], texts[bank], pairs)
                report, transforms = evaluate(folder, arrays, pairs)
                self.check(report, transforms, reference)
                # What is proposed must not rank worse than plain CLIP in the domain.
                default = report["runs"][1]
                self.assertGreater(default["gain"]["hit_at_1"]["mean"], 0, name)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
