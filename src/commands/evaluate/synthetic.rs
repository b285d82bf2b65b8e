//! `bsap evaluate --synthetic`: evaluates on pictures that the program draws, for which every relevant
//! image is known.

use std::sync::Arc;

use crate::commands::shared::progress::progress_bar;
use tokio_util::sync::CancellationToken;

use super::arguments::EvaluateArgs;
use super::calibration::build_calibration;
use super::output::{write_html_report, write_outputs};
use super::plan::{
    build_evaluation_plan, configuration_index, configuration_specs, evaluate_with_progress,
    resolve_configurations,
};
use crate::balance::normalise::Normaliser;
use crate::catalogue::ServingConfig;
use crate::clip::Encoders;
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::evaluation::thumbnails::ThumbnailSource;
use crate::commands::shared::models::load_demo_model;
use crate::commands::shared::printing::print_line;
use crate::demo::DEMO_STATISTICS;
use crate::demo::catalogue::{PhotoStyle, Scene};
use crate::demo::judge::DrawnImages;
use crate::demo::queries::generate_queries;
use crate::evaluate::{ConfigurationResolver, Corpus, JudgedQuery, LoadedGeneration};
use crate::prompts::{EmbeddedPromptSet, PromptSet};

/// Side of the pictures in pixels, as in the demo.
const IMAGE_SIDE_PIXELS: u32 = 256;

/// Draws a catalogue and evaluates on it.
pub async fn evaluate_on_synthetic_catalogue(
    args: &EvaluateArgs,
    token: CancellationToken,
) -> CommandResult {
    if args.store {
        return Err(CommandError::usage(
            "--store: a synthetic catalogue has no state; evaluate the stored one",
        ));
    }
    let specs = configuration_specs(args, None)?;
    let catalogue = tokio::task::block_in_place(|| draw_catalogue(args))?;
    let (name, source) = catalogue.report_names();
    let plan = build_evaluation_plan(
        args,
        name,
        source,
        catalogue.judged_queries(),
        SyntheticCatalogue::report_notes(),
    );
    let corpus = catalogue.to_corpus();
    let mut resolver = ConfigurationResolver::new(
        &corpus,
        None,
        catalogue.serving_config(),
        catalogue.prompt_sets().to_vec(),
        DEMO_STATISTICS,
    );
    let configurations = resolve_configurations(args, &specs, &mut resolver)?;
    let evaluated = tokio::task::block_in_place(|| {
        evaluate_with_progress(&mut resolver, &configurations, plan, &token)
    })?;
    write_outputs(args, &evaluated, &corpus, &configurations)?;
    write_html_report(
        args,
        &evaluated.report,
        &corpus,
        ThumbnailSource::Synthetic(catalogue.scenes()),
        &token,
    )
    .await?;
    if let Some(name) = &args.calibrate {
        let index = configuration_index(&configurations, name)?;
        let calibration = build_calibration(&evaluated, &mut resolver, &configurations, index)?;
        print_line!("{}", serde_json::to_string_pretty(&calibration)?);
    }
    Ok(())
}

/// Drawn pictures with their embeddings, and what is needed to evaluate on them.
struct SyntheticCatalogue {
    encoders: Arc<dyn Encoders>,
    drawn_images: DrawnImages,
    style: PhotoStyle,
    seed: u64,
    queries_per_difficulty: usize,
    prompt_sets: Vec<Arc<EmbeddedPromptSet>>,
}

/// Draws and embeds the pictures. Blocks while it computes.
fn draw_catalogue(args: &EvaluateArgs) -> anyhow::Result<SyntheticCatalogue> {
    let drawing = &args.drawing;
    let style = args.synthetic.unwrap_or(PhotoStyle::Studio);
    let encoders: Arc<dyn Encoders> = Arc::new(load_demo_model(drawing.checkpoint.as_deref())?);
    let bar = progress_bar(style.name(), drawing.count)?;
    let on_embedded = |n| bar.inc(n);
    let images = DrawnImages::draw_and_embed(
        &*encoders,
        style,
        drawing.seed,
        drawing.count,
        IMAGE_SIDE_PIXELS,
        on_embedded,
    )?;
    bar.finish_and_clear();
    let embed = |name: &str| {
        PromptSet::load_builtin_or_file(name)?.embed(&*encoders, DEMO_STATISTICS).map(Arc::new)
    };
    let sets = ["demo", "photographs"].into_iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    let (seed, per_difficulty) = (drawing.seed, drawing.per_difficulty);
    Ok(SyntheticCatalogue {
        encoders,
        drawn_images: images,
        style,
        seed,
        queries_per_difficulty: per_difficulty,
        prompt_sets: sets,
    })
}

impl SyntheticCatalogue {
    /// Returns the names of the catalogue and of its queries for the report.
    pub fn report_names(&self) -> (String, String) {
        let count = self.drawn_images.scenes().len();
        let catalogue =
            format!("{count} drawn pictures ({}, seed {})", self.style.name(), self.seed);
        (catalogue, "what is in the drawn pictures".to_owned())
    }

    /// Returns what readers of the report must know.
    pub fn report_notes() -> Vec<String> {
        vec!["There are few kinds of drawn pictures and few words that describe them; do not choose a configuration for photographs by a synthetic catalogue.".to_owned()]
    }

    /// Returns the queries with their relevant pictures.
    pub fn judged_queries(&self) -> Vec<JudgedQuery> {
        self.drawn_images.judge_queries(&generate_queries(self.seed, self.queries_per_difficulty))
    }

    /// Returns the content of each picture.
    pub fn scenes(&self) -> &[Scene] {
        self.drawn_images.scenes()
    }

    /// Returns the pictures as a corpus in memory.
    pub fn to_corpus(&self) -> Corpus {
        let images = self.drawn_images.to_stored_images();
        Corpus::from_generations(vec![LoadedGeneration::new(
            "live",
            "drawn",
            0,
            self.encoders.clone(),
            images,
        )])
    }

    /// Returns the prompt sets of the demo.
    pub fn prompt_sets(&self) -> &[Arc<EmbeddedPromptSet>] {
        &self.prompt_sets
    }

    /// Returns the configuration that the demo serves.
    pub fn serving_config(&self) -> ServingConfig {
        ServingConfig::new(self.prompt_sets[0].statistics_key.clone(), Normaliser::Nnn, 0.25)
    }
}
