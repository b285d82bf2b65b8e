"""The rule that proposes a weight without judgements, and choices by leave-one-set-out."""

import dataclasses
import itertools
import re

import numpy as np

from balancing import RAW
from situations import NEW_DEFAULT, STRONG

# The largest loss of a case that a rule may have to be chosen.
MAX_LOSS = 0.02
# Rules whose mean gain is less than this below the best are taken as equal, and the middle one is chosen.
TIE = 0.001
GRID = {
    "low_fit": [-1.0, 0.1, 0.15, 0.2, 0.25, 0.3],
    "high_fit": [0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75],
    "max_concentration": [0.8, 0.9, 1.0, 1.1, 1.25],
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Proposes plain CLIP if fit is below `low_fit`; weight 0.5 if fit is at least `high_fit`, the bank has
    `min_texts` texts and its concentration is at most `max_concentration`; otherwise, and if fit is unknown
    (NaN), weight 0.25."""

    low_fit: float = 0.15
    high_fit: float = 0.5
    max_concentration: float = 1.0
    min_texts: int = 32

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


def group(situation):
    """Situations that count as one in the means that rules are chosen by."""
    return re.sub(r"^\d+ texts", "few texts", re.sub(r"^(mixed|searched) .*", r"\1", situation))


class Evidence:
    """Mean gains of all draws at the weights 0, 0.25 and 0.5 as arrays, so that many rules can be tried."""

    def __init__(self, draws):
        self.texts, self.fit, self.concentration = (
            np.array([getattr(draw, name) for draw in draws]) for name in ("texts", "fit", "concentration")
        )
        self.gains = np.array([[0.0, draw.gain(NEW_DEFAULT).mean(), draw.gain(STRONG).mean()] for draw in draws])
        labels = [(group(draw.situation), draw.situation, draw.case) for draw in draws]
        cases = sorted(set(labels))
        self.case_of = np.array([cases.index(label) for label in labels])
        groups = sorted({case[0] for case in cases})
        self.group_of = np.array([groups.index(case[0]) for case in cases])

    def judge(self, rule):
        """Returns the mean over groups of the mean gain of their cases, and the worst case."""
        strong = (self.fit >= rule.high_fit) & (self.texts >= rule.min_texts) & (self.concentration <= rule.max_concentration)
        weights = np.where(self.fit < rule.low_fit, 0, np.where(strong, 2, 1))
        gains = average(self.gains[np.arange(len(weights)), weights], self.case_of)
        return average(gains, self.group_of).mean(), gains.min()


def average(values, labels):
    return np.bincount(labels, values) / np.bincount(labels)


def choose_rule(draws):
    """Returns the middle, threshold by threshold, of the rules of GRID that gain most within TIE and lose at
    most MAX_LOSS in any case."""
    evidence = Evidence(draws)
    judged = [(rule, *evidence.judge(rule)) for rule in (Rule(*values) for values in itertools.product(*GRID.values()))]
    safe = [entry for entry in judged if entry[2] >= -MAX_LOSS] or judged
    best = max(gain for _, gain, _ in safe)
    equal = [rule for rule, gain, _ in safe if gain > best - TIE]
    return Rule(*(sorted(getattr(rule, name) for rule in equal)[(len(equal) - 1) // 2] for name in GRID))


def rules_without_each_set(draws):
    """Returns, per set, the rule chosen without any draw that searches it or takes its texts."""
    names = dict.fromkeys(draw.searched for draw in draws)
    return {name: choose_rule([draw for draw in draws if name not in (draw.searched, draw.bank)]) for name in names}


def smallest_size_without_loss(draws):
    """Returns the number of texts from which on no draw of a set's own texts lost by the weight 0.5, and per
    size the smallest and the mean gain of a draw."""
    by_size = {}
    for draw in draws:
        if draw.situation.endswith(" texts"):
            by_size.setdefault(draw.texts, []).append(draw.gain(STRONG).mean())
    losing = [size for size, gains in by_size.items() if min(gains) < 0]
    return min((size for size in by_size if size > max(losing, default=0)), default=None), {
        size: (min(gains), np.mean(gains)) for size, gains in sorted(by_size.items())
    }


class Choice:
    """Which of several configurations gains most: the mean over groups of situations of the mean over cases."""

    def __init__(self, draws, strategies, situations):
        self.strategies = strategies
        self.gains = {}
        for draw in draws:
            if draw.situation in situations:
                for name, choose in strategies.items():
                    key = (name, draw.situation, draw.searched, draw.case, draw.bank)
                    self.gains.setdefault(key, []).append(draw.gain(choose(draw)).mean())
        self.sets = list(dict.fromkeys(key[2] for key in self.gains))

    def mean(self, name, uses):
        """Mean of a strategy over the groups of situations, of those cases for which `uses(searched, bank)`."""
        groups = {}
        for (strategy, situation, searched, _, bank), gains in self.gains.items():
            if strategy == name and uses(searched, bank):
                groups.setdefault(group(situation), {}).setdefault(situation, []).append(np.mean(gains))
        return np.mean([np.mean([np.mean(cases) for cases in one.values()]) for one in groups.values()])

    def overall(self, name):
        return self.mean(name, lambda searched, bank: True)

    def on(self, name, held_out):
        """Mean on the held-out set."""
        return self.mean(name, lambda searched, bank: searched == held_out)

    def best_without(self, held_out):
        """The strategy that gains most without any case that searches the set or takes its texts."""
        return max(self.strategies, key=lambda name: self.mean(name, lambda *names: held_out not in names))
