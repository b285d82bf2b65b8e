"""Rules beyond the served family. α is 1 and β does not depend on the query in all but the gated ones."""

import dataclasses
from collections.abc import Callable

import numpy as np

from balancing import LOGIT_SCALE, TOP_K, Balance, concentration, fit, log_mean_exp, topk_mean
from measures import PairedGains, Summary, hits
from sets import halves, sample
from situations import STRONG, lenders

# Of the bank, the share whose scores `nnn` averages in `tenth_of_bank`, and the least number of texts.
TENTH, MIN_TOP_K = 0.1, 8
# From this concentration on a bank is about what is searched.
CONCENTRATED = 0.75
# A second bank counts if its fit is at least this.
SECOND_FIT = 0.6
SECOND_SIZES = [8, 32, 128]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A rule: the correction of each image is taken from its scores, times the weight."""

    name: str
    correction: Callable
    weight: float

    def __str__(self):
        return f"{self.name} w {self.weight:g}"

    def scores(self, task):
        return task.scores - self.weight * self.correction(task)


def softmax(task, temperature):
    return log_mean_exp(task.bank_scores, temperature * LOGIT_SCALE)


def temperature_by_size(task):
    texts = len(task.bank)
    return softmax(task, 0.5 if texts >= 128 else 0.25 if texts >= 32 else 0.125)


def tenth_of_bank(task):
    """`nnn` whose k is a tenth of the bank."""
    return topk_mean(task.bank_scores, max(MIN_TOP_K, round(TENTH * len(task.bank))))


def mean_of_both(task):
    return (topk_mean(task.bank_scores) + softmax(task, 0.5)) / 2


def sinkhorn(task, temperature=0.25):
    """One pass of Sinkhorn's iteration: texts that are near to all images count less."""
    scores = task.images @ task.bank.T
    scale = temperature * LOGIT_SCALE
    return log_mean_exp(scores - log_mean_exp(scores, scale, axis=0), scale)


def by_kind_of_bank(task):
    """`nnn` with a tenth of the bank if it is about what is searched, softmax at half the logit scale and a
    higher weight if it is large, otherwise the mean of softmax at a quarter and `nnn`."""
    tenth = tenth_of_bank(task)
    if len(task.bank) >= 64 and concentration(tenth, task.first_images) >= CONCENTRATED:
        return tenth
    return 1.1 * softmax(task, 0.5) if len(task.bank) >= 128 else (softmax(task, 0.25) + tenth) / 2


CANDIDATES = [
    *(Candidate("softmax t 0.5", lambda task: softmax(task, 0.5), w) for w in (0.6, 0.7)),
    *(Candidate("softmax t by bank size", temperature_by_size, w) for w in (0.5, 0.6, 0.7)),
    *(Candidate(f"nnn k {TOP_K}", lambda task: topk_mean(task.bank_scores), w) for w in (0.6, 0.7)),
    *(Candidate("nnn, k a tenth of the bank", tenth_of_bank, w) for w in (0.5, 0.6)),
    *(Candidate("mean of nnn and softmax t 0.5", mean_of_both, w) for w in (0.5, 0.6)),
    *(Candidate("Sinkhorn t 0.25", sinkhorn, w) for w in (0.5, 0.6)),
    *(Candidate("by kind of bank", by_kind_of_bank, w) for w in (0.5, 0.6)),
]
# Of the candidates, those that gained most over all situations.
REPORTED = [candidate for candidate in CANDIDATES if candidate.name in ("by kind of bank", "nnn, k a tenth of the bank")]


@dataclasses.dataclass(frozen=True)
class Gated:
    """A query is balanced only if plain CLIP's first image is the best one of some text of the bank (the
    dynamic activation of QB-Norm)."""

    balance: Balance

    def __str__(self):
        return f"{self.balance}, gated"

    def scores(self, task):
        best = (task.bank @ task.images.T).argmax(axis=1)
        open_gate = np.isin(task.first_images, best)
        return np.where(open_gate[:, None], self.balance.scores(task), task.scores)


GATED = [Gated(STRONG), Gated(Balance("nnn", 1.0))]


def two_banks(sets, seeds):
    """Returns, per pair and size of the own bank, the Summary of what a second bank adds at weight 0.5.

    Its correction is averaged with that of the own bank, if its fit is at least SECOND_FIT.
    """
    found = {}
    for clip_set in sets:
        for other in lenders(clip_set, sets):
            for size in SECOND_SIZES:
                gains, second_fits = PairedGains(), []
                for seed in range(seeds):
                    for side, task in enumerate(halves(clip_set, seed)):
                        own = topk_mean(task.with_bank(sample(task.bank, size, [seed, side])).bank_scores)
                        second = topk_mean(task.with_bank(other.texts).bank_scores)
                        second_fits.append(fit(second, task.scores))
                        both = (own + second) / 2 if second_fits[-1] >= SECOND_FIT else own
                        alone, together = (hits(task.scores - STRONG.weight * c, task.relevant) for c in (own, both))
                        gains.add(task.targets, together.astype(np.int8) - alone)
                found[f"{other.name} + {size} of {clip_set.name}"] = (np.mean(second_fits), Summary({clip_set.name: gains}))
    return found
