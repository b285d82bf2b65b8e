"""Makes tests/fixtures: small checkpoints with random weights, pictures, and what transformers and
PIL make of them. `cargo test` compares with these files.

    python tests/parity/fixtures.py
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from PIL import Image

import checkpoints
import reference

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE.parent / "fixtures"
TEXTS = [
    "a red mug",
    "two green chairs on a wooden floor",
    "",
    "  Spaces,\tPunctuation!  and CAPITALS… ",
    "héllo wörld 42 🍵",
    "a very long caption that goes on " * 20,
]
SIZES = {"text": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}}
SIZES["vision"] = {**SIZES["text"], "num_hidden_layers": 2, "patch_size": 8}
# Width and height: wide, tall, narrow, smaller than the encoder's input, exact, one pixel, odd.
PICTURES = [(301, 200), (200, 301), (64, 190), (9, 7), (32, 32), (1, 1), (97, 33)]


def picture(width, height, seed):
    """Ramps, blocks and noise: edges as well as smooth parts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) % 256], -1)
    blocks = ((x // 7 + y // 5) % 2)[..., None] * rng.integers(0, 120, 3)
    return Image.fromarray((ramps * 0.6 + blocks + rng.integers(0, 30, (height, width, 3))).clip(0, 255).astype(np.uint8))


def main():
    if OUT.exists():
        shutil.rmtree(OUT)
    pictures = OUT / "pictures"
    pictures.mkdir(parents=True)
    names = []
    for i, (width, height) in enumerate(PICTURES):
        names.append(f"{width}x{height}.png")
        picture(width, height, i).save(pictures / names[-1], optimize=True)
    demo = checkpoints.ROOT / "models/demo"
    common = dict(side=32, dimension=24, vocabulary=demo, **SIZES)
    models = {
        "clip-quick-gelu": lambda folder: checkpoints.clip(folder, activation="quick_gelu", **common),
        "clip-gelu": lambda folder: checkpoints.clip(folder, activation="gelu", seed=3, **common),
        # 36 is no multiple of 8: the pixels that fill no patch are left out.
        "siglip": lambda folder: checkpoints.siglip(folder, side=36, vocabulary=300, **SIZES),
    }
    for name, make in models.items():
        folder = OUT / name
        model = make(folder)
        expected = {"texts": [], "images": []}
        tokens, embeddings = reference.texts(folder, model, TEXTS)
        for text, ids, embedding in zip(TEXTS, tokens, embeddings):
            expected["texts"].append({"text": text, "tokens": ids, "embedding": embedding.tolist()})
        loaded = [Image.open(pictures / file).convert("RGB") for file in names]
        squares = reference.squares(folder, loaded)
        for file, square, embedding in zip(names, squares, reference.images(folder, model, squares)):
            place = f"{file.removesuffix('.png')}.expected.png"
            Image.fromarray(square).save(folder / place, optimize=True)
            expected["images"].append({"file": file, "pixels": place, "embedding": embedding.tolist()})
        (folder / "expected.json").write_text(json.dumps(expected) + "\n")
        for unused in ("vocab.json", "merges.txt", "spiece.model", "special_tokens_map.json", "generation_config.json"):
            (folder / unused).unlink(missing_ok=True)
        print(name, sum(f.stat().st_size for f in folder.iterdir()), "bytes")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
