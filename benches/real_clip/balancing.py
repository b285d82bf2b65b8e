"""Normalisers as `bsap` has them, and what can be said of a prompt bank without judgements."""

import dataclasses

import numpy as np

# L of every CLIP model by OpenAI.
LOGIT_SCALE = 100.0
# Smallest divisor of `zscore` and `range`.
MIN_SPREAD = 1e-3
# k of `nnn`, and of both corrections that fit compares.
TOP_K = 16
# With fewer unjudged queries fit says more about them than about the bank.
MIN_QUERIES = 64


@dataclasses.dataclass(frozen=True)
class Balance:
    """A configuration: formula, weight, and k (`nnn`) or the factor of the logit scale (`softmax`)."""

    normaliser: str = "raw"
    weight: float = 0.0
    top_k: int = TOP_K
    temperature: float = 1.0

    def __str__(self):
        detail = {"nnn": f" k {self.top_k}", "softmax": f" t {self.temperature:g}"}.get(self.normaliser, "")
        return f"{self.normaliser}{detail} w {self.weight:g}" if self.weight else "raw"

    def scores(self, task):
        """Returns α·s + β, queries × images."""
        if self.weight == 0:
            return task.scores
        alpha, beta = affine(self, task.bank_scores)
        return task.scores + beta if alpha is None else task.scores * alpha + beta


RAW = Balance()


def topk_mean(ascending, k=TOP_K):
    """Returns the mean of the k largest scores per row, of all if there are fewer."""
    return ascending[:, -k:].mean(axis=1)


def log_mean_exp(scores, scale, axis=1):
    """Returns log(mean(exp(scale · score))) / scale: the correction of `softmax`, apart from a constant."""
    peak = scores.max(axis=axis, keepdims=True)
    return np.log(np.exp(scale * (scores - peak)).mean(axis=axis)) / scale + peak.squeeze(axis)


def affine(balance, ascending):
    """Returns α (`None` if it is 1) and β of each image, weight included, from its ascending bank scores.

    `softmax` has the mean where `bsap` has the sum, which is the same constant less for every image.
    """
    w = balance.weight
    if balance.normaliser == "nnn":
        return None, -w * topk_mean(ascending, balance.top_k)
    if balance.normaliser == "softmax":
        return None, -w * log_mean_exp(ascending, balance.temperature * LOGIT_SCALE)
    if balance.normaliser == "zscore":
        shift, spread = ascending.mean(axis=1), ascending.std(axis=1)
    elif balance.normaliser == "range":
        shift, spread = ascending[:, 0], ascending[:, -1] - ascending[:, 0]
    else:
        raise ValueError(f"unknown normaliser {balance.normaliser}")
    spread = np.maximum(spread, MIN_SPREAD)
    factor = upper_median(spread)
    return w * factor / spread + 1 - w, w * (upper_median(shift) - factor * shift / spread)


def upper_median(values):
    return np.sort(values)[len(values) // 2]


def query_correction(scores, k=TOP_K):
    """Returns the mean of the k largest scores that each image has with the queries (queries × images)."""
    k = min(k, len(scores))
    return np.partition(scores, len(scores) - k, axis=0)[-k:].mean(axis=0)


def fit(bank_correction, scores):
    """Returns Pearson's correlation over the images of the bank's correction with that of unjudged queries.

    NaN below MIN_QUERIES queries (the rows of `scores`).
    """
    return np.corrcoef(bank_correction, query_correction(scores))[0, 1] if len(scores) >= MIN_QUERIES else np.nan


def concentration(bank_correction, first_images):
    """Returns by how many standard deviations of the catalogue's corrections (population) the mean
    correction of the queries' first images under plain CLIP is above the catalogue's mean."""
    return (bank_correction[first_images].mean() - bank_correction.mean()) / bank_correction.std()
