"""Checkpoints with random weights, made by Hugging Face transformers: nothing has to be downloaded.

Weights are drawn wide enough that a wrong detail shows: every bias, gain and position counts.
"""

import gzip
import importlib.util
import json
import pathlib
import shutil
import sys

import sentencepiece
import sentencepiece.sentencepiece_model_pb2
import torch
from tokenizers import SentencePieceUnigramTokenizer, normalizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    SiglipTokenizer,
)

# `tokenizers` looks for it under its old name.
sys.modules["sentencepiece_model_pb2"] = sentencepiece.sentencepiece_model_pb2
ROOT = pathlib.Path(__file__).resolve().parents[2]


def randomise(model, seed):
    """Weights at about the scale of trained ones, so that activations stay in a sane range."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name in ("logit_scale", "logit_bias"):
            continue
        if "norm" in name or "layrnorm" in name:
            noise = noise * 0.1 + (1.0 if name.endswith("weight") else 0.0)
        elif "embedding" in name or name.endswith("bias") or "probe" in name:
            noise = noise * 0.1
        else:
            noise = noise * parameter.shape[-1] ** -0.5
        parameter.data.copy_(noise)
    return model.eval()


def save(model, folder, processor):
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def clip(folder, seed=1, vocabulary=None, side=224, activation="quick_gelu", **sizes):
    """A CLIP of the given sizes: `text` and `vision` as keyword dictionaries, `dimension`."""
    text = {"hidden_act": activation, **sizes["text"]}
    vision = {"hidden_act": activation, "image_size": side, **sizes["vision"]}
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    if vocabulary is None:
        tokenizer = clip_tokenizer(folder)
        text["vocab_size"] = len(tokenizer)
        text["bos_token_id"], text["eos_token_id"] = tokenizer.bos_token_id, tokenizer.eos_token_id
    else:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(vocabulary / "tokenizer.json", folder / "tokenizer.json")
        written = json.loads((vocabulary / "config.json").read_text())["text_config"]
        text |= {key: written[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=sizes["dimension"])
    model = randomise(CLIPModel(config), seed)
    save(model, folder, processor)
    return model


def clip_tokenizer(folder):
    """OpenAI's vocabulary, from the file that open_clip_torch ships."""
    found = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    lines = gzip.open(pathlib.Path(found) / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    entries = symbols + [s + "</w>" for s in symbols] + ["".join(m) for m in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(entries)}, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def siglip(folder, seed=2, side=224, **sizes):
    """A SigLIP of the given sizes, with a SentencePiece vocabulary made from the corpus."""
    tokenizer = siglip_tokenizer(folder, sizes.get("vocabulary", 500))
    text = {"vocab_size": tokenizer.vocab_size, **sizes["text"]}
    vision = {"image_size": side, **sizes["vision"]}
    model = randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)), seed)
    model.logit_scale.data.fill_(2.3)
    model.logit_bias.data.fill_(-12.9)
    save(model, folder, SiglipImageProcessorPil(size={"height": side, "width": side}))
    return model


def siglip_tokenizer(folder, size):
    """SentencePiece as SigLIP's slow tokenizer reads it, and the same as `tokenizer.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = (ROOT / "models/prompts").glob("*.toml")
    lines = [line.strip().strip('",') for file in sorted(sets) for line in file.read_text().splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.lower() for line in lines if line), model_prefix=str(folder / "spiece"),
        vocab_size=size, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        character_coverage=0.9995, normalization_rule_name="nmt_nfkc", minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    fast = SentencePieceUnigramTokenizer.from_spm(str(folder / "spiece.model"))
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast.save(str(folder / "tokenizer.json"))
    slow = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=64)
    config = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return slow
