"""The encoders on an NVIDIA GPU: how exact, how fast beside PyTorch, and which share of the card is used.

    just gpu                     builds with CUDA here, then measures
    just gpu --batch 256 512

ViT-B/32 with random weights. All sides start from 8-bit pixels in the host's memory and end with
embeddings there. Prints, for each precision, the cosine to transformers in f32 on the CPU; images a
second of bsap and of PyTorch (eager and compiled) by batch, in turn in one run; and what share that
is of the rate of large matrix products on the same card.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel

import fixtures
import parity
import reference

TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# The bars; f32 on a GPU may sum in another order.
COSINE = {"f32": 0.99999, "f16": 0.999, "bf16": 0.999}
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


def cosines(bsap, device, folder, work, precision, texts, squares):
    """The worst cosine of texts and of pictures to transformers in f32 on the CPU."""
    model = CLIPModel.from_pretrained(folder).eval()
    _, text = reference.texts(folder, model, texts)
    image = reference.images(folder, model, [np.asarray(Image.open(f)) for f in squares])
    command = [bsap, "embed", "--checkpoint", folder, "--device", device, "--dtype", precision]
    said, _ = parity.ask(command, texts, [], work)
    _, seen = parity.ask(command, [], squares, work)
    return [parity.worst([l["embedding"] for l in ours], theirs)[1] for ours, theirs in ((said, text), (seen, image))]


def torch_side(folder, device, dtype, compiled):
    model = CLIPModel.from_pretrained(folder).eval().to(device, dtype)
    mean, std = (x.view(1, 3, 1, 1).to(device) for x in (MEAN, STD))

    def forward(pixels):
        pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std
        features = model.get_image_features(pixel_values=pixels.to(dtype)).pooler_output.float()
        return features / features.norm(dim=-1, keepdim=True)

    forward = torch.compile(forward) if compiled else forward

    def run(count):
        pixels = torch.zeros(count, 224, 224, 3, dtype=torch.uint8)
        started = time.perf_counter()
        with torch.inference_mode():
            forward(pixels.to(device)).cpu()
        return time.perf_counter() - started

    return run


def bsap_side(encoders, folder, precision, device):
    process = subprocess.Popen([encoders, folder, precision, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(count):
        process.stdin.write(f"image {count}\n")
        process.stdin.flush()
        return float(process.stdout.readline()) / 1e3

    return run


def ceiling(device, dtype, size):
    """Floating-point operations a second of a large product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times)


def wait(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def operations(folder):
    """Floating-point operations of one picture's products."""
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    tokens, hidden, inner = (224 // vision["patch_size"]) ** 2 + 1, vision["hidden_size"], vision["intermediate_size"]
    block = tokens * (4 * hidden * hidden + 2 * hidden * inner) + 2 * tokens * tokens * hidden
    return 2 * (vision["num_hidden_layers"] * block + tokens * 3 * vision["patch_size"] ** 2 * hidden)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cpu tries this script where there is no GPU")
    parser.add_argument("--precision", nargs="*", default=["f16", "bf16", "f32"], choices=TYPES)
    parser.add_argument("--batch", type=int, nargs="*", default=[32, 128, 512])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true", help="leave compiled PyTorch out")
    parser.add_argument("--bsap", type=pathlib.Path, required=True)
    parser.add_argument("--encoders", type=pathlib.Path, required=True, help="the encoders bench")
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    folder = args.work / "clip-b32"
    if not (folder / "model.safetensors").exists():
        parity.MODELS["clip-b32"](folder)
    squares = []
    (args.work / "gpu").mkdir(exist_ok=True)
    for i in range(32):
        squares.append(args.work / "gpu" / f"{i}.png")
        fixtures.picture(224, 224, i).save(squares[-1])
    texts = parity.strings(200, 7)[-32:]

    print(torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU: only tries this script")
    missed = False
    for precision in args.precision:
        text, image = cosines(args.bsap, args.device, folder, args.work, precision, texts, squares)
        missed |= min(text, image) <= COSINE[precision]
        print(f"{precision}: worst cosine to f32 of texts {text:.6f}, of pictures {image:.6f}", flush=True)
        top = ceiling(args.device, TYPES[precision], 8192 if args.device != "cpu" else 512)
        print(f"{precision}: products reach {top / 1e12:.1f} TFLOP/s")
        sides = {"bsap": bsap_side(args.encoders, folder, precision, args.device)}
        sides["PyTorch eager"] = torch_side(folder, args.device, TYPES[precision], False)
        if not args.no_compile:
            sides["PyTorch compiled"] = torch_side(folder, args.device, TYPES[precision], True)
        for batch in args.batch:
            times = {name: [] for name in sides}
            # The first rounds compile kernels.
            for round in range(args.rounds + 3):
                for name, side in sides.items():
                    taken = side(batch)
                    if round >= 3:
                        times[name].append(taken)
            for name, taken in times.items():
                rate = batch / statistics.median(taken)
                share = rate * operations(folder) / top
                ratio = statistics.median(times["bsap"]) / statistics.median(taken)
                print(f"  batch {batch:4} {name:<18} {rate:9.0f} images/s  {share:6.1%} of the card  {ratio:5.2f}× bsap", flush=True)
    sys.exit(missed)


if __name__ == "__main__":
    main()
