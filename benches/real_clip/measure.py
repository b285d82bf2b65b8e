#!/usr/bin/env python3
"""What balancing gains on embeddings by real CLIP models: the tables and the figure of docs/balancing.md.

    measure.py [FOLDER] [--figure FILE] [--seeds N]

FOLDER (../shared/real-clip next to the repository) has .npz files with `images` and `texts` (unit vectors)
and `relevant` (pairs of text and image). Each set is divided by target image into queries and a prompt
bank, both ways, with several seeds; the images that the bank describes leave the catalogue. Every figure
is the gain of hit@1 over plain CLIP if nothing else is said.
"""

import argparse
import pathlib

import numpy as np

import absent
import goals
from balancing import RAW
from figure import draw_figure
from measures import PairedGains, Summary, rank_measures, spread_of
from rule import PROPOSAL, Choice, choose_rule, group, rules_without_each_set, smallest_size_without_loss
from sets import halves, load
from situations import (
    BANK_SIZES, CONFIGURATIONS, COVERAGES, HALF_SCALE, NEW_DEFAULT, OLD_DEFAULT, QUARTER_SCALE, STRONG,
    all_draws, always, softmax_by_size, summarise,
)  # fmt: skip

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT.parent / "shared/real-clip"
SITUATIONS = ["in-domain", "128 texts", "32 texts", "8 texts", "searched 100%", "foreign"]


def signed(value):
    return f"{value:+.3f}".replace("-", "−")


def interval(bounds):
    return f"{signed(bounds[0])} to {signed(bounds[1])}" if bounds else ""


def table(title, header, rows):
    """Prints a table in Markdown."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---" for _ in header) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def of(draws, situation):
    return [draw for draw in draws if draw.situation == situation]


def present(draws, situations):
    """Returns the situations that occur: without two sets of one model there is no foreign bank."""
    return [situation for situation in situations if of(draws, situation)]


def by_set_table(title, draws, strategies):
    """Prints the gain per case of each strategy, the mean with both intervals, and the worst case."""
    rows, header = [], []
    for name, choose in strategies.items():
        summary = summarise(draws, choose)
        header = ["", *summary.by_set, "mean", "95 %, queries", "95 %, sets", "95 %, a further set", "worst"]
        gains = [signed(gain) for gain in summary.by_set.values()]
        intervals = [interval(bounds) for bounds in (summary.queries, summary.sets, summary.further)]
        rows.append([name, *gains, signed(summary.mean), *intervals, signed(summary.worst)])
    table(title, header, rows)


def print_situations(draws):
    strategies = {str(balance): always(balance) for balance in CONFIGURATIONS}
    strategies["softmax t by bank size w 0.5"] = softmax_by_size
    raw = {draw.case: np.mean([d.hits[RAW].mean() for d in of(draws, "in-domain") if d.case == draw.case]) for draw in of(draws, "in-domain")}
    table("hit@1 of plain CLIP in the halves", list(raw), [[f"{value:.3f}" for value in raw.values()]])
    titles = {
        "in-domain": "Banks of the same domain: half of the set's texts",
        "searched 100%": "Banks about the searched images alone (a tenth of the catalogue)",
        "foreign": "Banks of another domain",
    }
    for situation in present(draws, SITUATIONS):
        by_set_table(titles.get(situation, f"Banks of {situation}"), of(draws, situation), strategies)


def print_curves(draws):
    shown = [OLD_DEFAULT, NEW_DEFAULT, STRONG, HALF_SCALE, QUARTER_SCALE]
    for title, situations in {
        "Gain by size of the bank": present(draws, [f"{size} texts" for size in BANK_SIZES]),
        "Gain by share of the searched images that the bank describes": [f"searched {coverage:.0%}" for coverage in COVERAGES],
    }.items():
        rows = []
        for situation in situations:
            found = of(draws, situation)
            summaries = [summarise(found, always(balance)) for balance in shown]
            known = [f"{spread_of(getattr(draw, name) for draw in found)[1]:.2f}" for name in ("fit", "concentration")]
            rows.append([situation, *known, *(f"{signed(s.mean)}, worst {signed(s.worst)}" for s in summaries)])
        table(title, ["", "fit", "concentration", *map(str, shown)], rows)


def print_normaliser_choice(draws):
    """Which normaliser leave-one-set-out prefers at weight 0.5, and which temperature of softmax."""
    rivals = {str(STRONG): always(STRONG), "softmax t by bank size w 0.5": softmax_by_size}
    temperatures = [balance for balance in CONFIGURATIONS if balance.normaliser == "softmax" and balance.weight == 0.5]
    rows = []
    for title, strategies in {
        "normaliser": rivals,
        "temperature": {str(balance): always(balance) for balance in temperatures},
    }.items():
        for situations in (found := present(draws, SITUATIONS), [s for s in found if s != "searched 100%"]):
            choice = Choice(draws, strategies, situations)
            means = ", ".join(f"{name}: {signed(choice.overall(name))}" for name in strategies)
            chosen = {name: choice.best_without(name) for name in choice.sets}
            held_out = ", ".join(f"{name}: {best} ({signed(choice.on(best, name))})" for name, best in chosen.items())
            rows.append([title, "all" if situations is found else "without searched", means, held_out])
    table("Choice by leave-one-set-out at weight 0.5", ["of", "situations", "mean over situations", "chosen without the set (gain on it)"], rows)


def print_rule(draws):
    chosen = rules_without_each_set(draws)
    size, by_size = smallest_size_without_loss(draws)
    table(f"Draws of a set's own texts at weight 0.5: none loses from {size} texts on", ["texts", "worst draw", "mean"],
          [[texts, *map(signed, values)] for texts, values in by_size.items()])  # fmt: skip
    print(f"\nThe rule of docs/balancing.md: {PROPOSAL}\n")
    print(f"- chosen on all sets: {choose_rule(draws)}")
    for name, rule in chosen.items():
        print(f"- chosen without {name}: {rule}")
    strategies = {
        "plain CLIP": always(RAW), "old default": always(OLD_DEFAULT), "new default": always(NEW_DEFAULT), str(STRONG): always(STRONG),
        "proposal": PROPOSAL, "proposal, fit by 64 queries": PROPOSAL.with_few_queries,
        "thresholds chosen without the set": lambda draw: chosen[draw.searched](draw),
    }  # fmt: skip
    for situation in present(draws, ["in-domain", "foreign", "searched 100%"]):
        by_set_table(f"Proposed weight: {situation}", of(draws, situation), strategies)
    rows = []
    for kind in dict.fromkeys(group(draw.situation) for draw in draws):
        found = [draw for draw in draws if group(draw.situation) == kind]
        ranges = [spread_of(getattr(draw, name) for draw in found) for name in ("fit", "concentration")]
        shares = [np.mean([PROPOSAL(draw).weight == weight for draw in found]) for weight in (0, 0.25, 0.5)]
        rows.append([kind, *(" / ".join(f"{value:.2f}" for value in values) for values in ranges), *(f"{share:.0%}" for share in shares)])
    table("What the rule sees and proposes", ["", "fit: least / mean / most", "concentration", "weight 0", "0.25", "0.5"], rows)


def print_report(draws):
    strategies = {
        "plain CLIP": always(RAW), "old default": always(OLD_DEFAULT), "new default": always(NEW_DEFAULT),
        "proposed weight": PROPOSAL, **{str(rule): always(rule) for rule in goals.REPORTED},
    }  # fmt: skip
    situations = present(draws, ["in-domain", "32 texts", "8 texts", "searched 100%", "foreign"])
    for title, baseline in {"Report: gain over plain CLIP": RAW, "Report: gain over the old default": OLD_DEFAULT}.items():
        rows = []
        for name, choose in strategies.items():
            summaries = [summarise(of(draws, situation), choose, baseline) for situation in situations]
            rows.append([name, *(f"{signed(s.mean)} ({interval(s.queries)}), worst {signed(s.worst)}" for s in summaries)])
        table(title, ["", *situations], rows)


def print_ranking_measures(sets, seeds):
    """hit@1, recall@10 and mAP in domain, and what keeping plain CLIP's first result costs."""
    gains = {}
    for clip_set in sets:
        for seed in range(seeds):
            for task in halves(clip_set, seed):
                raw = rank_measures(task.scores, task.relevant)
                strong = STRONG.scores(task)
                kept = strong.copy()
                kept[np.arange(len(kept)), task.first_images] = np.inf
                tried = {str(b): b.scores(task) for b in (OLD_DEFAULT, NEW_DEFAULT, HALF_SCALE)}
                for name, scores in {**tried, str(STRONG): strong, f"{STRONG}, first result kept": kept}.items():
                    for measure, gain in zip(("hit@1", "recall@10", "mAP"), rank_measures(scores, task.relevant) - raw):
                        gains.setdefault((name, measure), {}).setdefault(clip_set.name, PairedGains()).add(task.targets, gain)
    rows = {}
    for (name, measure), by_set in gains.items():
        summary = Summary(by_set)
        rows.setdefault(name, [name]).append(f"{signed(summary.mean)} ({interval(summary.queries)})")
    table("Measures in domain (95 % over queries)", ["", "hit@1", "recall@10", "mAP"], rows.values())


def print_absent(sets, seeds):
    for kind, title in absent.KINDS.items():
        found = absent.all_separations(kind, sets, seeds)
        rows = []
        for name in absent.CONFIGURATIONS if found else []:
            each = {case: separations[name] for case, separations in found.items()}
            gains = {case: one.auroc - found[case]["raw"].auroc for case, one in each.items()}
            bounds = np.percentile(np.mean([one.resampled for one in each.values()], axis=0), [2.5, 97.5])
            means = [np.mean([getattr(one, measure) for one in each.values()]) for measure in ("auroc", "false_hits", "shown")]
            worst = min(gains, key=gains.get)
            gain = f"{signed(np.mean(list(gains.values())))} ({interval(tuple(bounds))})"
            rows.append([name, *(f"{value:.3f}" for value in means), gain, f"{signed(gains[worst])} ({worst})"])
        shown = f"shown with {absent.SHOWN_SHARE:.0%} of the answerable"
        table(f"Queries for {title}", ["", "AUROC", "false first hits of the answerable", shown, "gain of AUROC", "worst"], rows)


def print_goals(sets, draws, seeds):
    """Rules that are not served, against `nnn` and softmax at half the logit scale, both at weight 0.5."""
    references = {str(STRONG): always(STRONG), str(HALF_SCALE): always(HALF_SCALE)}
    strategies = {**references, **{str(candidate): always(candidate) for candidate in goals.CANDIDATES}}
    gated = {str(rule): always(rule) for rule in goals.GATED}
    rows, found = [], present(draws, SITUATIONS)
    for name, choose in {**strategies, **gated}.items():
        summaries = [summarise(of(draws, situation), choose) for situation in found]
        rows.append([name, *(f"{signed(s.mean)}, worst {signed(s.worst)}" for s in summaries)])
    table("Rules that are not served", ["", *found], rows)
    rows = []
    for situations in (["in-domain"], [s for s in found if s != "foreign"]):
        choice = Choice(draws, strategies, situations)
        best = {name: choice.best_without(name) for name in choice.sets}
        for reference in references:
            differences = [choice.on(best[name], name) - choice.on(reference, name) for name in choice.sets]
            low_high = Summary({name: one_gain(value) for name, value in zip(choice.sets, differences)}).sets
            chosen = ", ".join(f"{name}: {best[name]} ({signed(value)})" for name, value in zip(choice.sets, differences))
            rows.append([", ".join(situations), reference, chosen, signed(np.mean(differences)), interval(low_high)])
    table("The rule chosen without a set, on that set", ["situations", "against", "chosen (difference)", "mean", "95 %, sets"], rows)
    rows = [[name, f"{fit:.2f}", signed(s.mean), interval(s.queries)] for name, (fit, s) in goals.two_banks(sets, seeds).items()]
    table("A second bank whose fit is high enough", ["", "its fit", "gain over one bank", "95 %, queries"], rows)


def one_gain(value):
    gains = PairedGains()
    gains.add(np.array([0]), [value])
    return gains


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="folder with .npz files")
    parser.add_argument("--seeds", type=int, default=6, help="how many divisions of each set (6)")
    parser.add_argument("--figure", type=pathlib.Path, help="write the figure to this SVG file")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: give 1 or more")
    folder = arguments.folder or FOLDER
    files = sorted(folder.glob("*.npz"))
    if len(files) < 2:
        message = f"{folder} has {len(files)} .npz files: name a folder with the embeddings of two sets or more"
        if arguments.folder:
            parser.error(message)
        print(f"skipped: {message}")
        return
    sets = [load(file) for file in files]
    draws = all_draws(sets, [*goals.CANDIDATES, *goals.GATED], arguments.seeds)
    if arguments.figure:
        arguments.figure.write_text(draw_figure(draws))
    print(f"Sets: {', '.join(f'{s.name} ({s.model}, {len(s.images)} images, {len(s.texts)} texts)' for s in sets)}; {arguments.seeds} seeds")
    print_situations(draws)
    print_curves(draws)
    print_normaliser_choice(draws)
    print_rule(draws)
    print_ranking_measures(sets, arguments.seeds)
    print_absent(sets, arguments.seeds)
    print_goals(sets, draws, arguments.seeds)
    print_report(draws)


if __name__ == "__main__":
    main()
