//! Compares ways to rank on the owner's own catalogue and queries.
//!
//! A [`Corpus`] is the stored table in memory, a [`JudgedQuery`] a query with what is known of its
//! right answers, a [`RankingConfiguration`] a way to rank. [`evaluate`] ranks every query under
//! every configuration in one pass over the images (all configurations are affine in the raw score)
//! and returns an [`EvaluationReport`], which is printed on a terminal, as JSON or as one HTML
//! file.
//! [`arrays`] does the same on embeddings that somebody has already, without a catalogue, and
//! [`QueryLogReader`] compares configurations by what query workers logged, without a catalogue.
//! docs/evaluation.md is the guide for users.

pub mod arrays;
mod bank_suggestion;
mod baseline;
pub(crate) mod calibrate;
pub(crate) mod compare;
mod corrections;
mod evaluation;
pub(crate) mod judgements;
mod log_lines;
pub(crate) mod logs;
pub(crate) mod measures;
pub(crate) mod report;
pub(crate) mod suggest;
mod text_files;
pub mod trec;

pub use bank_suggestion::{BankSuggestion, divide_texts, suggest_bank};
pub use baseline::plain_clip_counterpart;
pub use calibrate::{ThresholdReport, ThresholdTargets};
pub use compare::{
    BaseConfiguration, ConfigurationResolver, ConfigurationResult, ConfigurationSpec, Corpus,
    CorpusImage, CorpusTable, CorrectionCost, EvaluationError, ImageGrades, LoadedGeneration,
    MAX_CONFIGURATIONS, MeasureSummary, QueryRanking, Ranker, RankingChange, RankingConfiguration,
    RankingConfigurationError, ReportedConfiguration, Separation, ShownResult, ranks_of,
    top_indices,
};
pub use corrections::{CorrectionFormat, Corrections};
pub use evaluation::{Evaluation, EvaluationPlan, evaluate_configurations};
pub use judgements::{
    JudgedQuery, Judgements, MAX_SAMPLED_TEXTS, QueryFileError, QueryTextError, TextSample,
    queries_from_csv, queries_from_feedback, queries_from_json_lines,
};
pub use logs::{
    QueryLogError, QueryLogReader, QueryLogReport, render_html as render_query_logs_html,
    render_terminal as render_query_logs_terminal,
};
pub use measures::interval::{
    ConfidenceInterval, MeasureComparison, MeasureDirection, RESAMPLING_SEED, bootstrap_mean,
    compare_measures, correct_by_holm, wilson_interval,
};
pub use measures::{Cutoffs, FALSE_HIT_MEASURE, JudgedRanking, MAP_MEASURE};
pub use report::html::{ThumbnailUris, images_to_show, render_html};
pub use report::terminal::{render_runs_terminal, render_terminal};
pub use report::{EvaluationReport, MeasuredDifference, QueryCounts, classify_difference};
pub use suggest::{
    ChosenPrompts, HalfWithoutJudgedQueries, PromptPool, PromptSuggestion,
    check_both_halves_judged, suggest_prompts,
};
pub use text_files::{decode_text, describe_without_position, detect_delimiter};

#[cfg(test)]
mod tests;
