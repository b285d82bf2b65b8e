"""Makes tests/fixtures/checkpoints: small checkpoints in the layouts of the wild, described rather than
stored, and what transformers and open_clip compute with them. `cargo test --test checkpoints` makes the
same checkpoints from the same descriptions, and compares.

    tests/parity/run matrix

A row changes files of a base. `refused` has words of the message with which bsap refuses it; every other
row has expected embeddings. Weights are drawn from a generator that is seeded by the name of the tensor.
"""

import copy
import json
import pathlib
import shutil
import sys
import tempfile
import warnings

import numpy as np
import open_clip
import safetensors.numpy
import sentencepiece.sentencepiece_model_pb2 as sentencepiece_model
import timm
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel, SiglipModel

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
OUT = FIXTURES / "checkpoints"
TEXTS = ["a red mug", "Two green chairs, on a wooden floor.", "a very long caption that goes on " * 8]
# Width, height and seed. Of few areas: their resized pixels are those of Pillow to the bit, with all filters and
# sizes of the rows. Elsewhere a pixel may differ by 1 of 255, which is more than 1e-5 in an embedding.
PICTURES = ["39x32-2.png", "75x64-8.png", "50x120-12.png", "33x90-5.png"]
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


# ---- Weights -------------------------------------------------------------------------------------------

def draw(name, shape):
    """A tensor from the generator splitmix64, seeded by the name; `tests/checkpoints/weights.rs` has the
    same."""
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        count = int(np.prod(shape, dtype=np.int64))
        x = np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    noise = (x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0
    if name.endswith("logit_scale"):
        values = np.full(count, 2.3)
    elif name.endswith("logit_bias"):
        values = np.full(count, -12.9)
    elif name.endswith("weight") and any(part in name for part in ("norm", "ln_")):
        values = 1.0 + 0.2 * noise
    elif len(shape) < 2 or any(part in name for part in ("embed", "probe", "latent")) and "patch" not in name:
        values = 0.3 * noise
    else:
        values = np.sqrt(3.0 / np.prod(shape[1:])) * noise
    return torch.from_numpy(values.astype(np.float32)).reshape(list(shape))


def write_weights(file, sets, spec):
    """`spec`: set, dtype, prefix, part (which of how many files), drop, add, types, values."""
    shapes = {**sets[spec["set"]], **spec.get("add", {})}
    names = sorted(name for name in shapes if name not in spec.get("drop", []))
    part, parts = spec.get("part", [0, 1])
    tensors = {}
    for number, name in enumerate(names):
        if number % parts != part:
            continue
        tensor = draw(name, shapes[name]).to(getattr(torch, spec.get("dtype", "float32")))
        if name in spec.get("values", {}):
            tensor.view(-1)[0] = float(spec["values"][name])
        if name in spec.get("types", {}):
            tensor = torch.zeros(shapes[name]).to(getattr(torch, spec["types"][name]))
        tensors[spec.get("prefix", "") + name] = tensor.contiguous()
    from safetensors.torch import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    if "keep" in spec:
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * spec["keep"])])


def write_sentencepiece(file, tokenizer):
    """The unigram model of a tokenizer.json as SentencePiece writes it."""
    import base64

    written = json.loads((FIXTURES / tokenizer).read_text())
    model = sentencepiece_model.ModelProto()
    for number, (piece, score) in enumerate(written["model"]["vocab"]):
        kind = {"<unk>": 2, "</s>": 3, "<pad>": 3}.get(piece, 1)
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type = 1
    model.trainer_spec.unk_id, model.trainer_spec.eos_id = 2, 1
    model.trainer_spec.pad_id, model.trainer_spec.bos_id = 0, -1
    rules = [step for step in written["normalizer"]["normalizers"] if step["type"] == "Precompiled"]
    model.normalizer_spec.precompiled_charsmap = base64.b64decode(rules[0]["precompiled_charsmap"])
    file.write_bytes(model.SerializeToString())


# ---- Checkpoints ---------------------------------------------------------------------------------------

def patched(value, patch):
    """A merge of JSON objects; unlike in RFC 7396, null is a value."""
    if not (isinstance(value, dict) and isinstance(patch, dict)):
        return copy.deepcopy(patch)
    merged = dict(value)
    for key, part in patch.items():
        merged[key] = patched(merged.get(key), part)
    return merged


def write_checkpoint(folder, spec, row):
    files = {**spec["bases"][row["base"]], **row.get("files", {})}
    for name, content in files.items():
        if content is None:
            continue
        content = copy.deepcopy(content)
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if "$weights" in content:
            write_weights(file, spec["weights"], patched(content["$weights"], row.get("weights", {})))
            continue
        if "$sentencepiece" in content:
            write_sentencepiece(file, content["$sentencepiece"])
            continue
        if "$text" in content:
            file.write_text(content["$text"])
            continue
        if "$vocab" in content:
            vocab = json.loads((FIXTURES / content["$vocab"]).read_text())["model"]["vocab"]
            file.write_text(json.dumps(vocab))
            continue
        if "$merges" in content:
            merges = json.loads((FIXTURES / content["$merges"]).read_text())["model"]["merges"]
            file.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
            continue
        if "$copy" in content:
            content = json.loads((FIXTURES / content["$copy"]).read_text())
        if "$json" in content:
            content = content["$json"]
        content = patched(content, row.get("patch", {}).get(name, {})) if isinstance(content, dict) else content
        for path in row.get("remove", {}).get(name, []):
            *parents, key = path.split(".")
            inner = content
            for parent in parents:
                inner = inner[parent]
            inner.pop(key, None)
        file.write_text(json.dumps(content, indent=1))


# ---- References ----------------------------------------------------------------------------------------

def unit(features):
    features = getattr(features, "pooler_output", features)
    return torch.nn.functional.normalize(features.float(), dim=-1)


def rounded(rows):
    return [[round(float(value), 6) for value in row] for row in rows]


def pictures():
    return [Image.open(OUT / name).convert("RGB") for name in PICTURES]


@torch.inference_mode()
def by_transformers(folder, lower_case=False):
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    if not isinstance(model, (CLIPModel, SiglipModel)):
        raise TypeError(f"is a {type(model).__name__}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    siglip = isinstance(model, SiglipModel)
    texts = []
    for text in (text.lower() if lower_case else text for text in TEXTS):
        padding = "max_length" if siglip else True
        ids = tokenizer([text], padding=padding, truncation=True, max_length=length, return_tensors="pt")
        texts.append(unit(model.get_text_features(input_ids=ids["input_ids"]))[0])
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = []
    for picture in pictures():
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        images.append(unit(model.get_image_features(pixel_values=pixels.float()))[0])
    return {"texts": rounded(texts), "images": rounded(images)}


@torch.inference_mode()
def by_open_clip(folder):
    config = json.loads((folder / "open_clip_config.json").read_text())
    # Released versions do not know this key: the sizes are given to timm directly.
    sizes = config["model_cfg"]["vision_cfg"].pop("timm_model_kwargs", {})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    create = timm.create_model
    timm.create_model = lambda name, **kwargs: create(name, **{**kwargs, **sizes})
    try:
        model, process = open_clip.create_model_from_pretrained(f"local-dir:{folder}", precision="fp32")
    finally:
        timm.create_model = create
    model.eval()
    # The default tokenizer has its own vocabulary; that of the folder is small.
    text_config = config["model_cfg"]["text_cfg"]
    if text_config.get("hf_tokenizer_name"):
        ids = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    else:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        length = text_config["context_length"]
        rows = tokenizer(TEXTS, truncation=True, max_length=length)["input_ids"]
        # Padded by zeros. The fixture's vocabulary begins with the special tokens, OpenAI's ends with
        # them: end-of-text has to be the largest.
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
    texts = unit(model.encode_text(ids))
    images = [unit(model.encode_image(process(picture)[None]))[0] for picture in pictures()]
    return {"texts": rounded(texts), "images": rounded(images)}


def draw_pictures():
    for name in PICTURES:
        size, seed = name.removesuffix(".png").split("-")
        width, height = map(int, size.split("x"))
        rng = np.random.default_rng(int(seed) * 1000 + width)
        pixels = np.full((height, width, 3), rng.integers(0, 256, 3))
        pixels[height // 5 : height * 3 // 5, width // 7 : width * 2 // 3] = rng.integers(0, 256, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(OUT / name, optimize=True)


def reference(spec, row):
    if any(row.get("weights", {}).get("prefix", "").startswith(p) for p in ("model.", "module.")):
        # transformers would leave all weights at random.
        row = {**row, "weights": {}}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        write_checkpoint(folder, spec, row)
        by = row.get("reference", "transformers")
        if by == "open_clip":
            return by_open_clip(folder)
        # `GemmaTokenizer` leaves it out, but SigLIP 2 was trained with it.
        return by_transformers(folder / row.get("inner", ""), row.get("lower_case", False))


# ---- What is compared ----------------------------------------------------------------------------------

def shapes(model):
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items() if "position_ids" not in name}


def main():
    sys.path.insert(0, str(pathlib.Path(__file__).parent))
    import matrix_rows

    only = sys.argv[1:]
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    draw_pictures()
    spec = {"texts": TEXTS, "pictures": PICTURES, **matrix_rows.describe(shapes)}
    failed = 0
    for row in spec["rows"]:
        if only and row["name"] not in only:
            continue
        try:
            computed = reference(spec, row)
        except Exception as error:
            computed = f"{type(error).__name__}: {str(error)[:120]}"
        if "refused" in row:
            outcome = computed if isinstance(computed, str) else "computes something"
            print(f"{row['name']:32} refused; the reference: {outcome}", flush=True)
        elif isinstance(computed, str):
            failed += 1
            print(f"{row['name']:32} FAILED: {computed}", flush=True)
        else:
            row["expected"] = computed
            print(f"{row['name']:32} equal", flush=True)
    if not only:
        # One row a line.
        parts = [json.dumps({key: value}, ensure_ascii=False)[1:-1] for key, value in spec.items() if key != "rows"]
        rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in spec["rows"])
        (OUT / "matrix.json").write_text("{" + ",\n".join(parts) + ',\n"rows": [\n' + rows + "\n]}\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
