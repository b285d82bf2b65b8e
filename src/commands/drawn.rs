//! A drawn catalogue to evaluate on: what is in each picture is known, so is every right answer.

use std::sync::Arc;

use super::cli::evaluate::EvaluateArgs;
use super::progress_bar;
use crate::balance::normalise::Normaliser;
use crate::catalogue::ServingConfig;
use crate::clip::{ClipModel, Encoders, ModelOptions};
use crate::demo::catalogue::{PhotoStyle, Scene};
use crate::demo::judge::DrawnImages;
use crate::demo::queries::generate_queries;
use crate::demo::write_checkpoint;
use crate::evaluate::{Corpus, JudgedQuery, LoadedGeneration};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Side of the drawn pictures in pixels, as in the demo.
const IMAGE_SIDE_PIXELS: u32 = 256;
/// The model's folder gives it its name.
const MODEL_FOLDER: &str = "demo-clip";
/// k of `nnn`, as by default.
pub const NNN_TOP_K: usize = 8;

/// A drawn catalogue.
pub struct SyntheticCatalogue {
    encoders: Arc<dyn Encoders>,
    images: DrawnImages,
    style: PhotoStyle,
    seed: u64,
    queries_per_difficulty: usize,
    prompt_sets: Vec<Arc<EmbeddedPromptSet>>,
}

/// The demo's model, or another checkpoint.
pub fn load_model(checkpoint: Option<&str>) -> anyhow::Result<ClipModel> {
    let scratch = std::env::temp_dir().join(format!("bsap-evaluate-{}", std::process::id()));
    let checkpoint = if let Some(checkpoint) = checkpoint {
        checkpoint.to_owned()
    } else {
        let folder = scratch.join(MODEL_FOLDER);
        write_checkpoint(&folder)?;
        folder.display().to_string()
    };
    let clip = ClipModel::load(&ModelOptions { checkpoint, ..ModelOptions::default() });
    // Only what this made itself; where there is nothing, nothing is left to do.
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(clip?)
}

/// Draws and embeds what the arguments ask for. Computes: blocks for long.
pub fn draw_catalogue(args: &EvaluateArgs) -> anyhow::Result<SyntheticCatalogue> {
    let drawing = &args.drawing;
    let style = args.synthetic.unwrap_or(PhotoStyle::Studio);
    let encoders: Arc<dyn Encoders> = Arc::new(load_model(drawing.checkpoint.as_deref())?);
    let bar = progress_bar(style.name(), drawing.count)?;
    let on_embedded = |n| bar.inc(n);
    let drawn = DrawnImages::draw(
        &*encoders,
        style,
        drawing.seed,
        drawing.count,
        IMAGE_SIDE_PIXELS,
        on_embedded,
    )?;
    bar.finish_and_clear();
    let embed = |name: &str| PromptSet::load(name)?.embed(&*encoders, NNN_TOP_K).map(Arc::new);
    let sets = ["demo", "photographs"].into_iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    let (seed, per_difficulty) = (drawing.seed, drawing.per_difficulty);
    Ok(SyntheticCatalogue {
        encoders,
        images: drawn,
        style,
        seed,
        queries_per_difficulty: per_difficulty,
        prompt_sets: sets,
    })
}

impl SyntheticCatalogue {
    /// What the catalogue and its queries are called in a report.
    pub fn report_names(&self) -> (String, String) {
        let count = self.images.scenes().len();
        let catalogue =
            format!("{count} drawn pictures ({}, seed {})", self.style.name(), self.seed);
        (catalogue, "what is in the drawn pictures".to_owned())
    }

    /// What must be known to read the figures.
    pub fn report_notes() -> Vec<String> {
        vec!["Drawn pictures and the words that describe them are few; a drawn catalogue must not decide for photographs.".to_owned()]
    }

    /// The queries, with what matches them.
    pub fn judged_queries(&self) -> Vec<JudgedQuery> {
        self.images.judged_queries(&generate_queries(self.seed, self.queries_per_difficulty))
    }

    /// What is in each picture.
    pub fn scenes(&self) -> &[Scene] {
        self.images.scenes()
    }

    /// The pictures in memory.
    pub fn to_evaluation_catalogue(&self) -> Corpus {
        let images = self.images.images();
        Corpus::from_generations(vec![LoadedGeneration::new(
            "live",
            "drawn",
            0,
            self.encoders.clone(),
            images,
        )])
    }

    /// The demo's prompt sets.
    pub fn prompt_sets(&self) -> &[Arc<EmbeddedPromptSet>] {
        &self.prompt_sets
    }

    /// What the demo serves.
    pub fn serving_config(&self) -> ServingConfig {
        ServingConfig::new(self.prompt_sets[0].statistics_key.clone(), Normaliser::Nnn, 0.25)
    }
}
