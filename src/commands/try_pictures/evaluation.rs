//! `--queries`: whether balancing helps on the user's queries.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::clip::Encoders;
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::error::{CommandError, path_error};
use crate::commands::shared::evaluation::thumbnails::ThumbnailSource;
use crate::commands::shared::evaluation::{embed_prompt_sets, load_live_corpus};
use crate::commands::shared::printing::Output;
use crate::commands::shared::progress::progress_bar;
use crate::config::Config;
use crate::evaluate::{
    self, BaseConfiguration, ConfigurationResolver, ConfigurationSpec, Cutoffs, EvaluationPlan,
    JudgedQuery, Judgements, ThresholdTargets,
};
use crate::record::ImageId;
use crate::watch::Tracker;

/// Ranks down to which the measures go, as `bsap evaluate` has them by default.
const CUTOFFS: &str = "1,5,10";
/// Name of the HTML report in the folder of the try.
const REPORT_FILE: &str = "report.html";
/// Most names without a picture that are printed.
const MAX_PRINTED_NAMES: usize = 5;

/// Replaces the names of pictures in judgements by their ids. Returns the names that mean no picture or
/// several: they stay as they are, and count as not in the catalogue.
pub fn resolve_names(queries: &mut [JudgedQuery], tracker: &Tracker) -> Vec<String> {
    let mut ids: BTreeMap<ImageId, Option<ImageId>> = BTreeMap::new();
    for query in queries {
        let Judgements::Graded { grades, .. } = &mut query.judgements else { continue };
        let resolved = std::mem::take(grades).into_iter().map(|(name, grade)| {
            let id = ids.entry(name.clone()).or_insert_with(|| {
                match tracker.ids_named(name.as_str())[..] {
                    [id] => ImageId::new(id).ok(),
                    _ => None,
                }
            });
            (id.clone().unwrap_or(name), grade)
        });
        *grades = resolved.collect();
    }
    let unknown = ids.into_iter().filter(|(_, id)| id.is_none());
    unknown.map(|(name, _)| name.as_str().to_owned()).collect()
}

/// Evaluates on the stored table, prints the verdict, and writes the report into `folder`.
pub async fn evaluate_and_print(
    (file, mut queries): (PathBuf, Vec<JudgedQuery>),
    unknown_names: &[String],
    config: &Config,
    encoders: Arc<dyn Encoders>,
    folder: &Path,
    output: Output,
    token: &CancellationToken,
) -> Result<(), CommandError> {
    if !unknown_names.is_empty() {
        output.line(format_args!(
            "{} names in {} mean no stored picture, or several: {}{}",
            unknown_names.len(),
            file.display(),
            unknown_names.iter().take(MAX_PRINTED_NAMES).cloned().collect::<Vec<_>>().join(", "),
            if unknown_names.len() > MAX_PRINTED_NAMES { ", …" } else { "" },
        ));
    }
    let (store, state) = open_catalogue(config).await?;
    let sets = embed_prompt_sets(&state, &*encoders)?;
    let corpus = load_live_corpus(&store, &state, encoders.clone(), token).await?;
    let mut resolver = ConfigurationResolver::new(
        &corpus,
        Some(&state),
        state.serving.clone(),
        sets,
        config.prompts.statistics_settings(),
    );
    let live = ConfigurationSpec::from_base(BaseConfiguration::Live, "live");
    let configurations = [ConfigurationSpec::plain_clip(), live]
        .iter()
        .map(|spec| resolver.resolve(spec).map_err(CommandError::usage))
        .collect::<Result<Vec<_>, _>>()?;
    let plan = EvaluationPlan {
        catalogue_name: store.url().to_string(),
        query_source: file.display().to_string(),
        queries: std::mem::take(&mut queries),
        baseline_name: configurations[0].name.clone(),
        cutoffs: Cutoffs::try_from(CUTOFFS).map_err(CommandError::usage)?,
        threshold_targets: ThresholdTargets::default(),
        correction_cost: None,
        notes: Vec::new(),
    };
    let bar = progress_bar("ranked", plan.ranked_text_count() as u64)?;
    let evaluated = tokio::task::block_in_place(|| {
        let on_ranked = |n| bar.inc(n);
        evaluate::evaluate_configurations(&mut resolver, &configurations, plan, token, &on_ranked)
    });
    bar.finish_and_clear();
    let report = evaluated?.report;
    output.line(format_args!("{}", evaluate::render_terminal(&report)));
    let thumbnails = ThumbnailSource::Fetched(config);
    let (pictures, _missing) = thumbnails.load_thumbnails(&report, &corpus, token).await?;
    let path = folder.join(REPORT_FILE);
    std::fs::write(&path, evaluate::render_html(&report, &pictures))
        .map_err(|e| path_error("--dir", &path, &e))?;
    output.line(format_args!("The report with pictures is {}", path.display()));
    Ok(())
}
