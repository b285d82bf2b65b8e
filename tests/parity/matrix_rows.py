"""The rows of matrix.py: what is changed of which base, and how it should end."""

import json
import pathlib

import torch
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures"
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
CLIP_TOKENIZER = "clip-gelu/tokenizer.json"
SIGLIP_TOKENIZER = "siglip/tokenizer.json"
GEMMA_TOKENIZER = "checkpoints/gemma-tokenizer.json"

CLIP = {
    "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 12, "logit_scale_init_value": 2.6592,
    "torch_dtype": "float32", "transformers_version": "4.40.0",
    "text_config": {
        "model_type": "clip_text_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "hidden_act": "quick_gelu", "vocab_size": 514, "max_position_embeddings": 32,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "layer_norm_eps": 1e-5, "projection_dim": 12},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 3, "hidden_act": "quick_gelu", "image_size": 32, "patch_size": 8,
        "layer_norm_eps": 1e-5, "projection_dim": 12}}
CLIP_PICTURES = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": MEAN, "image_std": STD, "do_convert_rgb": True}
SIGLIP = {
    "model_type": "siglip", "architectures": ["SiglipModel"], "initializer_factor": 1.0,
    "text_config": {
        "model_type": "siglip_text_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 16},
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 32, "patch_size": 8}}
SIGLIP_PICTURES = {
    "image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
    "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "do_convert_rgb": None}
SIGLIP_TOKENS = {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>",
                 "model_max_length": 16, "do_lower_case": True, "sp_model_kwargs": {},
                 "clean_up_tokenization_spaces": True, "additional_special_tokens": []}
OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 32, "vocab_size": 514, "width": 16, "heads": 2, "layers": 2}},
    "preprocess_cfg": {"mean": MEAN, "std": STD}}
OPEN_CLIP_SIGLIP = {
    "model_cfg": {
        "embed_dim": 16, "init_logit_bias": -10, "custom_text": True,
        "vision_cfg": {
            "image_size": 32, "timm_model_name": "vit_base_patch16_siglip_224", "timm_model_pretrained": False,
            "timm_pool": "map", "timm_proj": "none",
            "timm_model_kwargs": {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}},
        "text_cfg": {
            "context_length": 16, "vocab_size": 300, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 16, "heads": 2, "layers": 2,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}},
    "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}}
T5_TOKENS = {"tokenizer_class": "T5Tokenizer", "pad_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>",
             "model_max_length": 64, "extra_ids": 0, "additional_special_tokens": []}
GEMMA_TOKENS = {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>",
                "unk_token": "<unk>", "model_max_length": 64, "add_bos_token": False, "add_eos_token": True,
                "padding_side": "right", "clean_up_tokenization_spaces": False, "spaces_between_special_tokens": False}


def weights(name, **more):
    return {"$weights": {"set": name, **more}}


def text(content):
    return {"$text": content}


def describe(shapes):
    import open_clip
    import timm

    def trunk():
        config = json.loads(json.dumps(OPEN_CLIP_SIGLIP["model_cfg"]))
        sizes = config["vision_cfg"].pop("timm_model_kwargs")
        create = timm.create_model
        timm.create_model = lambda name, **kwargs: create(name, **{**kwargs, **sizes})
        try:
            return open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
        finally:
            timm.create_model = create

    gemma_size = json.loads((FIXTURES / GEMMA_TOKENIZER).read_text())["model"]["vocab"]
    sets = {
        "clip": shapes(CLIPModel(CLIPConfig(**CLIP))),
        "siglip": shapes(SiglipModel(SiglipConfig(**SIGLIP))),
        "open_clip": shapes(open_clip.CLIP(**OPEN_CLIP["model_cfg"])),
        "open_clip_text": shapes(open_clip.CustomTextCLIP(**OPEN_CLIP["model_cfg"])),
        "open_clip_siglip": shapes(trunk()),
    }
    bases = {
        "clip": {
            "config.json": CLIP, "preprocessor_config.json": CLIP_PICTURES, "tokenizer.json": {"$copy": CLIP_TOKENIZER},
            "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32},
            "model.safetensors": weights("clip")},
        "siglip": {
            "config.json": SIGLIP, "preprocessor_config.json": SIGLIP_PICTURES,
            "spiece.model": {"$sentencepiece": SIGLIP_TOKENIZER}, "tokenizer_config.json": SIGLIP_TOKENS,
            "model.safetensors": weights("siglip")},
        "siglip2": {
            "config.json": {**SIGLIP, "text_config": {**SIGLIP["text_config"], "vocab_size": len(gemma_size)}},
            "preprocessor_config.json": {**SIGLIP_PICTURES, "resample": 2},
            "tokenizer.json": {"$copy": GEMMA_TOKENIZER},
            "tokenizer_config.json": {**GEMMA_TOKENS, "tokenizer_class": "Siglip2Tokenizer"},
            "model.safetensors": weights("siglip", add={"text_model.embeddings.token_embedding.weight": [len(gemma_size), 16]})},
        "open_clip": {
            "open_clip_config.json": OPEN_CLIP, "tokenizer.json": {"$copy": CLIP_TOKENIZER},
            "tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
            "open_clip_model.safetensors": weights("open_clip")},
        "open_clip_siglip": {
            "open_clip_config.json": OPEN_CLIP_SIGLIP, "tokenizer.json": {"$copy": SIGLIP_TOKENIZER},
            "tokenizer_config.json": T5_TOKENS, "open_clip_model.safetensors": weights("open_clip_siglip")},
    }
    return {"weights": sets, "bases": bases, "rows": [*rows(), *repositories()]}


def rows():
    out = []

    def add(name, base="clip", refused=None, **more):
        row = {"name": name, "base": base, **more}
        if base.startswith("open_clip"):
            row["reference"] = "open_clip"
        if refused:
            row["refused"] = refused if isinstance(refused, list) else [refused]
        out.append(row)

    def pictures(name, patch, refused=None, remove=(), base="clip"):
        file = "preprocessor_config.json"
        add(f"pictures: {name}", base, refused, patch={file: patch}, remove={file: list(remove)})

    def config(name, patch, refused=None, remove=(), base="clip", **more):
        add(f"config: {name}", base, refused, patch={"config.json": patch}, remove={"config.json": list(remove)}, **more)

    def tokens(name, changed, refused=None, base="clip", **more):
        add(f"tokenizer: {name}", base, refused, patch={"tokenizer_config.json": changed, **more.pop("patch", {})}, **more)

    for base in ("clip", "siglip", "siglip2", "open_clip", "open_clip_siglip"):
        add(base, base)

    # preprocessor_config.json
    pictures("do_rescale false", {"do_rescale": False})
    pictures("do_normalize false", {"do_normalize": False})
    pictures("do_normalize false, no mean", {"do_normalize": False}, remove=["image_mean", "image_std"])
    pictures("do_resize false", {"do_resize": False}, "do_resize")
    pictures("do_center_crop false", {"do_center_crop": False}, "do_center_crop")
    pictures("height and width, no crop", {"do_center_crop": False}, remove=["size", "crop_size"],
             refused="do_center_crop")
    add("pictures: exact size, no crop", patch={"preprocessor_config.json": {"do_center_crop": False}},
        files={"preprocessor_config.json": {**CLIP_PICTURES, "size": {"height": 32, "width": 32}}})
    add("pictures: exact larger size, cropped",
        files={"preprocessor_config.json": {**CLIP_PICTURES, "size": {"height": 40, "width": 40}}})
    add("pictures: exact size that is no square", refused="size",
        files={"preprocessor_config.json": {**CLIP_PICTURES, "size": {"height": 32, "width": 40}}})
    add("pictures: longest edge", refused="longest_edge",
        files={"preprocessor_config.json": {**CLIP_PICTURES, "size": {"longest_edge": 32}}})
    pictures("shortest and longest edge", {"size": {"longest_edge": 64}}, "longest_edge")
    pictures("larger before the crop", {"size": {"shortest_edge": 35}})
    pictures("smaller than the crop", {"size": {"shortest_edge": 28}}, "size")
    pictures("crop_size shortest_edge", {"crop_size": 32}, None)
    pictures("numbers as sizes", {"size": 32, "crop_size": 32})
    pictures("nearest", {"resample": 0}, "resample")
    pictures("Lanczos", {"resample": 1})
    pictures("bilinear", {"resample": 2})
    pictures("box", {"resample": 4})
    pictures("Hamming", {"resample": 5})
    pictures("resample null", {"resample": None}, "resample")
    pictures("do_rescale null", {"do_rescale": None})
    pictures("do_normalize null", {"do_normalize": None})
    pictures("do_center_crop null", {"do_center_crop": None}, "do_center_crop")
    pictures("do_resize null", {"do_resize": None}, "do_resize")
    pictures("image_mean null", {"image_mean": None}, "image_mean")
    pictures("size null", {"size": None}, "size")
    pictures("rescale_factor null", {"rescale_factor": None}, "rescale_factor")
    pictures("resample as a word", {"resample": "bicubic"}, "resample")
    pictures("mean and deviation a half", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    pictures("one mean for all channels", {"image_mean": 0.5, "image_std": 0.5})
    pictures("no mean", {}, remove=["image_mean", "image_std"])
    pictures("deviation 0", {"image_std": [0, 0.5, 0.5]}, "image_std")
    pictures("rescale_factor", {"rescale_factor": 1 / 127.5})
    pictures("do_convert_rgb false", {"do_convert_rgb": False}, "do_convert_rgb")
    pictures("do_convert_rgb null", {"do_convert_rgb": None})
    pictures("do_pad", {"do_pad": True, "pad_size": {"height": 32, "width": 32}}, "do_pad")
    pictures("crop_pct", {"crop_pct": 0.9}, "crop_pct")
    pictures("ViT", {"image_processor_type": "ViTImageProcessor", "size": 32}, remove=["resample", "image_mean", "image_std", "crop_size", "do_center_crop"])
    pictures("ViT of old", {"feature_extractor_type": "ViTFeatureExtractor", "size": 32}, remove=["image_processor_type", "crop_size", "do_center_crop"])
    pictures("CLIP of old", {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32}, remove=["image_processor_type", "do_rescale", "rescale_factor", "do_convert_rgb"])
    pictures("Fast", {"image_processor_type": "CLIPImageProcessorFast"})
    pictures("SigLIP's processor with one number", {"image_processor_type": "SiglipImageProcessor", "size": 32}, "size", remove=["crop_size", "do_center_crop"])
    pictures("another class", {"image_processor_type": "ConvNextImageProcessor"}, "image_processor_type")
    pictures("SigLIP 2's patches", {"image_processor_type": "Siglip2ImageProcessor"}, "image_processor_type", base="siglip")
    pictures("default_to_square", {"default_to_square": True, "size": 32}, base="siglip")
    pictures("unknown key", {"favourite_colour": "red"})

    # config.json
    config("gelu", {"text_config": {"hidden_act": "gelu"}, "vision_config": {"hidden_act": "gelu"}})
    config("gelu_new", {"text_config": {"hidden_act": "gelu_new"}})
    config("relu", {"text_config": {"hidden_act": "relu"}}, "hidden_act")
    config("eps", {"text_config": {"layer_norm_eps": 1e-3}, "vision_config": {"layer_norm_eps": 1e-2}})
    config("text_config_dict", {"text_config_dict": {**CLIP["text_config"], "hidden_act": "gelu"}})
    config("vision_config_dict", {"vision_config_dict": {**CLIP["vision_config"], "hidden_act": "gelu"}})
    config("only *_config_dict", {"text_config_dict": CLIP["text_config"], "vision_config_dict": CLIP["vision_config"]}, remove=["text_config", "vision_config"])
    config("*_config_dict null", {"text_config_dict": None, "vision_config_dict": None})
    config("text_config_dict has defaults", {"text_config_dict": {k: v for k, v in CLIP["text_config"].items() if k != "eos_token_id"}}, "end-of-text")
    config("text_config_dict of SigLIP", {"text_config_dict": {"hidden_act": "gelu"}}, "text_config_dict", base="siglip")
    config("projection_dim missing", {}, ["visual_projection", "projection_dim"], remove=["projection_dim"])
    config("end of text 2", {"text_config": {"eos_token_id": 2}})
    config("end of text in a list", {"text_config": {"eos_token_id": [1]}}, "eos_token_id")
    config("image_size in a list", {"vision_config": {"image_size": [32, 32]}}, "image_size")
    config("image_size not square", {"vision_config": {"image_size": [32, 40]}}, "image_size")
    config("num_channels", {"vision_config": {"num_channels": 1}}, "num_channels")
    config("patches that do not fill the side", {"vision_config": {"image_size": 36}}, None,
           files={"preprocessor_config.json": {**CLIP_PICTURES, "size": {"shortest_edge": 36}, "crop_size": {"height": 36, "width": 36}}})
    config("quantization_config", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config")
    config("quantization_config of an encoder", {"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantization_config")
    config("auto_map", {"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map")
    config("pruned_heads", {"text_config": {"pruned_heads": {"0": [1]}}}, "pruned_heads")
    config("fewer layers than weights", {"text_config": {"num_hidden_layers": 1}}, "encoder.layers.1")
    config("more layers than weights", {"text_config": {"num_hidden_layers": 3}}, "encoder.layers.2")
    config("heads", {"text_config": {"num_attention_heads": 3}}, "heads")
    config("logit scale of the configuration", {"logit_scale_init_value": 4.0})
    config("no head", {"vision_config": {"vision_use_head": False}}, "vision_use_head", base="siglip")
    config("activation", {"text_config": {"hidden_act": "gelu"}}, base="siglip")
    config("projection_size", {"text_config": {"projection_size": 12}}, "projection_size", base="siglip")
    config("no model_type", {}, "model_type", remove=["model_type"])
    for other in ("siglip2", "chinese_clip", "jina_clip", "metaclip_2", "altclip", "blip", "clipseg", "clip_vision_model",
                  "vision-text-dual-encoder", "xlm-roberta"):
        config(f"model_type {other}", {"model_type": other}, "model_type")
    config("text encoder of another model", {"text_config": {"model_type": "xlm-roberta"}}, "model_type")

    # tokenizer_config.json and tokenizer.json
    tokens("cut on the left", {"truncation_side": "left"})
    tokens("cut on the left, of SigLIP", {"truncation_side": "left"}, base="siglip")
    tokens("padded on the left", {"padding_side": "left"}, "padding_side")
    tokens("padded on the left, of SigLIP", {"padding_side": "left"}, base="siglip")
    tokens("padding_side missing, of Gemma", {}, base="siglip2", remove={"tokenizer_config.json": ["padding_side"]})
    tokens("cut on the left by tokenizer.json", {}, patch={"tokenizer.json": {"truncation": {"direction": "Left", "max_length": 16, "strategy": "LongestFirst", "stride": 0}}})
    tokens("padded on the left by tokenizer.json", {}, "padding.direction", patch={"tokenizer.json": {"padding": {"strategy": {"Fixed": 32}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "<|endoftext|>"}}})
    tokens("model_max_length", {"model_max_length": 8}, "model_max_length")
    tokens("model_max_length not set", {"model_max_length": 1000000000000000019884624838656})
    tokens("no post-processor", {}, patch={"tokenizer.json": {"post_processor": None}})
    tokens("another normalizer", {}, patch={"tokenizer.json": {"normalizer": None}})
    tokens("do_lower_case", {"do_lower_case": False}, "do_lower_case")
    tokens("another class", {"tokenizer_class": "XLMRobertaTokenizer"}, "tokenizer_class")
    tokens("another class, of SigLIP", {"tokenizer_class": "T5Tokenizer"}, "tokenizer_class", base="siglip")
    tokens("split_special_tokens", {"split_special_tokens": True}, "split_special_tokens")
    tokens("more special tokens", {"extra_special_tokens": ["<brand>"]}, "extra_special_tokens")
    tokens("vocab.json and merges.txt", {}, files={"tokenizer.json": None, "vocab.json": {"$vocab": CLIP_TOKENIZER}, "merges.txt": {"$merges": CLIP_TOKENIZER}})
    tokens("vocab.json without merges.txt", {}, "merges.txt", files={"tokenizer.json": None, "vocab.json": {"$vocab": CLIP_TOKENIZER}})
    tokens("no tokenizer_config.json", {}, files={"tokenizer_config.json": None})
    tokens("nothing", {}, "tokenizer.json", files={"tokenizer.json": None})
    tokens("tokenizer.json of SigLIP", {}, base="siglip", files={"spiece.model": {"$sentencepiece": SIGLIP_TOKENIZER}, "tokenizer.json": {"$copy": SIGLIP_TOKENIZER}})
    tokens("end of text not added, of Gemma", {"add_eos_token": False}, "add_eos_token", base="siglip2")

    # Layouts and weights
    def weighted(name, refused=None, base="clip", **change):
        add(f"weights: {name}", base, refused, weights=change)

    add("layout: processor_config.json", files={"preprocessor_config.json": None, "processor_config.json": {"processor_class": "CLIPProcessor", "image_processor": CLIP_PICTURES}})
    add("layout: both processor files", files={"processor_config.json": {"processor_class": "CLIPProcessor", "image_processor": {**CLIP_PICTURES, "image_mean": [0.5] * 3}}})
    add("layout: processor_config.json without pictures", files={"processor_config.json": {"processor_class": "CLIPProcessor"}})
    add("layout: refused in processor_config.json", refused="image_processor.do_resize", files={"preprocessor_config.json": None, "processor_config.json": {"image_processor": {**CLIP_PICTURES, "do_resize": False}}})
    shards = {f"model-0000{i + 1}-of-00002.safetensors": weights("clip", part=[i, 2]) for i in range(2)}
    from transformers import CLIPModel as Model

    names = sorted(name for name in Model(CLIPConfig(**CLIP)).state_dict() if "position_ids" not in name)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: list(shards)[i % 2] for i, name in enumerate(names)}}
    add("layout: sharded", files={"model.safetensors": None, "model.safetensors.index.json": index, **shards})
    add("layout: a shard is missing", refused="model-00002-of-00002", files={"model.safetensors": None, "model.safetensors.index.json": index, "model-00001-of-00002.safetensors": list(shards.values())[0]})
    sentence = {"modules.json": {"$json": [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]},
                "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0"}}}
    inner = {f"0_CLIPModel/{name}": content for name, content in {
        "config.json": CLIP, "preprocessor_config.json": CLIP_PICTURES, "tokenizer.json": {"$copy": CLIP_TOKENIZER},
        "model.safetensors": weights("clip")}.items()}
    nothing = {name: None for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")}
    add("layout: sentence-transformers", files={**nothing, **sentence, **inner}, inner="0_CLIPModel")
    features = {part: {"method": f"get_{part}_features", "method_output_name": "pooler_output"} for part in ("text", "image")}
    newer = {
        "modules.json": {"$json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.sentence_transformer.modules.clip_model.CLIPModel"}]},
        "config_sentence_transformers.json": {
            "__version__": {"pytorch": "2.15.0", "sentence_transformers": "6.2.0", "transformers": "5.23.0"},
            "default_prompt_name": None, "model_type": "SentenceTransformer", "prompts": {"document": "", "query": ""},
            "similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction", "modality_config": features, "module_output_name": "sentence_embedding"},
        "preprocessor_config.json": None, "processor_config.json": {"image_processor": CLIP_PICTURES, "processor_class": "CLIPProcessor"}}
    add("layout: sentence-transformers 6", files=newer)
    add("layout: sentence-transformers that cuts texts", refused="max_seq_length", files={**newer, "sentence_bert_config.json": {"max_seq_length": 8}})
    add("layout: sentence-transformers with a dense layer", refused="1.type", files={
        "modules.json": {"$json": [{"idx": 0, "path": "", "type": "m.CLIPModel"}, {"idx": 1, "path": "1_Dense", "type": "m.Dense"}]}})
    add("layout: sentence-transformers with a prompt", refused="default_prompt_name", files={
        "modules.json": {"$json": [{"idx": 0, "path": "", "type": "m.CLIPModel"}]},
        "config_sentence_transformers.json": {"prompts": {"query": "find "}, "default_prompt_name": "query"}})
    add("layout: pickle", refused=["pytorch_model.bin", "pickle", "save_pretrained"], files={"model.safetensors": None, "pytorch_model.bin": text("PK")})
    add("layout: pickle of open_clip", "open_clip", refused=["open_clip_pytorch_model.bin", "pickle", "save_file"], files={"open_clip_model.safetensors": None, "open_clip_pytorch_model.bin": text("PK")})
    add("layout: Git LFS pointer", refused="Git LFS", files={"model.safetensors": text("version https://git-lfs.github.com/spec/v1\noid sha256:a63082132ba4f97a80bea76823f544493bffa8082296d62d71581a4feff1576f\nsize 605157884\n")})
    add("layout: web page", refused="web page", files={"tokenizer.json": text("<!DOCTYPE html><html><body>Sign in</body></html>")})
    add("layout: no weights", refused="model.safetensors", files={"model.safetensors": None})
    weighted("half a file", "is cut off", keep=0.5)
    for dtype in ("float16", "bfloat16", "float64"):
        weighted(dtype, dtype=dtype)
    for prefix in ("clip.", "model.", "module.", "module.model."):
        weighted(f"prefix {prefix}", prefix=prefix)
    weighted("unknown prefix", ["prefix student."], prefix="student.")
    weighted("buffers of old", add={"text_model.embeddings.position_ids": [1, 32], "vision_model.embeddings.position_ids": [1, 17]})
    weighted("a classifier's head", add={"classifier.weight": [2, 12]})
    weighted("NaN", ["visual_projection.weight", "not finite"], values={"visual_projection.weight": "nan"})
    weighted("infinite", ["not finite"], values={"text_model.encoder.layers.1.mlp.fc1.bias": "inf"}, dtype="float16")
    weighted("NaN in one token", ["token_embedding", "not finite"], values={"text_model.embeddings.token_embedding.weight": "nan"})
    weighted("too large for f32", "not finite", values={"visual_projection.weight": "1e300"}, dtype="float64")
    weighted("int8", ["fc1.weight", "I8"], types={"vision_model.encoder.layers.0.mlp.fc1.weight": "int8"})
    weighted("fp8", "F8_E4M3", types={"vision_model.encoder.layers.0.mlp.fc1.weight": "float8_e4m3fn"})
    weighted("uint8", "U8", types={"vision_model.encoder.layers.0.mlp.fc1.weight": "uint8"})
    weighted("left-over scales", "fc1.weight_scale", add={"vision_model.encoder.layers.0.mlp.fc1.weight_scale": [1]})
    weighted("LoRA", "lora_A", add={"base.lora_A.weight": [2, 16]})
    weighted("a bias that is not computed", "visual_projection.bias", add={"visual_projection.bias": [12]})
    weighted("a tensor is missing", "post_layernorm.weight", drop=["vision_model.post_layernorm.weight"])
    weighted("no logit scale", "logit_scale", drop=["logit_scale"])
    weighted("no logit bias, of SigLIP", "logit_bias", base="siglip", drop=["logit_bias"])

    # open_clip_config.json
    def opened(name, patch, refused=None, base="open_clip", **more):
        add(f"open_clip: {name}", base, refused, patch={"open_clip_config.json": patch}, **more)

    opened("quick_gelu", {"model_cfg": {"quick_gelu": True}})
    opened("custom_text", {"model_cfg": {"custom_text": True}}, files={"open_clip_model.safetensors": weights("open_clip_text")})
    opened("eps and activation", {"model_cfg": {"text_cfg": {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}}})
    opened("bilinear", {"preprocess_cfg": {"interpolation": "bilinear"}})
    opened("squash", {"preprocess_cfg": {"resize_mode": "squash"}})
    opened("longest", {"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode")
    opened("mean", {"preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}})
    opened("defaults of preprocess_cfg", {}, remove={"open_clip_config.json": ["preprocess_cfg"]})
    opened("no mask", {"model_cfg": {"text_cfg": {"no_causal_mask": True}}}, "no_causal_mask")
    opened("pooling", {"model_cfg": {"text_cfg": {"pool_type": "first"}}}, "pool_type")
    opened("layer scale", {"model_cfg": {"vision_cfg": {"ls_init_value": 1e-5}}}, "ls_init_value")
    opened("attentional pool", {"model_cfg": {"vision_cfg": {"attentional_pool": True}}}, "attentional_pool")
    opened("no norm before", {"model_cfg": {"vision_cfg": {"no_ln_pre": True}}}, "no_ln_pre")
    opened("ResNet", {"model_cfg": {"vision_cfg": {"layers": [3, 4, 6, 3]}}}, "layers")
    opened("CoCa", {"model_cfg": {"multimodal_cfg": {"layers": 2}}}, "multimodal_cfg")
    opened("another text encoder", {"model_cfg": {"text_cfg": {"hf_model_name": "xlm-roberta-base"}}}, "hf_model_name")
    opened("another image encoder", {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_base"}}}, "timm_model_name", base="open_clip_siglip")
    opened("a side that is not that of the image encoder", {"model_cfg": {"vision_cfg": {"image_size": 40}}}, "image_size", base="open_clip_siglip")
    opened("another pool", {"model_cfg": {"vision_cfg": {"timm_pool": "avg"}}}, "timm_pool", base="open_clip_siglip")
    opened("tanh", {"model_cfg": {"text_cfg": {"act_kwargs": {"approximate": "tanh"}}}}, base="open_clip_siglip")
    opened("another cleaning", {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": "whitespace"}}}}, "clean", base="open_clip_siglip")
    weighted("open_clip in fp16", base="open_clip", dtype="float16")
    weighted("open_clip with module.", base="open_clip", prefix="module.")
    weighted("open_clip with NaN", ["visual.proj", "not finite"], base="open_clip", values={"visual.proj": "nan"})
    return out


def repositories():
    """Ten repositories with their files and keys; only widths, depths and the vocabulary are shrunken."""
    import repository_rows

    return repository_rows.repositories()
