"""Measures of rankings, and intervals of their means."""

import numpy as np

RESAMPLES = 2000
# Quantiles .975 of the normal distribution and, by degrees of freedom, of Student's t.
NORMAL, STUDENT = 1.95996, [None, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]


def student_quantile(freedom):
    """Returns the quantile .975 of Student's t; beyond the table by its expansion about the normal's."""
    z = NORMAL
    expansion = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return STUDENT[freedom] if freedom < len(STUDENT) else expansion


def spread_of(values):
    """Returns the smallest value, the mean and the largest one, NaN left out."""
    known = [value for value in values if value == value] or [np.nan]
    return min(known), sum(known) / len(known), max(known)


def hits(scores, relevant):
    """Returns whether the first result of each query is right."""
    return relevant[np.arange(len(scores)), scores.argmax(axis=1)]


def rank_measures(scores, relevant):
    """Returns hit@1, recall@10 and average precision per query."""
    ranked = np.take_along_axis(relevant, np.argsort(-scores, axis=1), axis=1)
    total = ranked.sum(axis=1)
    found = np.cumsum(ranked, axis=1)
    precision = found / np.arange(1, ranked.shape[1] + 1)
    return np.stack([ranked[:, 0], ranked[:, :10].sum(axis=1) / total, (precision * ranked).sum(axis=1) / total])


def auroc_matrix(positive, negative):
    """Returns 1 for each positive value (row) above a negative one (column), 0.5 for equal ones, otherwise 0.

    Its mean is the area under the ROC curve.
    """
    return (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)


class PairedGains:
    """Gains per query of one set, summed per target image, so that intervals can draw targets."""

    def __init__(self):
        self.sums, self.counts = {}, {}

    def add(self, targets, gains):
        for target, gain in zip(targets.tolist(), np.asarray(gains, dtype=float).tolist()):
            self.sums[target] = self.sums.get(target, 0.0) + gain
            self.counts[target] = self.counts.get(target, 0) + 1

    def mean(self):
        return sum(self.sums.values()) / sum(self.counts.values())

    def resampled_means(self, rng):
        """Returns the means of RESAMPLES bootstrap samples of the targets."""
        sums, counts = (np.array(list(values.values())) for values in (self.sums, self.counts))
        drawn = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
        return (drawn @ sums) / (drawn @ counts)


class Summary:
    """Mean gain over sets, with 95 % intervals.

    `queries` draws targets again within each set, and the sets stay. `sets` and `further` take the sets as a
    sample of all sets, by Student's t: of the mean, and of the gain on one further set.
    """

    def __init__(self, by_set):
        rng = np.random.default_rng(1)
        self.by_set = {name: gains.mean() for name, gains in by_set.items()}
        means = np.array(list(self.by_set.values()))
        self.mean, self.worst = means.mean(), means.min()
        self.queries = tuple(np.percentile(np.mean([g.resampled_means(rng) for g in by_set.values()], axis=0), [2.5, 97.5]))
        self.sets = self.further = None
        if len(means) > 1:
            spread = student_quantile(len(means) - 1) * means.std(ddof=1)
            self.sets = around(self.mean, spread / np.sqrt(len(means)))
            self.further = around(self.mean, spread * np.sqrt(1 + 1 / len(means)))


def around(middle, margin):
    return middle - margin, middle + margin
