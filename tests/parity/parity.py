"""Compares `bsap embed` with Hugging Face transformers and PIL on full-size checkpoints.

    just parity                 all models
    just parity clip-b32        only this one

Checkpoints with random weights are built in --work (about 4 GB) and kept. Prints a table in Markdown
and ends with 1 where a bar is missed.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import unicodedata

import numpy as np
import torch
from PIL import Image

import checkpoints
import fixtures
import reference

STRINGS = 10_000
EMBEDDED = 64


def encoder_sizes(hidden, layers, heads, **more):
    return {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


MODELS = {
    "clip-b32": lambda f: checkpoints.clip(f, text=encoder_sizes(512, 12, 8), vision=encoder_sizes(768, 12, 12, patch_size=32), dimension=512),
    "clip-b16": lambda f: checkpoints.clip(f, text=encoder_sizes(512, 12, 8), vision=encoder_sizes(768, 12, 12, patch_size=16), dimension=512),
    "clip-l14": lambda f: checkpoints.clip(f, text=encoder_sizes(768, 12, 12), vision=encoder_sizes(1024, 24, 16, patch_size=14), dimension=768),
    "clip-l14-336": lambda f: checkpoints.clip(f, side=336, text=encoder_sizes(768, 12, 12), vision=encoder_sizes(1024, 24, 16, patch_size=14), dimension=768),
    "openclip-b32": lambda f: checkpoints.clip(f, activation="gelu", text=encoder_sizes(512, 12, 8), vision=encoder_sizes(768, 12, 12, patch_size=32), dimension=512),
    "siglip-b16": lambda f: checkpoints.siglip(f, text=encoder_sizes(768, 12, 12), vision=encoder_sizes(768, 12, 12, patch_size=16)),
}


def strings(count, seed):
    """Texts of all scripts, emoji, whitespace, control characters, over-long and empty ones."""
    rng = random.Random(seed)
    scripts = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F),
               (0xE01, 0xE5B), (0x10A0, 0x10FF), (0x1E00, 0x1EFF), (0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
               (0x1F300, 0x1FAFF), (0x2000, 0x2BFF), (0x0, 0x1F), (0x300, 0x36F), (0xFE00, 0xFE0F), (0x20000, 0x2A6DF)]
    words = (checkpoints.ROOT / "models/prompts/photographs.toml").read_text().split()
    found = ["", " ", "\n\t ", "a" * 5000, "🍵" * 300, "don't can't we'll I'm", "<|endoftext|> a mug", "A\u0301 é e\u0301", "x\u0000y"]
    while len(found) < count:
        parts = []
        for _ in range(rng.choice([1, 2, 3, 5, 8, 40, 120])):
            low, high = rng.choice(scripts)
            length = rng.randint(1, 9)
            word = "".join(chr(rng.randint(low, high)) for _ in range(length)) if rng.random() < 0.6 else rng.choice(words)
            parts.append("".join(c for c in word if unicodedata.category(c) != "Cs"))
        found.append(rng.choice([" ", "  ", "\t", ", ", ""]).join(parts))
    return found


def pictures(folder):
    """Files of every format at sizes from 1×1 to 8000×8000; which of them are plain RGB PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [(1, 1), (2, 3), (7, 500), (31, 17), (224, 224), (225, 223), (640, 427), (1, 8000), (8000, 1), (3000, 2000), (8000, 8000)]
    exact, others = [], []
    for i, (width, height) in enumerate(sizes):
        exact.append(folder / f"{width}x{height}.png")
        if not exact[-1].exists():
            fixtures.picture(width, height, i).save(exact[-1], compress_level=1)
    base = fixtures.picture(640, 427, 99).resize((641, 429), Image.Resampling.LANCZOS)
    alpha = base.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray((np.asarray(base.convert("L")).astype(np.uint16) * 257 + 31).clip(0, 65535).astype(np.uint16))
    variants = {
        "rgb.jpg": (base, {"quality": 88}), "progressive.jpg": (base, {"quality": 80, "progressive": True}),
        "420.jpg": (base, {"quality": 75, "subsampling": 2}), "gray.jpg": (base.convert("L"), {"quality": 90}),
        "cmyk.jpg": (base.convert("CMYK"), {"quality": 92}), "turned.jpg": (base, {"quality": 90, "exif": exif}),
        "alpha.png": (alpha, {}), "palette.png": (base.quantize(64), {}), "gray.png": (base.convert("L"), {}),
        "16bit.png": (sixteen, {}), "lossy.webp": (base, {"quality": 80}), "lossless.webp": (base, {"lossless": True}),
        "first.gif": (base.quantize(128), {"save_all": True, "append_images": [alpha.convert("RGB").quantize(16)]}),
        "plain.bmp": (base, {}), "plain.tiff": (base, {}), "deflate.tiff": (base, {"compression": "tiff_adobe_deflate"}),
    }
    for name, (picture, options) in variants.items():
        picture.save(folder / name, **options)
        others.append(folder / name)
    return exact, others


def ask(command, texts, images, work):
    """What bsap makes of texts and images: two lists."""
    (work / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    arguments = [*command, "--texts", work / "texts.jsonl", "--pixels", work / "pixels"]
    for image in images:
        arguments += ["--image", image]
    done = subprocess.run(list(map(str, arguments)), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"bsap ended with {done.returncode}")
    lines = [json.loads(line) for line in done.stdout.split("\n") if line]
    return [l for l in lines if l["kind"] == "text"], [l for l in lines if l["kind"] == "image"]


def worst(ours, theirs):
    ours, theirs = np.array(ours, dtype=np.float64), np.array(theirs, dtype=np.float64)
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    return np.abs(ours - theirs).max(), cosine.min()


def compare(name, bsap, work):
    folder = work / name
    model = None
    if not (folder / "model.safetensors").exists():
        print(f"building {name}", file=sys.stderr)
        model = MODELS[name](folder)
    kind = reference.architecture(folder)
    model = (checkpoints.SiglipModel if kind == "siglip" else checkpoints.CLIPModel).from_pretrained(folder).eval()
    exact, others = pictures(work / "pictures")
    all_texts = strings(STRINGS, 7)
    results, command = {}, [bsap, "embed", "--checkpoint", folder]

    # Tokens of all strings with the text encoder of a small copy would save hours: only some are embedded.
    tokens = reference.tokenize(folder, all_texts)
    small = work / f"{name}-tokens"
    if not small.exists():
        tiny = dict(encoder_sizes(16, 1, 1))
        maker = checkpoints.siglip if kind == "siglip" else checkpoints.clip
        more = {} if kind == "siglip" else {"dimension": 16}
        maker(small, text=tiny, vision={**tiny, "patch_size": 32}, **more)
    said, _ = ask([bsap, "embed", "--batch", "256", "--checkpoint", small], all_texts, [], work)
    results["different tokens"] = sum(line["tokens"] != ids for line, ids in zip(said, tokens))
    if len(said) != len(tokens):
        sys.exit(f"{len(said)} texts came back of {len(tokens)}")

    texts = all_texts[:EMBEDDED]
    _, embedded_texts = reference.texts(folder, model, texts)
    said, _ = ask(command, texts, [], work)
    results["text difference"], results["text cosine"] = worst([l["embedding"] for l in said], embedded_texts)
    single, _ = ask([*command, "--batch", "1"], texts[:16], [], work)
    results["batch difference"], _ = worst([l["embedding"] for l in single], [l["embedding"] for l in said[:16]])

    Image.MAX_IMAGE_PIXELS = None
    _, said = ask(command, [], exact, work)
    squares = reference.squares(folder, [Image.open(f) for f in exact])
    ours = [np.asarray(Image.open(work / "pixels" / f"{i}.png")) for i in range(len(exact))]
    results["pixel difference"] = max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in zip(ours, squares))
    # The encoders on identical pixels: bsap reads its own squares, which it does not resize again.
    files = [work / "squares" / f"{i}.png" for i in range(len(squares))]
    files[0].parent.mkdir(exist_ok=True)
    for file, square in zip(files, squares):
        Image.fromarray(square).save(file)
    _, said = ask(command, [], files, work)
    embedded = reference.images(folder, model, squares)
    results["image difference"], results["image cosine"] = worst([l["embedding"] for l in said], embedded)
    reduced_texts, reduced_images = ask([*command, "--dtype", "bf16", "--device", "cpu"], texts, files, work)
    sides = [(reduced_texts, embedded_texts), (reduced_images, embedded)]
    cosines = [worst([l["embedding"] for l in reduced], theirs)[1] for reduced, theirs in sides]
    results["bf16 cosine"] = min(cosines)

    _, said = ask(command, [], others, work)
    squares = reference.squares(folder, [reference.decode(f) for f in others])
    ours = [np.asarray(Image.open(work / "pixels" / f"{i}.png")) for i in range(len(others))]
    means = {f.name: np.abs(a.astype(int) - b.astype(int)).mean() for f, a, b in zip(others, ours, squares)}
    embedded = reference.images(folder, model, squares)
    results["file mean difference"] = max(means.values())
    results["file cosine"] = worst([l["embedding"] for l in said], embedded)[1]
    print(f"{name}: farthest file {max(means, key=means.get)}", file=sys.stderr)
    return results


BARS = {
    "different tokens": lambda v: v == 0, "text difference": lambda v: v < 1e-5, "text cosine": lambda v: v > 0.99999,
    "batch difference": lambda v: v <= 1e-6, "pixel difference": lambda v: v <= 1, "image difference": lambda v: v < 1e-5,
    "image cosine": lambda v: v > 0.99999, "file mean difference": lambda v: v <= 1, "file cosine": lambda v: v > 0.999,
    "bf16 cosine": lambda v: v > 0.999,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--bsap", type=pathlib.Path, required=True)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    print("| model | " + " | ".join(BARS) + " |\n| --- |" + " --- |" * len(BARS))
    missed = 0
    for name in args.models or MODELS:
        results = compare(name, args.bsap, args.work)
        cells = []
        for bar, holds in BARS.items():
            value = results[bar]
            shown = f"{value:.7f}" if "cosine" in bar else f"{value:.2g}"
            missed += not holds(value)
            cells.append(shown if holds(value) else f"**{shown}**")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
