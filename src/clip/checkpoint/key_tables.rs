//! What is known of each key of a checkpoint's JSON files: whether embeddings follow it, whether it
//! changes none, and which of its values are refused. `transformers` 5.23 and `open_clip` 3.3 are the
//! references; `docs/checkpoints.md` has the same in words.

use super::key_report::KeyRule::{Harmless, Obeyed, OneOf};
use super::key_report::{KeyRule, KeyTable};

type Part = &'static [(&'static str, KeyRule)];

/// Keys that any configuration of `transformers` may have, also those of its encoders.
const ANY_CONFIG: Part = &[
    ("quantization_config", OneOf(&[])),
    ("compression_config", OneOf(&[])),
    ("pruned_heads", OneOf(&["{}"])),
    ("per_layer_config", OneOf(&[])),
    ("_attn_implementation", Harmless),
    ("_attn_implementation_autoset", Harmless),
    ("_commit_hash", Harmless),
    ("_name_or_path", Harmless),
    ("add_cross_attention", Harmless),
    ("architectures", Harmless),
    ("attention_dropout", Harmless),
    ("attn_implementation", Harmless),
    ("bad_words_ids", Harmless),
    ("begin_suppress_tokens", Harmless),
    ("chunk_size_feed_forward", Harmless),
    ("cross_attention_hidden_size", Harmless),
    ("decoder_start_token_id", Harmless),
    ("diversity_penalty", Harmless),
    ("do_sample", Harmless),
    ("dropout", Harmless),
    ("dtype", Harmless),
    ("early_stopping", Harmless),
    ("encoder_no_repeat_ngram_size", Harmless),
    ("exponential_decay_length_penalty", Harmless),
    ("finetuning_task", Harmless),
    ("forced_bos_token_id", Harmless),
    ("forced_eos_token_id", Harmless),
    ("gradient_checkpointing", Harmless),
    ("id2label", Harmless),
    ("initializer_factor", Harmless),
    ("initializer_range", Harmless),
    ("is_decoder", Harmless),
    ("is_encoder_decoder", Harmless),
    ("label2id", Harmless),
    ("length_penalty", Harmless),
    ("max_length", Harmless),
    ("min_length", Harmless),
    ("no_repeat_ngram_size", Harmless),
    ("num_beam_groups", Harmless),
    ("num_beams", Harmless),
    ("num_labels", Harmless),
    ("num_return_sequences", Harmless),
    ("output_attentions", Harmless),
    ("output_hidden_states", Harmless),
    ("output_scores", Harmless),
    ("prefix", Harmless),
    ("problem_type", Harmless),
    ("remove_invalid_values", Harmless),
    ("repetition_penalty", Harmless),
    ("return_dict", Harmless),
    ("return_dict_in_generate", Harmless),
    ("sep_token_id", Harmless),
    ("suppress_tokens", Harmless),
    ("task_specific_params", Harmless),
    ("temperature", Harmless),
    ("tf_legacy_loss", Harmless),
    ("tie_encoder_decoder", Harmless),
    ("tie_word_embeddings", Harmless),
    ("tokenizer_class", Harmless),
    ("top_k", Harmless),
    ("top_p", Harmless),
    ("torch_dtype", Harmless),
    ("torchscript", Harmless),
    ("transformers_version", Harmless),
    ("typical_p", Harmless),
    ("use_bfloat16", Harmless),
    ("use_cache", Harmless),
];

const MODEL: Part = &[
    ("auto_map", OneOf(&[])),
    ("model_type", Obeyed),
    ("text_config", Obeyed),
    ("vision_config", Obeyed),
    ("notice", Obeyed),
    // Used if the weights have none, and then a checkpoint is refused.
    ("logit_scale_init_value", Harmless),
    ("bos_token_id", Harmless),
    ("eos_token_id", Harmless),
    ("pad_token_id", Harmless),
    ("transformers.js_config", Harmless),
];

/// `config.json` of CLIP.
pub const CLIP_MODEL: KeyTable = &[
    MODEL,
    &[("projection_dim", Obeyed), ("text_config_dict", Obeyed), ("vision_config_dict", Obeyed)],
    ANY_CONFIG,
];

/// `config.json` of SigLIP.
pub const SIGLIP_MODEL: KeyTable = &[
    MODEL,
    &[
        // The reference reads them for CLIP only.
        ("text_config_dict", OneOf(&[])),
        ("vision_config_dict", OneOf(&[])),
        ("projection_dim", Harmless),
    ],
    ANY_CONFIG,
];

const ENCODER: Part = &[
    ("hidden_act", Obeyed),
    ("hidden_size", Obeyed),
    ("intermediate_size", Obeyed),
    ("layer_norm_eps", Obeyed),
    ("num_attention_heads", Obeyed),
    ("num_hidden_layers", Obeyed),
];

const TEXT: Part = &[
    ("max_position_embeddings", Obeyed),
    ("vocab_size", Obeyed),
    ("bos_token_id", Harmless),
    ("pad_token_id", Harmless),
];

/// `text_config` of CLIP. The model projects to the `projection_dim` of the whole.
pub const CLIP_TEXT: KeyTable = &[
    ENCODER,
    TEXT,
    &[
        ("eos_token_id", Obeyed),
        ("projection_dim", Harmless),
        ("model_type", OneOf(&["\"clip_text_model\"", "\"clip\""])),
    ],
    ANY_CONFIG,
];

/// `text_config` of SigLIP. Its last position is read, whatever the token there.
pub const SIGLIP_TEXT: KeyTable = &[
    ENCODER,
    TEXT,
    &[
        ("eos_token_id", Harmless),
        ("projection_size", Obeyed),
        ("model_type", OneOf(&["\"siglip_text_model\"", "\"siglip\""])),
    ],
    ANY_CONFIG,
];

const VISION: Part = &[
    ("image_size", Obeyed),
    ("num_channels", Obeyed),
    ("patch_size", Obeyed),
    ("bos_token_id", Harmless),
    ("eos_token_id", Harmless),
    ("pad_token_id", Harmless),
];

/// `vision_config` of CLIP.
pub const CLIP_VISION: KeyTable = &[
    ENCODER,
    VISION,
    &[("projection_dim", Harmless), ("model_type", OneOf(&["\"clip_vision_model\"", "\"clip\""]))],
    ANY_CONFIG,
];

/// `vision_config` of SigLIP.
pub const SIGLIP_VISION: KeyTable = &[
    ENCODER,
    VISION,
    &[
        ("vision_use_head", OneOf(&["true"])),
        ("model_type", OneOf(&["\"siglip_vision_model\"", "\"siglip\""])),
    ],
    ANY_CONFIG,
];

/// `processor_config.json`; what is in `image_processor` is read by [`PREPROCESSOR`].
pub const PROCESSOR: KeyTable =
    &[&[("auto_map", OneOf(&[])), ("image_processor", Obeyed), ("processor_class", Harmless)]];

/// `preprocessor_config.json`, and `image_processor` of `processor_config.json`.
pub const PREPROCESSOR: KeyTable = &[&[
    ("auto_map", OneOf(&[])),
    ("crop_size", Obeyed),
    ("default_to_square", Obeyed),
    ("do_center_crop", Obeyed),
    // Pictures are always decoded to RGB.
    ("do_convert_rgb", OneOf(&["true"])),
    ("do_normalize", Obeyed),
    ("do_rescale", Obeyed),
    ("do_resize", OneOf(&["true"])),
    ("feature_extractor_type", Obeyed),
    ("image_mean", Obeyed),
    ("image_processor_type", Obeyed),
    ("image_std", Obeyed),
    ("resample", Obeyed),
    ("rescale_factor", Obeyed),
    ("size", Obeyed),
    // Steps of other image processors.
    ("crop_pct", OneOf(&[])),
    ("do_align_long_axis", OneOf(&["false"])),
    ("do_flip_channel_order", OneOf(&["false"])),
    ("do_grayscale", OneOf(&["false"])),
    ("do_image_splitting", OneOf(&["false"])),
    ("do_pad", OneOf(&["false"])),
    ("do_reduce_labels", OneOf(&["false"])),
    ("do_thumbnail", OneOf(&["false"])),
    ("max_num_patches", OneOf(&[])),
    ("max_size", OneOf(&[])),
    ("offset", OneOf(&["false"])),
    ("patch_size", OneOf(&[])),
    ("size_divisor", OneOf(&[])),
    ("use_square_size", OneOf(&["false"])),
    // Only together with `do_pad`.
    ("pad_size", Harmless),
    ("_valid_processor_keys", Harmless),
    ("data_format", Harmless),
    ("device", Harmless),
    ("disable_grouping", Harmless),
    ("image_seq_length", Harmless),
    ("input_data_format", Harmless),
    ("processor_class", Harmless),
    ("return_tensors", Harmless),
]];

const TOKENIZER: Part = &[
    ("auto_map", OneOf(&[])),
    ("added_tokens_decoder", Obeyed),
    ("bos_token", Obeyed),
    ("eos_token", Obeyed),
    ("model_max_length", Obeyed),
    ("pad_token", Obeyed),
    ("padding_side", Obeyed),
    ("tokenizer_class", Obeyed),
    ("truncation_side", Obeyed),
    ("unk_token", Obeyed),
    ("additional_special_tokens", OneOf(&["[]"])),
    ("extra_special_tokens", OneOf(&["[]", "{}"])),
    ("pad_to_multiple_of", OneOf(&[])),
    ("sp_model_kwargs", OneOf(&["{}"])),
    ("split_special_tokens", OneOf(&["false"])),
    ("stride", OneOf(&["0"])),
    ("backend", Harmless),
    ("chat_template", Harmless),
    ("clean_up_tokenization_spaces", Harmless),
    ("cls_token", Harmless),
    ("errors", Harmless),
    ("is_local", Harmless),
    ("local_files_only", Harmless),
    ("mask_token", Harmless),
    ("model_input_names", Harmless),
    ("name_or_path", Harmless),
    ("pad_token_type_id", Harmless),
    ("processor_class", Harmless),
    ("sep_token", Harmless),
    ("spaces_between_special_tokens", Harmless),
    ("special_tokens_map_file", Harmless),
    ("tokenizer_file", Harmless),
    ("truncation_strategy", Harmless),
    ("use_default_system_prompt", Harmless),
    ("use_fast", Harmless),
    // The reference is given the context length.
    ("max_length", Harmless),
];

/// `tokenizer_config.json` of CLIP. Begin and end of text are added whatever it says.
pub const CLIP_TOKENIZER: KeyTable = &[
    TOKENIZER,
    &[
        ("add_bos_token", Harmless),
        ("add_eos_token", Harmless),
        ("add_prefix_space", OneOf(&["false"])),
        ("do_lower_case", OneOf(&["true"])),
        ("do_basic_tokenize", Harmless),
    ],
];

/// `tokenizer_config.json` of SigLIP.
pub const SIGLIP_TOKENIZER: KeyTable = &[
    TOKENIZER,
    &[
        ("add_bos_token", OneOf(&["false"])),
        ("add_eos_token", OneOf(&["true"])),
        ("add_prefix_space", OneOf(&["false"])),
        ("do_lower_case", OneOf(&["true"])),
        ("extra_ids", OneOf(&["0"])),
        ("legacy", Harmless),
    ],
];

/// `open_clip_config.json`.
pub const OPEN_CLIP: KeyTable = &[&[("model_cfg", Obeyed), ("preprocess_cfg", Obeyed)]];

/// `model_cfg` of `open_clip_config.json`.
pub const OPEN_CLIP_MODEL: KeyTable = &[&[
    ("custom_text", Obeyed),
    ("embed_dim", Obeyed),
    ("quick_gelu", Obeyed),
    ("text_cfg", Obeyed),
    ("vision_cfg", Obeyed),
    ("audio_cfg", OneOf(&[])),
    ("multimodal_cfg", OneOf(&[])),
    ("cast_dtype", Harmless),
    // The weights have the values.
    ("init_logit_bias", Harmless),
    ("init_logit_scale", Harmless),
    ("nonscalar_logit_scale", Harmless),
    ("output_dict", Harmless),
]];

/// Variants of a block that `open_clip` knows, in both encoders.
const OPEN_CLIP_BLOCK: Part = &[
    ("act_kwargs", Obeyed),
    ("layers", Obeyed),
    ("mlp_ratio", Obeyed),
    ("norm_kwargs", Obeyed),
    ("width", Obeyed),
    ("block_type", OneOf(&["\"default\""])),
    ("final_ln_after_pool", OneOf(&["false"])),
    ("ls_init_value", OneOf(&[])),
    ("qk_norm", OneOf(&["false"])),
    ("scale_attn", OneOf(&["false"])),
    ("scale_attn_inner", OneOf(&["false"])),
    ("scale_fc", OneOf(&["false"])),
    ("scale_heads", OneOf(&["false"])),
    ("scaled_cosine_attn", OneOf(&["false"])),
    ("output_tokens", Harmless),
];

/// `vision_cfg` of `open_clip_config.json`.
pub const OPEN_CLIP_VISION: KeyTable = &[
    OPEN_CLIP_BLOCK,
    &[
        ("head_width", Obeyed),
        ("image_size", Obeyed),
        ("patch_size", Obeyed),
        ("timm_model_kwargs", Obeyed),
        ("timm_model_name", Obeyed),
        ("attentional_pool", OneOf(&["false"])),
        ("no_ln_pre", OneOf(&["false"])),
        ("pool_type", OneOf(&["\"tok\""])),
        ("pos_embed_type", OneOf(&["\"learnable\""])),
        ("timm_pool", OneOf(&["\"map\""])),
        ("timm_proj", OneOf(&["\"none\"", "\"\""])),
        ("timm_proj_bias", OneOf(&["false"])),
        ("attn_pooler_heads", Harmless),
        ("attn_pooler_queries", Harmless),
        ("image_seq_len", Harmless),
        ("patch_dropout", Harmless),
        ("timm_drop", Harmless),
        ("timm_drop_path", Harmless),
        ("timm_model_pretrained", Harmless),
    ],
];

/// `vision_cfg.timm_model_kwargs` of `open_clip_config.json`.
pub const TIMM_MODEL: KeyTable = &[&[
    ("depth", Obeyed),
    ("embed_dim", Obeyed),
    ("img_size", Obeyed),
    ("mlp_ratio", Obeyed),
    ("num_heads", Obeyed),
    ("patch_size", Obeyed),
]];

/// `text_cfg` of `open_clip_config.json`.
pub const OPEN_CLIP_TEXT: KeyTable = &[
    OPEN_CLIP_BLOCK,
    &[
        ("context_length", Obeyed),
        ("heads", Obeyed),
        ("no_causal_mask", Obeyed),
        ("pool_type", Obeyed),
        ("proj_bias", Obeyed),
        ("tokenizer_kwargs", Obeyed),
        ("vocab_size", Obeyed),
        ("embed_cls", OneOf(&["false"])),
        ("hf_model_config", OneOf(&[])),
        ("hf_model_name", OneOf(&[])),
        ("proj_type", OneOf(&["\"linear\""])),
        ("text_arch", OneOf(&["\"clip\""])),
        ("tokenizer_mode", OneOf(&[])),
        ("tokenizer_type", OneOf(&["\"\""])),
        ("variable_text", OneOf(&["false"])),
        // The largest id is end-of-text, and what follows it is not attended to.
        ("bos_id", Harmless),
        ("eos_id", Harmless),
        ("pad_id", Harmless),
        ("hf_model_pretrained", Harmless),
        ("hf_pooler_type", Harmless),
        ("hf_proj_type", Harmless),
        // The tokenizer in the folder is read.
        ("hf_tokenizer_name", Harmless),
        ("tiktoken_name", Harmless),
    ],
];

/// `preprocess_cfg` of `open_clip_config.json`.
pub const OPEN_CLIP_PREPROCESS: KeyTable = &[&[
    ("interpolation", OneOf(&["\"bicubic\"", "\"bilinear\""])),
    ("mean", Obeyed),
    ("mode", OneOf(&["\"RGB\""])),
    ("resize_mode", OneOf(&["\"shortest\"", "\"squash\""])),
    ("size", Obeyed),
    ("std", Obeyed),
    // Only with the `resize_mode` longest.
    ("fill_color", Harmless),
]];

/// `modules.json` of sentence-transformers: one entry.
pub const SENTENCE_TRANSFORMERS_MODULE: KeyTable = &[&[
    ("path", Obeyed),
    ("type", Obeyed),
    ("idx", Harmless),
    ("name", Harmless),
    ("kwargs", Harmless),
]];

/// `config_sentence_transformers.json`: a default prompt would be put before every text.
pub const SENTENCE_TRANSFORMERS: KeyTable = &[&[
    ("default_prompt_name", OneOf(&[])),
    ("truncate_dim", OneOf(&[])),
    ("__version__", Harmless),
    ("model_type", Harmless),
    ("prompts", Harmless),
    ("similarity_fn_name", Harmless),
]];

/// `sentence_bert_config.json`: how a module calls the model.
pub const SENTENCE_BERT: KeyTable = &[&[
    ("do_lower_case", OneOf(&["false"])),
    ("max_seq_length", OneOf(&[])),
    (
        "modality_config",
        OneOf(&[
            r#"{"text": {"method": "get_text_features", "method_output_name": "pooler_output"},
                "image": {"method": "get_image_features", "method_output_name": "pooler_output"}}"#,
            r#"{"text": {"method": "get_text_features", "method_output_name": null},
                "image": {"method": "get_image_features", "method_output_name": null}}"#,
        ]),
    ),
    ("transformer_task", OneOf(&["\"feature-extraction\""])),
    ("module_output_name", Harmless),
]];
