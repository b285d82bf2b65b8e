"""Trains the demo model: a small CLIP on pictures that `bsap demo render` draws.

    pip install -r models/demo/requirements.txt
    python models/demo/train.py --work /tmp/bsap-train

One command, from drawing to the checkpoint in the Hugging Face layout and the loss curve. Only
studio pictures without held-out combinations are shown to the model: the demo and the reports ask
it about catalogues that it was not trained on.
"""

import argparse
import json
import math
import pathlib
import random
import subprocess
import time

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPModel

SIDE = 96
HERE = pathlib.Path(__file__).resolve().parent
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
START, END = "<|startoftext|>", "<|endoftext|>"


def options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder for the drawn pictures")
    parser.add_argument("--out", type=pathlib.Path, default=HERE, help="folder for the checkpoint")
    parser.add_argument("--bsap", default="cargo run --release --", help="how to call bsap")
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--steps", type=int, default=2_400, help="steps of --batch pictures")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1001)
    return parser.parse_args()


def draw(args):
    """The pictures and their truth, drawn once."""
    folder = args.work / f"studio-{args.seed}-{args.images}"
    if not (folder / "truth.jsonl").exists():
        command = f"{args.bsap} demo render --seed {args.seed} --count {args.images} --style studio --side {SIDE} --out {folder}"
        subprocess.run(command.split(), check=True)
    truth = [json.loads(line) for line in open(folder / "truth.jsonl")]
    return folder, [scene for scene in truth if not scene["held_out"]]


def make_tokenizer(captions, context):
    """Byte-level BPE as CLIP's: lower case, words end in </w>, wrapped in start and end of text."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1_000,
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    vocabulary = json.loads(tokenizer.to_str())["model"]["vocab"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, vocabulary[START]), (END, vocabulary[END])],
    )
    return tokenizer


def make_model(tokenizer, context):
    ids = tokenizer.get_vocab()
    text = dict(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=128, intermediate_size=384, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=context, hidden_act="quick_gelu",
        bos_token_id=ids[START], eos_token_id=ids[END], pad_token_id=ids[END],
    )
    vision = dict(
        hidden_size=192, intermediate_size=576, num_hidden_layers=6, num_attention_heads=6,
        image_size=SIDE, patch_size=12, hidden_act="quick_gelu",
    )
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)
    # Written out, attention trains twice as fast on a CPU in bfloat16 as the fused kernel does.
    return CLIPModel._from_config(config, attn_implementation="eager")


def load(folder, scenes):
    """All pictures, as bytes: N × 3 × SIDE × SIDE."""
    pixels = np.empty((len(scenes), 3, SIDE, SIDE), np.uint8)
    for i, scene in enumerate(scenes):
        pixels[i] = np.asarray(Image.open(folder / scene["file"]).convert("RGB")).transpose(2, 0, 1)
    return torch.from_numpy(pixels)


def normalise(pixels):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def train(args, model, tokenizer, pixels, captions):
    """Contrastive training; returns the loss of every step."""
    end = tokenizer.token_to_id(END)
    encoded = [[e.ids for e in tokenizer.encode_batch(texts)] for texts in captions]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), eps=1e-6)
    rng = random.Random(args.seed)
    losses, order, started = [], [], time.time()
    model.train()
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / 100)
        rate = args.rate * warm * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        if len(order) < args.batch:
            order = list(range(len(encoded)))
            rng.shuffle(order)
        batch, order = order[: args.batch], order[args.batch :]
        rows = [rng.choice(encoded[i]) for i in batch]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(input_ids=ids, pixel_values=normalise(pixels[batch]))
        image = torch.nn.functional.normalize(out.image_embeds.float(), dim=-1)
        text = torch.nn.functional.normalize(out.text_embeds.float(), dim=-1)
        logits = model.logit_scale.exp() * text @ image.T
        target = torch.arange(len(batch))
        loss = (torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)) / 2
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            speed = (step + 1) * args.batch / (time.time() - started)
            mean = sum(losses[-25:]) / 25
            print(f"step {step + 1}/{args.steps} loss {mean:.3f} scale {model.logit_scale.exp():.1f} {speed:.0f} pictures/s", flush=True)
    return losses, time.time() - started


def export(args, model, tokenizer, losses, seconds):
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    model.half().save_pretrained(out, safe_serialization=True)
    config = json.loads((out / "config.json").read_text())
    config.pop("transformers_version", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    preprocessor = dict(
        do_resize=True, size={"shortest_edge": SIDE}, resample=3, do_center_crop=True,
        crop_size={"height": SIDE, "width": SIDE}, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=MEAN, image_std=STD, do_convert_rgb=True,
        image_processor_type="CLIPImageProcessor",
    )
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    parameters = sum(p.numel() for p in model.parameters())
    record = dict(
        seed=args.seed, images=args.images, steps=args.steps, batch=args.batch, rate=args.rate,
        parameters=parameters, minutes=round(seconds / 60, 1), threads=torch.get_num_threads(),
        torch=torch.__version__, final_loss=round(sum(losses[-50:]) / len(losses[-50:]), 4),
    )
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    plot(losses, out / "loss.png")
    print(json.dumps(record))


def plot(losses, file):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    window = 25
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(losses, linewidth=0.4, color="#b8c4d6", label="each step")
    axes.plot(range(window - 1, len(losses)), smooth, linewidth=1.4, color="#1f4e8c", label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="contrastive loss", title="Training of the demo model")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main():
    args = options()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    context = 32
    folder, scenes = draw(args)
    captions = [scene["captions"] for scene in scenes]
    tokenizer = make_tokenizer((text for texts in captions for text in texts), context)
    model = make_model(tokenizer, context)
    print(f"{len(scenes)} pictures, {sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)
    losses, seconds = train(args, model, tokenizer, load(folder, scenes), captions)
    export(args, model, tokenizer, losses, seconds)


if __name__ == "__main__":
    main()
