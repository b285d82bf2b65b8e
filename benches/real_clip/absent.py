"""Queries that nothing answers: do their first results score lower than those of answerable queries?"""

import dataclasses

import numpy as np

from balancing import RAW
from measures import auroc_matrix, hits
from sets import divide, parts
from situations import NEW_DEFAULT, OLD_DEFAULT, QUARTER_SCALE, STRONG, lenders

# Ranked by the first, separated by the score of the second.
CONFIGURATIONS = {
    "raw": (RAW, RAW),
    str(OLD_DEFAULT): (OLD_DEFAULT, OLD_DEFAULT),
    str(NEW_DEFAULT): (NEW_DEFAULT, NEW_DEFAULT),
    str(STRONG): (STRONG, STRONG),
    f"{STRONG}, separated by the raw score": (STRONG, RAW),
    str(QUARTER_SCALE): (QUARTER_SCALE, QUARTER_SCALE),
}
KINDS = {
    "same": "things of the same domain that the catalogue does not have",
    "other": "things of another domain, of which the catalogue has nothing",
    "two": "things of a second domain, of which the catalogue has others and the bank no text",
}
# The share of answerable queries whose first results are shown in `shown`.
SHOWN_SHARE = 0.9
RESAMPLES = 400


@dataclasses.dataclass
class Separation:
    """What one configuration does with answerable and unanswerable queries."""

    auroc: float
    # Of the gain over plain CLIP, RESAMPLES means over queries drawn again.
    resampled: np.ndarray
    # Answerable queries whose first result is wrong.
    false_hits: float
    # Unanswerable queries whose score SHOWN_SHARE of the answerable ones reach.
    shown: float


def tasks(kind, clip_set, other, seed):
    """Returns the task of the answerable queries, and the queries that nothing answers.

    The texts are divided in three by target: queries, bank, and texts whose images leave the catalogue.
    """
    answerable, bank, removed = parts(clip_set, seed, 3)
    task = divide(clip_set, answerable, bank, removed)
    if kind == "same":
        return task, clip_set.texts[np.isin(clip_set.targets, removed)]
    if kind == "other":
        return task, other.texts
    kept, gone = parts(other, seed, 2)
    second = divide(other, kept, gone)
    nothing = np.zeros((len(task.queries), len(second.images)), dtype=bool)
    images, relevant = np.concatenate([task.images, second.images]), np.hstack([task.relevant, nothing])
    return dataclasses.replace(task, images=images, relevant=relevant), second.bank


def separate(kind, seeds, clip_set, other=None):
    """Returns a Separation per configuration, averaged over the divisions of as many seeds."""
    rng = np.random.default_rng(1)
    # How often each target is drawn is the same in every division.
    drawn_targets = rng.poisson(1, (RESAMPLES, len(clip_set.images)))
    found = {name: [] for name in CONFIGURATIONS}
    for seed in range(seeds):
        task, outside = tasks(kind, clip_set, other, seed)
        unanswerable = dataclasses.replace(task, queries=outside)
        unanswerable.__dict__["bank_scores"] = task.bank_scores
        drawn, drawn_outside = drawn_targets[:, task.targets], rng.poisson(1, (RESAMPLES, len(outside)))
        scores = {b: (b.scores(task), b.scores(unanswerable)) for pair in CONFIGURATIONS.values() for b in pair}
        for name, (ranking, separating) in CONFIGURATIONS.items():
            positive, negative = (best(*pair) for pair in zip(scores[ranking], scores[separating]))
            above = auroc_matrix(positive, negative)
            resampled = ((drawn @ above) * drawn_outside).sum(axis=1) / (drawn.sum(axis=1) * drawn_outside.sum(axis=1))
            shown = (negative >= np.quantile(positive, 1 - SHOWN_SHARE)).mean()
            found[name].append((above.mean(), resampled, 1 - hits(scores[ranking][0], task.relevant).mean(), shown))
    means = {name: [sum(column) / seeds for column in zip(*divisions)] for name, divisions in found.items()}
    raw = means["raw"][1]
    return {name: Separation(auroc, values - raw, *rest) for name, (auroc, values, *rest) in means.items()}


def best(ranking, separating):
    """Returns the separating score of each query's first image by the ranking scores."""
    return separating[np.arange(len(ranking)), ranking.argmax(axis=1)]


def all_separations(kind, sets, seeds):
    """Returns the Separation per configuration, by what is searched."""
    if kind == "same":
        return {clip_set.name: separate(kind, seeds, clip_set) for clip_set in sets}
    return {
        f"{other.name} in {clip_set.name}": separate(kind, seeds, clip_set, other)
        for clip_set in sets
        for other in lenders(clip_set, sets)
    }
