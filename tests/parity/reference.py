"""What Hugging Face transformers and PIL make of texts and pictures."""

import json

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoTokenizer, CLIPImageProcessorPil, SiglipImageProcessorPil, SiglipTokenizer


def architecture(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


def tokenize(folder, texts):
    """Token ids as the text encoder reads them; of CLIP up to the first end-of-text."""
    if architecture(folder) == "siglip":
        tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=64)
        return tokenizer(texts, padding="max_length", truncation=True, max_length=64)["input_ids"]
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=77)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    rows = tokenizer(texts, truncation=True, max_length=77)["input_ids"]
    return [row[: row.index(end) + 1] for row in rows]


def unit(features):
    features = getattr(features, "pooler_output", features)
    return (features / features.norm(dim=-1, keepdim=True)).numpy()


@torch.inference_mode()
def texts(folder, model, texts, batch=64):
    """Token ids and unit embeddings."""
    tokens, embeddings = tokenize(folder, texts), []
    for i in range(0, len(tokens), batch):
        rows = tokens[i : i + batch]
        longest = max(map(len, rows))
        # The reference reads the first end-of-text; what stands behind is masked by causality.
        ids = torch.tensor([row + [row[-1]] * (longest - len(row)) for row in rows])
        embeddings.extend(unit(model.get_text_features(input_ids=ids)))
    return tokens, embeddings


def processor(folder):
    kind = SiglipImageProcessorPil if architecture(folder) == "siglip" else CLIPImageProcessorPil
    return kind.from_pretrained(folder)


def squares(folder, pictures):
    """The squares of 8-bit pixels that the image encoder reads, by PIL's resize and crop."""
    process = processor(folder)
    found = []
    for picture in pictures:
        pixels = process(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        found.append(np.asarray(pixels).round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
    return found


@torch.inference_mode()
def images(folder, model, squares, batch=16):
    """Unit embeddings of squares."""
    process, embeddings = processor(folder), []
    for i in range(0, len(squares), batch):
        part = [Image.fromarray(square) for square in squares[i : i + batch]]
        values = process(part, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
        embeddings.extend(unit(model.get_image_features(pixel_values=values.float())))
    return embeddings


def decode(file):
    """A file as bsap documents it: upright, transparency on white, 16 bits scaled to 8."""
    picture = ImageOps.exif_transpose(Image.open(file))
    if picture.mode.startswith("I;16") or picture.mode == "I":
        return Image.fromarray((np.asarray(picture).astype(np.float64) / 257).round().astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return picture.convert("RGB")
