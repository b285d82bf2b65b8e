"""The rule that proposes a weight without judgements, and how its thresholds were chosen."""

import dataclasses
import itertools
import re

import numpy as np

from balancing import RAW
from situations import NEW_DEFAULT, STRONG

# The largest loss of a case that a rule may have to be chosen.
MAX_LOSS = 0.02
# Rules whose mean gain differs by less are equal, and the most cautious of them is taken.
TIE = 0.001
GRID = {
    "min_texts": [1, 8, 16, 32, 64, 128],
    "low_fit": [-1.0, 0.1, 0.15, 0.2, 0.25, 0.3],
    "high_fit": [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75],
    "max_concentration": [0.8, 0.9, 1.0, 1.1, 1.25],
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Proposes plain CLIP below `low_fit`, weight 0.5 if fit is at least `high_fit`, the bank has at least
    `min_texts` texts and its concentration is at most `max_concentration`, otherwise 0.25."""

    min_texts: int = 32
    low_fit: float = 0.2
    high_fit: float = 0.55
    max_concentration: float = 1.0

    def choose(self, texts, fit, concentration):
        if fit < self.low_fit:
            return RAW
        strong = fit >= self.high_fit and texts >= self.min_texts and concentration <= self.max_concentration
        return STRONG if strong else NEW_DEFAULT

    def __call__(self, draw):
        return self.choose(draw.texts, draw.fit, draw.concentration)

    def with_few_queries(self, draw):
        return self.choose(draw.texts, *draw.few)


PROPOSAL = Rule()


def group(draw):
    """Situations that count as one in the mean that rules are chosen by."""
    return re.sub(r"\d+ texts", "few texts", re.sub(r"^(mixed|searched) .*", r"\1", draw.situation))


class Evidence:
    """Mean gains of all draws as arrays, so that many rules can be tried."""

    def __init__(self, draws):
        self.draws = draws
        self.texts, self.fit, self.concentration = (
            np.array([getattr(draw, name) for draw in draws]) for name in ("texts", "fit", "concentration")
        )
        # Of weight 0, 0.25 and 0.5.
        self.gains = np.array([[0.0, draw.gain(NEW_DEFAULT).mean(), draw.gain(STRONG).mean()] for draw in draws])
        self.cases, self.case_of = np.unique([f"{draw.situation}|{draw.case}" for draw in draws], return_inverse=True)
        first = [np.flatnonzero(self.case_of == case)[0] for case in range(len(self.cases))]
        self.groups, self.group_of = np.unique([group(draws[place]) for place in first], return_inverse=True)

    def weights(self, rule):
        strong = (self.fit >= rule.high_fit) & (self.texts >= rule.min_texts) & (self.concentration <= rule.max_concentration)
        return np.where(self.fit < rule.low_fit, 0, np.where(strong, 2, 1))

    def judge(self, rule):
        """Returns the mean over groups of the mean gain of their cases, the worst case, and the mean weight."""
        weights = self.weights(rule)
        gains = average(self.gains[np.arange(len(weights)), weights], self.case_of)
        return average(gains, self.group_of).mean(), gains.min(), average(average(weights, self.case_of), self.group_of).mean()


def average(values, labels):
    return np.bincount(labels, values) / np.bincount(labels)


def choose_rule(draws):
    """Returns the rule of GRID with the largest mean gain among those that lose at most MAX_LOSS anywhere;
    of equal ones, the most cautious."""
    evidence = Evidence(draws)
    rules = [Rule(*values) for values in itertools.product(*GRID.values())]
    judged = [(rule, *evidence.judge(rule)) for rule in rules]
    safe = [entry for entry in judged if entry[2] >= -MAX_LOSS] or judged
    best = max(entry[1] for entry in safe)
    return min((entry for entry in safe if entry[1] > best - TIE), key=lambda entry: entry[3])[0]


def leave_one_set_out(draws):
    """Returns, per set, the rule chosen without any draw that searches it or takes its texts."""
    names = sorted({draw.searched for draw in draws})
    return {name: choose_rule([draw for draw in draws if name not in (draw.searched, draw.bank)]) for name in names}
