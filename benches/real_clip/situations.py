"""The situations in which banks are tried, and what every configuration did in each draw of them."""

import dataclasses

import numpy as np

from balancing import RAW, Balance, concentration, fit, topk_mean
from measures import PairedGains, Summary, hits
from sets import halves, sample, searched_part, whole

BANK_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
COVERAGES = [0.01, 0.05, 0.2, 1.0]
# Shares of texts of the queries' own domain in a bank whose other texts are from another, and its sizes.
OWN_SHARES = [0.05, 0.1, 0.2, 0.5]
MIXED_SIZES = [32, 128]
# With how many queries fit and concentration are measured again, to see what they lose.
FEW_QUERIES = 64

OLD_DEFAULT = Balance("softmax", 0.25)
NEW_DEFAULT = Balance("nnn", 0.25)
STRONG = Balance("nnn", 0.5)
HALF_SCALE = Balance("softmax", 0.5, temperature=0.5)
QUARTER_SCALE = Balance("softmax", 0.5, temperature=0.25)
EIGHTH_SCALE = Balance("softmax", 0.5, temperature=0.125)
CONFIGURATIONS = [
    OLD_DEFAULT,
    Balance("softmax", 0.5),
    Balance("softmax", 1.0),
    *(Balance("softmax", w, temperature=t) for t in (0.5, 0.25) for w in (0.25, 0.5, 0.75)),
    EIGHTH_SCALE,
    *(Balance("nnn", w) for w in (0.25, 0.5, 1.0)),
    *(Balance("nnn", 0.5, top_k=k) for k in (8, 32)),
    *(Balance("zscore", w) for w in (0.25, 0.5, 1.0)),
    Balance("range", 0.25),
    Balance("range", 1.0),
]


@dataclasses.dataclass
class Draw:
    """One task of a situation: what is known of its bank, and the hits of every configuration."""

    situation: str
    # The set that is searched, and the one that the bank's texts are from.
    searched: str
    bank: str
    texts: int
    fit: float
    concentration: float
    # Fit and concentration by FEW_QUERIES of the queries.
    few: tuple
    targets: np.ndarray
    # Whether the first result is right, per configuration and query.
    hits: dict

    @property
    def case(self):
        """What is searched with which bank; draws of one case are averaged."""
        return self.searched if self.bank == self.searched else f"{self.bank} → {self.searched}"

    def gain(self, balance, baseline=RAW):
        """Gain of hit@1 per query: −1, 0 or 1."""
        return self.hits[balance].astype(np.int8) - self.hits[baseline]


def draw(situation, searched, bank, task, configurations):
    """Tries all configurations on a task."""
    correction = topk_mean(task.bank_scores)
    few = np.random.default_rng(0).permutation(len(task.queries))[:FEW_QUERIES]
    return Draw(
        situation=situation,
        searched=searched,
        bank=bank,
        texts=len(task.bank),
        fit=fit(correction, task.scores),
        concentration=concentration(correction, task.first_images),
        few=(fit(correction, task.scores[few]), concentration(correction, task.first_images[few])),
        targets=task.targets,
        hits={balance: hits(balance.scores(task), task.relevant) for balance in [RAW, *configurations]},
    )


def lenders(clip_set, sets):
    """Returns the other sets of the same model."""
    return [other for other in sets if other.model == clip_set.model and other.name != clip_set.name]


def tasks(sets, seeds):
    """Yields situation, searched set, set of the bank's texts, and task of every draw.

    in-domain   half of a set's texts are the bank, the other half queries
    N texts     the same with N texts of the bank's half
    foreign     all texts of one set are the bank of another
    mixed       a share of the bank's half, the other texts from another set
    searched S  a bank about the share S of the searched images alone
    """
    for clip_set in sets:
        name = clip_set.name
        for seed in range(seeds):
            for side, task in enumerate(halves(clip_set, seed)):
                yield "in-domain", name, name, task
                for size in [size for size in BANK_SIZES if size < len(task.bank)]:
                    yield f"{size} texts", name, name, task.with_bank(sample(task.bank, size, [seed, side]))
                for other in lenders(clip_set, sets):
                    for size in MIXED_SIZES:
                        for share in OWN_SHARES:
                            own = round(share * size)
                            texts = [sample(task.bank, own, [seed, side]), sample(other.texts, size - own, [seed, side])]
                            yield f"mixed {size}, {share:.0%} own", name, other.name, task.with_bank(np.concatenate(texts))
            for coverage in COVERAGES:
                yield f"searched {coverage:.0%}", name, name, searched_part(clip_set, seed, coverage)
        for other in lenders(clip_set, sets):
            yield "foreign", name, other.name, whole(clip_set, other.texts)


def all_draws(sets, rules, seeds):
    """Tries CONFIGURATIONS and further rules in every situation; mixed banks only for the rule of the weight."""
    few, all_of_them = [NEW_DEFAULT, STRONG], [*CONFIGURATIONS, *rules]
    return [draw(*task, few if task[0].startswith("mixed") else all_of_them) for task in tasks(sets, seeds)]


def summarise(draws, choose, baseline=RAW):
    """Returns the Summary over cases of the gain of `choose(draw)` over a configuration."""
    by_case = {}
    for one in draws:
        by_case.setdefault(one.case, PairedGains()).add(one.targets, one.gain(choose(one), baseline))
    return Summary(by_case)


def always(configuration):
    return lambda draw: configuration


def softmax_by_size(draw):
    """Half the logit scale from 128 texts on, a quarter from 32 on, otherwise an eighth."""
    return HALF_SCALE if draw.texts >= 128 else QUARTER_SCALE if draw.texts >= 32 else EIGHTH_SCALE
