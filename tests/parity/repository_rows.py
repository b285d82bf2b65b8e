"""Ten repositories of the hub as rows of matrix.py: their files, their keys and the names of their tensors;
only widths, depths, sides of pictures and vocabularies are shrunken. docs/checkpoints.md has the sources, and
what is assumed."""

import copy

import matrix_rows as rows
from matrix_rows import CLIP_TOKENIZER, GEMMA_TOKENIZER, MEAN, SIGLIP_TOKENIZER, STD, text, weights

# What transformers 4.16 wrote of each encoder, also where it says nothing.
OLD_KEYS = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "attention_dropout": 0.0,
    "bad_words_ids": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "dropout": 0.0,
    "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "finetuning_task": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_factor": 1.0, "initializer_range": 0.02,
    "is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1,
    "num_beams": 1, "num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False,
    "output_scores": False, "prefix": None, "problem_type": None, "pruned_heads": {},
    "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True,
    "return_dict_in_generate": False, "sep_token_id": None, "task_specific_params": None, "temperature": 1.0,
    "tie_encoder_decoder": False, "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0,
    "torch_dtype": None, "torchscript": False, "transformers_version": "4.16.0.dev0", "use_bfloat16": False}
TYPICAL = {"exponential_decay_length_penalty": None, "suppress_tokens": None, "begin_suppress_tokens": None,
           "tf_legacy_loss": False, "typical_p": 1.0}


def special(content, normalized=True):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False, "normalized": normalized,
            "__type": "AddedToken"}


OLD_CLIP_TOKENS = {
    "unk_token": special("<|endoftext|>"), "bos_token": special("<|startoftext|>"),
    "eos_token": special("<|endoftext|>"), "pad_token": "<|endoftext|>", "add_prefix_space": False,
    "errors": "replace", "do_lower_case": True, "name_or_path": "openai/clip-vit-base-patch32",
    "model_max_length": 77, "special_tokens_map_file": "special_tokens_map.json", "tokenizer_class": "CLIPTokenizer"}
OLD_CLIP_PICTURES = {
    "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": MEAN, "image_std": STD, "resample": 3, "size": 32}
SPECIAL_MAP = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
VOCABULARY = {"tokenizer.json": {"$copy": CLIP_TOKENIZER}, "vocab.json": {"$vocab": CLIP_TOKENIZER},
              "merges.txt": {"$merges": CLIP_TOKENIZER}, "special_tokens_map.json": SPECIAL_MAP}
SIGLIP_LONG = {"text_model.embeddings.position_embedding.weight": [64, 16]}
# The width between the products of an MLP is no multiple of the width of the encoder.
SO400M = {f"{part}.{layer}.{kind}": [43, 16] if layer == "fc1" and kind == "weight" else [16, 43] if kind == "weight" else [43] if layer == "fc1" else [16]
          for part in (*(f"{encoder}.encoder.layers.{i}.mlp" for encoder in ("text_model", "vision_model") for i in range(2)), "vision_model.head.mlp")
          for layer in ("fc1", "fc2") for kind in ("weight", "bias")}
LONG = {"text_model.embeddings.position_embedding.weight": [77, 16]}
BUFFERS = {"text_model.embeddings.position_ids": [1, 77], "vision_model.embeddings.position_ids": [1, 17]}


def clip(text_keys, vision_keys, activation="quick_gelu", **top):
    config = copy.deepcopy(rows.CLIP)
    for part, more in (("text_config", text_keys), ("vision_config", vision_keys)):
        config[part] = {**OLD_KEYS, **more, **config[part], "hidden_act": activation}
    # As published: the id by which the largest is meant, and 77 tokens.
    config["text_config"] |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "max_position_embeddings": 77}
    config["vision_config"] |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {**config, "initializer_factor": 1.0, **top}


def repositories():
    out = []

    def add(repository, base, files, **more):
        out.append({"name": f"repository: {repository}", "repository": repository, "base": base, "files": files, **more})

    other_weights = {"pytorch_model.bin": text("PK"), "flax_model.msgpack": text("x"), "tf_model.h5": text("x"), "README.md": text("# x")}
    openai = {
        **other_weights, **VOCABULARY, "preprocessor_config.json": OLD_CLIP_PICTURES,
        "tokenizer_config.json": OLD_CLIP_TOKENS, "model.safetensors": weights("clip", add={**LONG, **BUFFERS})}
    base32 = clip({}, {}, text_config_dict=None, vision_config_dict=None, torch_dtype="float32", transformers_version=None)
    add("openai/clip-vit-base-patch32", "clip", {**openai, "config.json": base32})
    add("openai/clip-vit-base-patch32 (main)", "clip", {**openai, "config.json": base32, "model.safetensors": None},
        refused=["pytorch_model.bin", "pickle"])
    # Its *_config_dict name the sizes that differ from the defaults; the reference takes all from there.
    text_dict = {k: rows.CLIP["text_config"][k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "projection_dim", "eos_token_id")}
    vision_dict = {k: rows.CLIP["vision_config"][k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size", "image_size", "projection_dim")}
    add("openai/clip-vit-large-patch14", "clip", {
        **openai, "config.json": clip({}, {}, text_config_dict=text_dict, vision_config_dict=vision_dict, torch_dtype="float32", transformers_version=None)})
    laion_pictures = {**OLD_CLIP_PICTURES, "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
                      "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    open_clip_files = {
        "open_clip_config.json": rows.OPEN_CLIP, "open_clip_model.safetensors": weights("open_clip"),
        "open_clip_pytorch_model.bin": text("PK")}
    laion = {**VOCABULARY, **open_clip_files, "README.md": text("# x"), "pytorch_model.bin": text("PK"),
             "preprocessor_config.json": laion_pictures, "tokenizer_config.json": OLD_CLIP_TOKENS,
             "model.safetensors": weights("clip", add={**LONG, **BUFFERS})}
    add("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "clip", {
        **laion, "config.json": clip(TYPICAL, TYPICAL, "gelu", torch_dtype="float32", transformers_version=None)})
    add("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "clip", {
        **laion, "config.json": clip(TYPICAL, TYPICAL, "gelu", text_config_dict={**text_dict, "hidden_act": "gelu"}, vision_config_dict={**vision_dict, "hidden_act": "gelu"}, torch_dtype="float32", transformers_version=None)})
    # The same with open_clip's files alone, as open_clip reads it.
    add("laion/CLIP-ViT-H-14-laion2B-s32B-b79K (open_clip)", "open_clip", {}, reference="open_clip")

    siglip_text = {"model_type": "siglip_text_model", **{k: v for k, v in rows.SIGLIP["text_config"].items() if k != "model_type"}, "max_position_embeddings": 64}
    siglip_vision = dict(rows.SIGLIP["vision_config"])
    siglip_files = {
        "README.md": text("# x"), "special_tokens_map.json": {"eos_token": special("</s>"), "pad_token": special("</s>"), "unk_token": special("<unk>")},
        "tokenizer.json": {"$copy": SIGLIP_TOKENIZER}, "spiece.model": {"$sentencepiece": SIGLIP_TOKENIZER},
        "tokenizer_config.json": {
            "added_tokens_decoder": {"1": {**special("</s>", False), "lstrip": True, "rstrip": True, "special": True},
                                     "2": {**special("<unk>", False), "lstrip": True, "rstrip": True, "special": True}},
            "additional_special_tokens": [], "clean_up_tokenization_spaces": True, "do_lower_case": True,
            "eos_token": "</s>", "model_input_names": ["input_ids"], "model_max_length": 64, "pad_token": "</s>",
            "processor_class": "SiglipProcessor", "sp_model_kwargs": {}, "tokenizer_class": "SiglipTokenizer", "unk_token": "<unk>"},
        "preprocessor_config.json": {
            "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3, "processor_class": "SiglipProcessor",
            "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"height": 32, "width": 32}},
        "model.safetensors": weights("siglip", add=SIGLIP_LONG)}
    add("google/siglip-base-patch16-224", "siglip", {
        **siglip_files, "config.json": {"architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", **siglip_text}, "vision_config": siglip_vision,
            "torch_dtype": "float32", "transformers_version": "4.37.0.dev0"}})
    # A width of the MLP that is no multiple of the hidden size, and patches that do not fill the side.
    add("google/siglip-so400m-patch14-384", "siglip", {
        **siglip_files, "model.safetensors": weights("siglip", add={**SIGLIP_LONG, **SO400M}),
        "preprocessor_config.json": {**siglip_files["preprocessor_config.json"], "size": {"height": 36, "width": 36}},
        "config.json": {"architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {**siglip_text, "intermediate_size": 43}, "vision_config": {**siglip_vision, "intermediate_size": 43, "image_size": 36},
            "torch_dtype": "float32", "transformers_version": "4.37.0.dev0"}})
    size = len(__import__("json").loads((rows.FIXTURES / GEMMA_TOKENIZER).read_text())["model"]["vocab"])
    add("google/siglip2-base-patch16-224", "siglip2", {
        "README.md": text("# x"), "special_tokens_map.json": {"eos_token": special("<eos>", False)},
        "tokenizer.json": {"$copy": GEMMA_TOKENIZER}, "tokenizer.model": text("x"),
        "tokenizer_config.json": {**rows.GEMMA_TOKENS, "additional_special_tokens": [], "processor_class": "SiglipProcessor", "sp_model_kwargs": {}, "use_default_system_prompt": False},
        "preprocessor_config.json": {
            "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
            "image_processor_type": "SiglipImageProcessor", "image_std": [0.5] * 3, "processor_class": "SiglipProcessor",
            "resample": 2, "rescale_factor": 0.00392156862745098, "size": {"height": 32, "width": 32}},
        "config.json": {"architectures": ["SiglipModel"], "initializer_factor": 1.0, "model_type": "siglip",
            "text_config": {**rows.SIGLIP["text_config"], "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-06, "projection_size": 16, "torch_dtype": "float32", "vocab_size": size},
            "vision_config": {**rows.SIGLIP["vision_config"], "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-06, "num_channels": 3, "torch_dtype": "float32"},
            "torch_dtype": "float32", "transformers_version": "4.49.0.dev0"},
        "model.safetensors": weights("siglip", add={"text_model.embeddings.token_embedding.weight": [size, 16]})}, lower_case=True)
    inner = {f"0_CLIPModel/{name}": content for name, content in {
        **{name: content for name, content in openai.items() if name in ("vocab.json", "merges.txt", "special_tokens_map.json", "preprocessor_config.json", "tokenizer_config.json", "model.safetensors", "pytorch_model.bin")},
        "config.json": base32}.items()}
    nothing = {name: None for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")}
    add("sentence-transformers/clip-ViT-B-32", "clip", {
        **nothing, **inner, "README.md": text("# x"), "config_sentence_transformers.json": {"__version__": {"sentence_transformers": "2.0.0", "transformers": "4.7.0", "pytorch": "1.9.0+cu102"}},
        "modules.json": {"$json": [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}]}}, inner="0_CLIPModel")
    add("patrickjohncyh/fashion-clip", "clip", {
        **VOCABULARY, "README.md": text("# x"), "pytorch_model.bin": text("PK"), "tokenizer_config.json": OLD_CLIP_TOKENS,
        "preprocessor_config.json": laion_pictures, "model.safetensors": weights("clip", add={**LONG, **BUFFERS}),
        "config.json": clip(TYPICAL, TYPICAL, _name_or_path="openai/clip-vit-base-patch32", text_config_dict=None, vision_config_dict=None, torch_dtype="float32", transformers_version=None)})
    add("Marqo/marqo-fashionSigLIP", "open_clip_siglip", {
        "README.md": text("# x"), "marqo_fashionSigLIP.py": text("class MarqoFashionSigLIP: pass"),
        "config.json": {"architectures": ["MarqoFashionSigLIP"], "auto_map": {
            "AutoConfig": "marqo_fashionSigLIP.MarqoFashionSigLIPConfig", "AutoModel": "marqo_fashionSigLIP.MarqoFashionSigLIP",
            "AutoProcessor": "marqo_fashionSigLIP.MarqoFashionSigLIPProcessor"},
            "open_clip_model_name": "hf-hub:Marqo/marqo-fashionSigLIP", "model_type": "siglip"},
        "model.safetensors": weights("open_clip_siglip", prefix="model."), "open_clip_pytorch_model.bin": text("PK"),
        "preprocessor_config.json": siglip_files["preprocessor_config.json"],
        "special_tokens_map.json": {"eos_token": special("</s>"), "pad_token": special("</s>"), "unk_token": special("<unk>")},
        "spiece.model": {"$sentencepiece": SIGLIP_TOKENIZER}}, reference="open_clip")
    return out
