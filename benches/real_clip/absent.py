"""Queries that nothing answers: do their best scores stay below those of answerable queries?"""

import dataclasses

import numpy as np

from balancing import RAW
from measures import auroc_matrix, hits
from sets import divide, parts
from situations import NEW_DEFAULT, OLD_DEFAULT, QUARTER_SCALE, SEEDS, STRONG, lenders

CONFIGURATIONS = [RAW, OLD_DEFAULT, NEW_DEFAULT, STRONG, QUARTER_SCALE]
# The share of answerable queries whose first results are shown in `shown`.
SHOWN_SHARE = 0.9
RESAMPLES = 200


@dataclasses.dataclass
class Separation:
    """What one configuration does with answerable and unanswerable queries of one set."""

    auroc: float
    # Gain over plain CLIP, with a 95 % interval over queries.
    gain: float
    low: float
    high: float
    # Answerable queries whose first result is wrong.
    false_hits: float
    # Unanswerable queries among those whose score SHOWN_SHARE of the answerable ones reach.
    shown: float


def separate(clip_set, other_texts=None):
    """Returns the Separation per configuration.

    The texts are divided in three by target: queries, bank, and texts whose images are taken out of the
    catalogue, which nothing answers then. `other_texts` replaces these by texts of another domain.
    """
    rng = np.random.default_rng(1)
    weights, found = {}, {balance: [] for balance in CONFIGURATIONS}
    for seed in range(SEEDS):
        answerable, bank, removed = parts(clip_set, seed, 3)
        task = divide(clip_set, answerable, bank, removed)
        outside = clip_set.texts[np.isin(clip_set.targets, removed)] if other_texts is None else other_texts
        nothing = dataclasses.replace(task, queries=outside)
        nothing.__dict__["bank_scores"] = task.bank_scores
        # Each query's weight in a resample is the same in every division, as its target is drawn once.
        drawn = weights.setdefault("answerable", rng.poisson(1, (RESAMPLES, len(clip_set.images))))[:, task.targets]
        drawn_outside = rng.poisson(1, (RESAMPLES, len(outside)))
        for balance in CONFIGURATIONS:
            scores = balance.scores(task)
            positive, negative = scores.max(axis=1), balance.scores(nothing).max(axis=1)
            above = auroc_matrix(positive, negative)
            resampled = ((drawn @ above) * drawn_outside).sum(axis=1) / (drawn.sum(axis=1) * drawn_outside.sum(axis=1))
            threshold = np.quantile(positive, 1 - SHOWN_SHARE)
            false_hits = 1 - hits(scores, task.relevant).mean()
            found[balance].append((above.mean(), resampled, false_hits, (negative >= threshold).mean()))
    return {balance: combine(found[balance], found[RAW]) for balance in CONFIGURATIONS}


def combine(divisions, raw):
    """Averages the divisions of one configuration, and compares it with plain CLIP."""
    mean = lambda entries, place: np.mean([entry[place] for entry in entries], axis=0)
    low, high = np.percentile(mean(divisions, 1) - mean(raw, 1), [2.5, 97.5])
    auroc = mean(divisions, 0)
    return Separation(auroc, auroc - mean(raw, 0), low, high, mean(divisions, 2), mean(divisions, 3))


def all_separations(sets):
    """Returns name and Separation per configuration: of absent things of the same domain, then of another."""
    same = {clip_set.name: separate(clip_set) for clip_set in sets}
    foreign = {
        f"{other.name} in {clip_set.name}": separate(clip_set, other.texts)
        for clip_set in sets
        for other in lenders(clip_set, sets)
    }
    return same, foreign
