//! Where each tensor of the encoders is in a checkpoint. The encoders ask for the names of
//! `transformers`; `open_clip` and `timm` name and lay out the same tensors otherwise.

use super::encoder_config::TensorNaming;

/// Where a tensor comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSource {
    /// Tensors that are joined along their first dimension; almost always one.
    pub names: Vec<String>,
    pub layout: TensorLayout,
}

/// Which part of the joined tensor it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorLayout {
    /// All of it, in the expected shape up to dimensions of 1.
    Whole,
    /// All of it, with both dimensions exchanged.
    Transposed,
    /// The third of this number, counted from 0, of its first dimension.
    Third(usize),
}

impl TensorSource {
    fn whole(name: String) -> Self {
        Self { names: vec![name], layout: TensorLayout::Whole }
    }

    fn transposed(name: &str) -> Self {
        Self { names: vec![name.to_owned()], layout: TensorLayout::Transposed }
    }
}

/// Returns where the tensor is that `transformers` calls `name`.
pub fn find_tensor_source(naming: TensorNaming, name: &str) -> TensorSource {
    match naming {
        TensorNaming::Transformers => TensorSource::whole(name.to_owned()),
        TensorNaming::OpenClip { custom_text } => {
            let text = if custom_text { "text." } else { "" };
            find_open_clip_text(name, text).or_else(|| find_open_clip_image(name)).unwrap_or_else(
                || {
                    // The scale and the bias of logits.
                    TensorSource::whole(name.to_owned())
                },
            )
        }
        TensorNaming::OpenClipTimm => find_open_clip_text(name, "text.")
            .or_else(|| find_timm_image(name))
            .unwrap_or_else(|| TensorSource::whole(name.to_owned())),
    }
}

/// The beginnings of the names of all tensors that the encoders may read: another tensor that begins so
/// belongs to a layer that is not computed.
pub fn encoder_prefixes(naming: TensorNaming) -> &'static [&'static str] {
    match naming {
        TensorNaming::Transformers => {
            &["text_model.", "vision_model.", "text_projection", "visual_projection", "logit_"]
        }
        TensorNaming::OpenClip { .. } | TensorNaming::OpenClipTimm => &[
            "visual.",
            "text.",
            "transformer.",
            "token_embedding",
            "positional_embedding",
            "ln_final",
            "text_projection",
            "logit_",
        ],
    }
}

fn find_open_clip_text(name: &str, prefix: &str) -> Option<TensorSource> {
    let whole = |rest: String| Some(TensorSource::whole(format!("{prefix}{rest}")));
    if name == "text_projection.weight" {
        return Some(TensorSource::transposed(&format!("{prefix}text_projection")));
    }
    let name = name.strip_prefix("text_model.")?;
    if let Some(layer) = name.strip_prefix("encoder.layers.") {
        return find_open_clip_block(layer, &format!("{prefix}transformer.resblocks."));
    }
    match name {
        "embeddings.token_embedding.weight" => whole("token_embedding.weight".into()),
        "embeddings.position_embedding.weight" => whole("positional_embedding".into()),
        // Of SigLIP, as a linear layer with a bias.
        "head.weight" => whole("text_projection.weight".into()),
        "head.bias" => whole("text_projection.bias".into()),
        _ => whole(format!("ln_final.{}", name.strip_prefix("final_layer_norm.")?)),
    }
}

fn find_open_clip_image(name: &str) -> Option<TensorSource> {
    if name == "visual_projection.weight" {
        return Some(TensorSource::transposed("visual.proj"));
    }
    let name = name.strip_prefix("vision_model.")?;
    if let Some(layer) = name.strip_prefix("encoder.layers.") {
        return find_open_clip_block(layer, "visual.transformer.resblocks.");
    }
    let rest = match name {
        "embeddings.class_embedding" => "class_embedding".to_owned(),
        "embeddings.position_embedding.weight" => "positional_embedding".to_owned(),
        "embeddings.patch_embedding.weight" => "conv1.weight".to_owned(),
        _ => match name.strip_prefix("pre_layrnorm.") {
            Some(part) => format!("ln_pre.{part}"),
            None => format!("ln_post.{}", name.strip_prefix("post_layernorm.")?),
        },
    };
    Some(TensorSource::whole(format!("visual.{rest}")))
}

/// `layer` is the rest of the name after `encoder.layers.`, which begins with the number of the block.
fn find_open_clip_block(layer: &str, prefix: &str) -> Option<TensorSource> {
    let (number, name) = layer.split_once('.')?;
    let whole = |rest: String| Some(TensorSource::whole(format!("{prefix}{number}.{rest}")));
    let (module, part) = name.rsplit_once('.')?;
    match module {
        "layer_norm1" => whole(format!("ln_1.{part}")),
        "layer_norm2" => whole(format!("ln_2.{part}")),
        "mlp.fc1" => whole(format!("mlp.c_fc.{part}")),
        "mlp.fc2" => whole(format!("mlp.c_proj.{part}")),
        "self_attn.out_proj" => whole(format!("attn.out_proj.{part}")),
        _ => Some(TensorSource {
            names: vec![format!("{prefix}{number}.attn.in_proj_{part}")],
            layout: TensorLayout::Third(third_of(module)?),
        }),
    }
}

/// Queries, keys and values are in this order in a joined tensor.
fn third_of(module: &str) -> Option<usize> {
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"].iter().position(|m| *m == module)
}

fn find_timm_image(name: &str) -> Option<TensorSource> {
    let name = name.strip_prefix("vision_model.")?;
    let whole = |rest: String| Some(TensorSource::whole(format!("visual.trunk.{rest}")));
    if let Some(layer) = name.strip_prefix("encoder.layers.") {
        let (number, name) = layer.split_once('.')?;
        let (module, part) = name.rsplit_once('.')?;
        return match module {
            "layer_norm1" => whole(format!("blocks.{number}.norm1.{part}")),
            "layer_norm2" => whole(format!("blocks.{number}.norm2.{part}")),
            "mlp.fc1" | "mlp.fc2" => whole(format!("blocks.{number}.{module}.{part}")),
            "self_attn.out_proj" => whole(format!("blocks.{number}.attn.proj.{part}")),
            _ => Some(TensorSource {
                names: vec![format!("visual.trunk.blocks.{number}.attn.qkv.{part}")],
                layout: TensorLayout::Third(third_of(module)?),
            }),
        };
    }
    if let Some(part) = name.strip_prefix("head.attention.in_proj_") {
        let pool = |module: &str| format!("visual.trunk.attn_pool.{module}.{part}");
        return Some(TensorSource {
            names: vec![pool("q"), pool("kv")],
            layout: TensorLayout::Whole,
        });
    }
    match name {
        "embeddings.position_embedding.weight" => whole("pos_embed".into()),
        "head.probe" => whole("attn_pool.latent".into()),
        _ => {
            let (module, part) = name.rsplit_once('.')?;
            let module = match module {
                "embeddings.patch_embedding" => "patch_embed.proj",
                "post_layernorm" => "norm",
                "head.attention.out_proj" => "attn_pool.proj",
                "head.layernorm" => "attn_pool.norm",
                "head.mlp.fc1" => "attn_pool.mlp.fc1",
                "head.mlp.fc2" => "attn_pool.mlp.fc2",
                _ => return None,
            };
            whole(format!("{module}.{part}"))
        }
    }
}
