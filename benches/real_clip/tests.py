"""Tests of the measurements on real CLIP embeddings, on random embeddings: `python benches/real_clip/tests.py`."""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree

import numpy as np

import absent
import goals
from balancing import LOGIT_SCALE, MIN_SPREAD, Balance, concentration, fit
from measures import PairedGains, Summary, auroc_matrix, hits, rank_measures, student_quantile
from rule import Choice, Rule, choose_rule, rules_without_each_set, smallest_size_without_loss
from sets import ClipSet, Task, halves, normalise, searched_part
from situations import NEW_DEFAULT, STRONG, Draw, always, summarise

FOLDER = pathlib.Path(__file__).parent


def random_set(name="random", images=60, texts_per_image=1, searched=None, model="m", seed=0, dimension=16):
    """A set whose texts lie near their images."""
    rng = np.random.default_rng(seed)
    vectors = normalise(rng.normal(size=(images, dimension)))
    targets = np.repeat(np.arange(searched or images), texts_per_image)
    texts = normalise(vectors[targets] + 0.3 * rng.normal(size=(len(targets), dimension)))
    relevant = np.zeros((len(targets), images), dtype=bool)
    relevant[np.arange(len(targets)), targets] = True
    return ClipSet(name, model, vectors, texts, relevant)


def random_task(queries=70, images=40, bank=20, seed=0):
    rng = np.random.default_rng(seed)
    vectors = [normalise(rng.normal(size=(count, 8))) for count in (queries, images, bank)]
    relevant = rng.random((queries, images)) < 0.1
    relevant[np.arange(queries), rng.integers(images, size=queries)] = True
    return Task(*vectors[:2], relevant, vectors[2], relevant.argmax(axis=1))


class Divisions(unittest.TestCase):
    def test_no_image_has_a_text_on_both_sides(self):
        clip_set = random_set(texts_per_image=3)
        for task in halves(clip_set, 1):
            self.assertEqual(len(task.queries), 90)
            self.assertEqual(len(task.bank), 90)
            self.assertEqual(len(task.images), 30)
            self.assertTrue((task.relevant.sum(axis=1) == 1).all())
            bank = {tuple(text) for text in task.bank}
            self.assertFalse(bank & {tuple(text) for text in task.queries})
            described = {tuple(clip_set.images[clip_set.targets[i]]) for i, text in enumerate(clip_set.texts) if tuple(text) in bank}
            self.assertFalse(described & {tuple(image) for image in task.images})

    def test_every_image_that_answers_the_bank_leaves_the_catalogue(self):
        clip_set = random_set()
        clip_set.relevant[0, 30:] = True
        bank_has_it = [task for task in halves(clip_set, 0) if clip_set.texts[0] in task.bank]
        self.assertEqual(len(bank_has_it), 1)
        kept = {tuple(image) for image in bank_has_it[0].images}
        self.assertFalse(kept & {tuple(image) for image in clip_set.images[30:]})

    def test_a_bank_about_what_is_searched_describes_nothing_else(self):
        clip_set = random_set(images=200, texts_per_image=5, searched=20)
        for coverage, images in ((0.05, 1), (0.5, 10), (1, 20)):
            task = searched_part(clip_set, 3, coverage)
            self.assertEqual(len(task.images), 200)
            self.assertEqual(len(task.queries), 20)
            self.assertEqual(len(set(task.targets)), 20)
            self.assertEqual(len(task.bank), 4 * images)
            self.assertFalse({tuple(text) for text in task.bank} & {tuple(text) for text in task.queries})


class Formulas(unittest.TestCase):
    def test_normalisers_are_their_formulas(self):
        task, w = random_task(), 0.3
        for balance in [Balance("nnn", w, top_k=5), Balance("softmax", w, temperature=0.5), Balance("zscore", w), Balance("range", w)]:
            expected = np.empty_like(task.scores)
            rows = [sorted(float(text @ image) for text in task.bank) for image in task.images]
            spreads = [statistics.pstdev(row) if balance.normaliser == "zscore" else row[-1] - row[0] for row in rows]
            shifts = [statistics.mean(row) if balance.normaliser == "zscore" else row[0] for row in rows]
            middle = lambda values: sorted(values)[len(values) // 2]
            for image, row in enumerate(rows):
                for query in range(len(task.queries)):
                    s = float(task.queries[query] @ task.images[image])
                    if balance.normaliser == "nnn":
                        normalised = s - statistics.mean(row[-5:])
                    elif balance.normaliser == "softmax":
                        scale = 0.5 * LOGIT_SCALE
                        normalised = s - np.log(np.mean(np.exp(scale * np.array(row)))) / scale
                    else:
                        spread = max(spreads[image], MIN_SPREAD)
                        normalised = middle(spreads) * (s - shifts[image]) / spread + middle(shifts)
                    expected[query, image] = w * normalised + (1 - w) * s
            np.testing.assert_allclose(balance.scores(task), expected, atol=1e-12, err_msg=str(balance))

    def test_nnn_averages_all_scores_of_a_bank_smaller_than_k(self):
        task = random_task(bank=3)
        expected = task.scores - (task.images @ task.bank.T).mean(axis=1)
        np.testing.assert_allclose(Balance("nnn", 1, top_k=16).scores(task), expected)

    def test_fit_is_the_correlation_of_two_corrections(self):
        task = random_task()
        best = lambda values: statistics.mean(sorted(values)[-16:])
        bank = [best([float(image @ text) for text in task.bank]) for image in task.images]
        unjudged = [best([float(image @ query) for query in task.queries]) for image in task.images]
        self.assertAlmostEqual(fit(np.array(bank), task.scores), statistics.correlation(bank, unjudged), places=12)
        self.assertTrue(np.isnan(fit(np.array(bank), task.scores[:63])))

    def test_concentration_is_in_standard_deviations_of_the_catalogue(self):
        correction, first = [0.1, 0.2, 0.4, 0.5], [2, 3, 3]
        expected = (statistics.mean([0.4, 0.5, 0.5]) - 0.3) / statistics.pstdev(correction)
        self.assertAlmostEqual(concentration(np.array(correction), np.array(first)), expected)

    def test_no_candidate_looks_at_the_query(self):
        task = random_task(bank=150)
        for candidate in goals.CANDIDATES:
            shift = candidate.scores(task) - task.scores
            np.testing.assert_allclose(shift, np.broadcast_to(shift[0], shift.shape), atol=1e-12, err_msg=str(candidate))
            self.assertGreater(shift[0].std(), 0)


    def test_the_gate_opens_for_images_that_are_some_texts_best(self):
        task = random_task()
        best = {max(range(40), key=lambda image: float(text @ task.images[image])) for text in task.bank}
        opened = np.array([first in best for first in task.first_images])
        self.assertTrue(opened.any() and not opened.all())
        scores = goals.Gated(STRONG).scores(task)
        np.testing.assert_array_equal(scores[opened], STRONG.scores(task)[opened])
        np.testing.assert_array_equal(scores[~opened], task.scores[~opened])


class Measures(unittest.TestCase):
    def test_rank_measures_are_their_definitions(self):
        task = random_task()
        for query, (hit, recall, precision) in enumerate(rank_measures(task.scores, task.relevant).T):
            order = sorted(range(40), key=lambda image: -task.scores[query, image])
            right = [rank for rank, image in enumerate(order, start=1) if task.relevant[query, image]]
            self.assertEqual(hit, right[0] == 1)
            self.assertEqual(hit, hits(task.scores, task.relevant)[query])
            self.assertAlmostEqual(recall, sum(rank <= 10 for rank in right) / len(right))
            self.assertAlmostEqual(precision, statistics.mean(n / rank for n, rank in enumerate(right, start=1)))

    def test_auroc_counts_pairs(self):
        self.assertEqual(auroc_matrix(np.array([1.0, 2.0]), np.array([0.0, 1.0, 3.0])).mean(), (1 + 0.5 + 0 + 1 + 1 + 0) / 6)

    def test_intervals_between_sets_are_those_of_student(self):
        by_set = {}
        for name, value in zip("abcd", (0.01, 0.02, 0.03, 0.04)):
            by_set[name] = PairedGains()
            by_set[name].add(np.arange(50), np.full(50, value))
        summary = Summary(by_set)
        deviation = statistics.stdev((0.01, 0.02, 0.03, 0.04))
        self.assertAlmostEqual(summary.mean, 0.025)
        self.assertAlmostEqual(summary.sets[1] - summary.mean, 3.182 * deviation / 2)
        self.assertAlmostEqual(summary.mean - summary.further[0], 3.182 * deviation * 1.25**0.5)
        self.assertAlmostEqual(summary.queries[0], 0.025)
        self.assertAlmostEqual(student_quantile(30), 2.042, places=3)

    def test_intervals_over_queries_draw_targets_together(self):
        rng = np.random.default_rng(0)
        gains = rng.integers(-1, 2, size=100)
        apart, together = PairedGains(), PairedGains()
        apart.add(np.arange(500), np.repeat(gains, 5))
        together.add(np.repeat(np.arange(100), 5), np.repeat(gains, 5))
        width = lambda one: np.subtract(*Summary({"a": one}).queries[::-1])
        self.assertAlmostEqual(width(together) / width(apart), 5**0.5, delta=0.2)

    def test_balancing_that_knows_only_one_domain_separates_worse(self):
        sets = [random_set("a", images=90), random_set("b", images=90, seed=1)]
        # In their first dimension the domains differ, which the images' scores with a bank show.
        for one, sign in zip(sets, (4, -4)):
            for vectors in (one.images, one.texts):
                vectors[:, 0] = sign * abs(vectors[:, 0])
                vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        found = absent.separate("two", 3, *sets)
        self.assertLess(found[str(STRONG)].auroc, found["raw"].auroc - 0.05)
        self.assertEqual(found["raw"].resampled.std(), 0)
        self.assertLess(found[str(STRONG)].auroc, found[f"{STRONG}, separated by the raw score"].auroc - 0.05)


def draw_with(situation, searched, bank, fit_value, strong, weak, texts=100, concentrated=0.3):
    """A draw of 100 queries with these gains at the weights 0.5 and 0.25."""
    raw = np.arange(100) < 50
    gained = {STRONG: np.arange(100) < 50 + strong, NEW_DEFAULT: np.arange(100) < 50 + weak}
    known = (fit_value, concentrated)
    return Draw(situation, searched, bank, texts, *known, known, np.arange(100), {Balance(): raw, **gained})


class Choices(unittest.TestCase):
    def draws(self):
        found = []
        for name in "abc":
            found.append(draw_with("in-domain", name, name, 0.9, strong=6, weak=4))
            for other in "abc".replace(name, ""):
                found.append(draw_with("foreign", name, other, 0.05, strong=-6, weak=-1))
                found.append(draw_with("mixed 32, 10% own", name, other, 0.33, strong=-4, weak=1))
        return found

    def test_the_rule_separates_what_gains_from_what_loses(self):
        rule = choose_rule(self.draws())
        for draw in self.draws():
            gains = {0: 0.0, 0.25: draw.gain(NEW_DEFAULT).mean(), 0.5: draw.gain(STRONG).mean()}
            self.assertEqual(rule(draw).weight, max(gains, key=gains.get), draw.situation)

    def test_thresholds_do_not_see_the_set_that_is_left_out(self):
        draws = self.draws()
        poisoned = [draw_with(d.situation, d.searched, d.bank, d.fit, -40, 40) if "a" in (d.searched, d.bank) else d for d in draws]
        self.assertEqual(rules_without_each_set(draws)["a"], rules_without_each_set(poisoned)["a"])
        self.assertNotEqual(choose_rule(draws), choose_rule(poisoned))

    def test_the_proposal_is_cautious_about_what_it_does_not_know(self):
        rule = Rule()
        self.assertEqual(rule.choose(texts=100, fit=0.9, concentration=0.3).weight, 0.5)
        self.assertEqual(rule.choose(texts=8, fit=0.9, concentration=0.3).weight, 0.25)
        self.assertEqual(rule.choose(texts=100, fit=0.3, concentration=0.3).weight, 0.25)
        self.assertEqual(rule.choose(texts=100, fit=0.9, concentration=1.2).weight, 0.25)
        self.assertEqual(rule.choose(texts=100, fit=np.nan, concentration=0.3).weight, 0.25)
        self.assertEqual(rule.choose(texts=100, fit=0.1, concentration=0.3).weight, 0)

    def test_the_smallest_size_without_loss_is_above_every_losing_size(self):
        draws = [draw_with(f"{n} texts", "a", "a", 0.5, strong, 0, texts=n) for n, strong in ((8, -1), (16, 3), (32, -2), (64, 1), (64, 5))]
        size, by_size = smallest_size_without_loss(draws)
        self.assertEqual(size, 64)
        np.testing.assert_allclose(by_size[64], (0.01, 0.03))
        self.assertIsNone(smallest_size_without_loss(draws[:1])[0])

    def test_a_choice_weighs_groups_of_situations_equally(self):
        draws = [draw_with(s, "a", "a", 0.9, strong, 1) for s, strong in (("in-domain", 8), ("8 texts", 2), ("32 texts", 4))]
        choice = Choice(draws, {"strong": always(STRONG), "weak": always(NEW_DEFAULT)}, ["in-domain", "8 texts", "32 texts"])
        self.assertAlmostEqual(choice.overall("strong"), (0.08 + (0.02 + 0.04) / 2) / 2)
        self.assertAlmostEqual(summarise(draws[:1], always(STRONG), NEW_DEFAULT).mean, 0.07)


class Program(unittest.TestCase):
    def run_on(self, *arguments):
        return subprocess.run([sys.executable, FOLDER / "measure.py", *arguments], capture_output=True, text=True)

    def test_a_folder_without_sets_is_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            done = self.run_on(folder)
            self.assertEqual(done.returncode, 2)
            self.assertIn("has 0 .npz files", done.stderr)

    def test_all_tables_and_the_figure_are_written(self):
        with tempfile.TemporaryDirectory() as folder:
            folder = pathlib.Path(folder)
            for seed, name in enumerate(["imagenet4k", "flickr8k", "amazon997"]):
                clip_set = random_set(images=160, seed=seed)
                pairs = np.argwhere(clip_set.relevant)
                np.savez(folder / name, images=clip_set.images.astype(np.float16), texts=clip_set.texts.astype(np.float16), relevant=pairs)
            done = self.run_on(folder, "--seeds", "1", "--figure", folder / "figure.svg")
            self.assertEqual(done.stderr, "")
            self.assertEqual(done.returncode, 0)
            self.assertGreater(done.stdout.count("\n### "), 20)
            self.assertIn("amazon997 → imagenet4k", done.stdout)
            self.assertNotIn("nan", done.stdout.split("### Report")[1])
            figure = xml.etree.ElementTree.parse(folder / "figure.svg").getroot()
            self.assertEqual(len(figure.findall("{http://www.w3.org/2000/svg}g")), 3)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1], verbosity=2)
