"""Times bsap's encoders on the CPU beside PyTorch and ONNX Runtime: all sides in turn, in one run.

    just speed                   ViT-B/32, random weights
    just speed --rounds 20

Each round runs every side once, so that a noisy machine is noisy for all. Prints medians and the
ratio of each side's time to bsap's: above 1, bsap is faster.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import time

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import CLIPModel

import checkpoints
import parity
import reference

TEXT = "a red mug on the table"


class Bsap:
    """The bench binary, asked line by line."""

    def __init__(self, folder, precision):
        command = ["cargo", "bench", "--quiet", "--locked", "--bench", "encoders", "--", str(folder), precision]
        self.process = subprocess.Popen(command, cwd=checkpoints.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, kind, count):
        self.process.stdin.write(f"{kind} {count}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


class Image(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.get_image_features(pixel_values=pixels).pooler_output


def torch_side(model, ids, dtype):
    def run(kind, count):
        with torch.inference_mode():
            if kind == "image":
                inputs = torch.zeros(count, 3, 224, 224, dtype=dtype)
                started = time.perf_counter()
                model.get_image_features(pixel_values=inputs)
            else:
                inputs = torch.tensor([ids] * count)
                started = time.perf_counter()
                model.get_text_features(input_ids=inputs)
            return (time.perf_counter() - started) * 1e3

    return run


def onnx_side(file):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = os.cpu_count()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(kind, count):
        if kind != "image":
            return None
        inputs = {session.get_inputs()[0].name: np.zeros((count, 3, 224, 224), np.float32)}
        started = time.perf_counter()
        session.run(None, inputs)
        return (time.perf_counter() - started) * 1e3

    return run


def export(model, file, batch):
    """The image encoder as ONNX, in f32 and with 8-bit weights."""
    if not file.exists():
        torch.onnx.export(Image(model), (torch.zeros(batch, 3, 224, 224),), str(file), dynamo=False, input_names=["pixels"])
    small = file.with_suffix(".int8.onnx")
    if not small.exists():
        quantize_dynamic(str(file), str(small), weight_type=QuantType.QInt8)
    return small


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", nargs="*", default=["f32"], help="of bsap: f32 bf16 …")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--bsap", type=pathlib.Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    folder = args.work / "clip-b32"
    if not (folder / "model.safetensors").exists():
        parity.MODELS["clip-b32"](folder)
    model = CLIPModel.from_pretrained(folder).eval()
    ids = reference.tokenize(folder, [TEXT])[0]
    sides = {f"bsap {p}": Bsap(folder, p) for p in args.precision}
    sides["PyTorch f32"] = torch_side(model, ids, torch.float32)
    if not args.no_onnx:
        file = args.work / f"clip-b32-image-{args.batch}.onnx"
        small = export(model, file, args.batch)
        sides["ONNX Runtime f32"] = onnx_side(file)
        sides["ONNX Runtime int8"] = onnx_side(small)
    half = CLIPModel.from_pretrained(folder).eval().to(torch.bfloat16)
    sides["PyTorch bf16"] = torch_side(half, ids, torch.bfloat16)
    results = {}
    for kind, count in [("image", args.batch), ("image", 1), ("text", 1)]:
        usable = {n: s for n, s in sides.items() if not ("ONNX" in n and (kind, count) != ("image", args.batch))}
        times = {name: [] for name in usable}
        for round in range(args.rounds + 2):
            for name, side in usable.items():
                taken = side(kind, count)
                if round >= 2:
                    times[name].append(taken)
        medians = {name: statistics.median(t) for name, t in times.items()}
        print(f"\n{count} {kind}{'s' if count > 1 else ''} ({len(ids)} tokens)" if kind == "text" else f"\n{count} {kind}{'s' if count > 1 else ''}")
        base = medians[f"bsap {args.precision[0]}"]
        for name, median in medians.items():
            print(f"  {name:<20} {median:9.1f} ms {count / median * 1e3:8.1f} /s   {median / base:5.2f}×", flush=True)
        results[f"{kind} {count}"] = medians
    print(json.dumps(results))


if __name__ == "__main__":
    main()
