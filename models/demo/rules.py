"""Rules beyond the served family, tried on drawn catalogues: figures for docs/balancing.md.

    pip install numpy
    python models/demo/rules.py --bsap target/release/bsap --work /tmp/rules

Draws 2,000 pictures a style, embeds them and some 480 queries with the demo's model, and prints what each
rule gains over plain CLIP on average, paired by query, with 95 % bootstrap intervals. Rules were chosen with the
seeds 31 and 32; the figures are those of seed 33.
"""

import argparse
import json
import pathlib
import random
import subprocess
import tomllib

import numpy as np

HERE = pathlib.Path(__file__).parent
STYLES = ["studio", "shifted", "clutter"]
KINDS = "mug shoe lamp chair bag bottle clock hat umbrella teapot vase book guitar cushion watch sofa table candle helmet backpack t-shirt kite bicycle drum".split()
COLOURS = "black white grey red orange yellow green blue purple pink brown".split()
PATTERNS = "plain striped dotted checked zigzag two-tone".split()


def counted(words, count=1):
    return {2: "two", 3: "three"}.get(count, "an" if words[0] in "aeiou" else "a") + " " + words


def phrase(kind, colour, pattern, count):
    words = [word for word in (colour, pattern) if word]
    if kind is None:
        return f"something {words[0]}" if len(words) == 1 else counted(" ".join(words) + " product")
    plural = "watches" if kind == "watch" else kind + "s"
    return counted(" ".join([*words, kind if count in (None, 1) else plural]), count or 1)


def queries(seed, each=150):
    """Text to conditions (kind, colour, pattern, count), each to be met by a product of its own."""
    rng, found = random.Random(seed), {}
    for difficulty in ["one", "two", "three", "count", "pair"]:
        made = 0
        for _ in range(each * 50):
            kind, colour, pattern = rng.choice(KINDS), rng.choice(COLOURS), rng.choice(PATTERNS)
            conditions = {
                "one": [rng.choice([(kind, None, None, None), (None, colour, None, None), (None, None, pattern, None)])],
                "two": [rng.choice([(kind, colour, None, None), (kind, None, pattern, None), (None, colour, pattern, None)])],
                "three": [(kind, colour, pattern, None)],
                "count": [(kind, colour, None, rng.choice([2, 3]))],
                "pair": [(kind, None, None, None), (rng.choice([k for k in KINDS if k != kind]), None, None, None)],
            }[difficulty]
            text = rng.choice([" and ", " next to "]).join(phrase(*condition) for condition in conditions)
            if text not in found and made < each:
                found[text] = conditions
                made += 1
    return found


def matches(conditions, products):
    def met(condition, product):
        values = [product[name] for name in ("kind", "colour", "pattern", "count")]
        return all(wanted in (None, value) for wanted, value in zip(condition, values))

    if len(conditions) == 1:
        return any(met(conditions[0], product) for product in products)
    pairs = [(p, q) for i, p in enumerate(products) for j, q in enumerate(products) if i != j]
    return any(met(conditions[0], p) and met(conditions[1], q) for p, q in pairs)


class Bsap:
    def __init__(self, program, work):
        self.program, self.work = program, work

    def embed(self, *arguments, cwd=None):
        command = [self.program, "embed", "--checkpoint", HERE.resolve(), *arguments]
        out = subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout
        return np.array([json.loads(line)["embedding"] for line in out.splitlines()], dtype=np.float32)

    def texts(self, texts):
        file = self.work / "texts.jsonl"
        file.write_text("\n".join(map(json.dumps, texts)))
        return self.embed("--texts", file.resolve())

    def pictures(self, style, seed, count):
        folder = self.work / f"{style}-{seed}"
        if not folder.with_suffix(".npy").exists():
            render = ["demo", "render", "--count", str(count), "--seed", str(seed), "--style", style, "--out", folder]
            subprocess.run([self.program, *render], check=True, stdout=subprocess.DEVNULL)
            names = sorted(path.name for path in folder.glob("*.jpg"))
            units = self.embed(*[part for name in names for part in ("--image", name)], cwd=folder)
            np.save(folder.with_suffix(".npy"), units.astype(np.float16).astype(np.float32))
        scenes = [json.loads(line)["products"] for line in (folder / "truth.jsonl").read_text().splitlines()]
        return np.load(folder.with_suffix(".npy")), scenes


def measures(scores, right):
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    found, total = np.take_along_axis(right, order, 1), right.sum(axis=1)
    discount = 1 / np.log2(np.arange(2, 12))
    ideal = np.array([discount[: min(10, n)].sum() for n in total])
    return {
        "hit@1": found[:, 0].astype(float),
        "capped recall@10": found.sum(axis=1) / np.minimum(10, total),
        "nDCG@10": (found * discount).sum(axis=1) / ideal,
    }


def gain(differences, rng):
    means = [differences[rng.integers(0, len(differences), len(differences))].mean() for _ in range(1000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def keep_first(raw, scores):
    """Plain CLIP's first result stays; the rest is ranked by `scores`."""
    kept = scores.copy()
    kept[np.arange(len(raw)), raw.argmax(axis=1)] = scores.max(axis=1) + 1
    return kept


def gate(raw, aux, scores):
    """Only where plain CLIP's first result is the best image of some prompt (the dynamic activation of
    QB-Norm, CVPR 2022) is anything corrected."""
    hubs = np.isin(raw.argmax(axis=1), aux.argmax(axis=0))
    return np.where(hubs[:, None], scores, raw)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bsap", required=True, type=pathlib.Path)
    parser.add_argument("--work", required=True, type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=33)
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    bsap, rng, judged_queries = Bsap(args.bsap.resolve(), args.work), np.random.default_rng(1), queries(args.seed)
    units = bsap.texts(list(judged_queries))
    for name in ["demo", "photographs"]:
        prompts = bsap.texts(tomllib.loads((HERE.parent / f"prompts/{name}.toml").read_text())["texts"])
        for style in STYLES:
            images, scenes = bsap.pictures(style, args.seed, args.count)
            right = np.array([[matches(conditions, scene) for scene in scenes] for conditions in judged_queries.values()])
            answerable = right.any(axis=1)
            raw, aux = units[answerable] @ images.T, images @ prompts.T
            nearest = -np.sort(-aux, axis=1)[:, :8].mean(axis=1)
            rules = {f"nnn, weight {weight}": raw - weight * nearest for weight in (0.25, 0.5, 1)}
            full = rules["nnn, weight 1"]
            rules["first kept, nnn, weight 0.5"] = keep_first(raw, rules["nnn, weight 0.5"])
            rules["first kept, nnn, weight 1"] = keep_first(raw, full)
            rules["gated, nnn, weight 1"] = gate(raw, aux, full)
            rules["gated, first kept, nnn, weight 1"] = keep_first(raw, gate(raw, aux, full))
            plain = measures(raw, right[answerable])
            means = ", ".join(f"{measure} {values.mean():.3f}" for measure, values in plain.items())
            print(f"\n{style}, prompts {name}: {answerable.sum()} queries; plain CLIP {means}")
            for rule, scores in rules.items():
                ranked = measures(scores, right[answerable])
                gains = [f"{measure} {gain(ranked[measure] - plain[measure], rng)}" for measure in plain]
                print(f"  {rule:32} {'  '.join(gains)}")


if __name__ == "__main__":
    main()
