"""Normalisers as `bsap` has them, and what can be said of a prompt bank without judgements."""

import dataclasses

import numpy as np

# L of every CLIP model by OpenAI.
LOGIT_SCALE = 100.0
# Smallest divisor of `zscore` and `range`.
MIN_SPREAD = 1e-3
# k of `nnn`, and of both corrections that fit compares.
TOP_K = 16


@dataclasses.dataclass(frozen=True)
class Balance:
    """A configuration: formula, weight, and k (`nnn`) or the factor of the logit scale (`softmax`)."""

    normaliser: str = "raw"
    weight: float = 0.0
    top_k: int = TOP_K
    temperature: float = 1.0

    def __str__(self):
        if self.weight == 0:
            return "raw"
        detail = {"nnn": f" k {self.top_k}", "softmax": f" t {self.temperature:g}"}.get(self.normaliser, "")
        return f"{self.normaliser}{detail}, {self.weight:g}"


RAW = Balance()


def topk_mean(ascending, k=TOP_K):
    """Returns the mean of the k largest scores per row, of all if there are fewer."""
    return ascending[:, -k:].mean(axis=1)


def log_mean_exp(scores, scale, axis=1):
    """Returns log(mean(exp(scale · score))) / scale: softmax's correction, apart from a constant."""
    peak = scores.max(axis=axis, keepdims=True)
    return np.log(np.exp(scale * (scores - peak)).mean(axis=axis)) / scale + peak.squeeze(axis)


def affine(balance, ascending):
    """Returns α and β of each image, weight included, from its scores with the bank in ascending order.

    `softmax` has the mean where `bsap` has the sum: the same constant less for every image.
    """
    w, ones = balance.weight, np.ones(len(ascending))
    if w == 0:
        return ones, np.zeros(len(ascending))
    if balance.normaliser == "nnn":
        return ones, -w * topk_mean(ascending, balance.top_k)
    if balance.normaliser == "softmax":
        return ones, -w * log_mean_exp(ascending, balance.temperature * LOGIT_SCALE)
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


def balanced_scores(balance, task):
    """Returns α·s + β, queries × images."""
    if balance.weight == 0:
        return task.scores
    alpha, beta = affine(balance, task.bank_scores)
    return task.scores + beta if balance.normaliser in ("nnn", "softmax") else task.scores * alpha + beta


def query_correction(scores, k=TOP_K):
    """Returns the mean of the k largest scores that each image has with the queries (queries × images)."""
    k = min(k, len(scores))
    return np.partition(scores, len(scores) - k, axis=0)[-k:].mean(axis=0)


def fit(bank_correction, unjudged_correction):
    """Returns Pearson's correlation over the images of the bank's correction with that of unjudged queries."""
    return np.corrcoef(bank_correction, unjudged_correction)[0, 1]


def concentration(bank_correction, first_images):
    """Returns the mean correction of the queries' first images under plain CLIP less the catalogue's mean,
    in standard deviations (population) of the catalogue's corrections."""
    return (bank_correction[first_images].mean() - bank_correction.mean()) / bank_correction.std()
