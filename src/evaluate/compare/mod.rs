//! Ranks the same queries under several configurations and compares the rankings. `corpus` holds
//! the images and embeddings, `spec` parses a configuration from the command line and
//! `configuration` resolves it against the catalogue, `rank` ranks, and `comparison` compares the
//! rankings and fills the types of `result`.

mod comparison;
mod configuration;
mod corpus;
mod grades;
mod rank;
mod result;
mod spec;

pub use comparison::ConfigurationComparison;
pub use configuration::{
    ComparedConfiguration, ConfigurationResolver, RankingConfiguration, RankingConfigurationError,
    ReportedConfiguration,
};
pub use corpus::{
    Corpus, CorpusImage, CorpusTable, EvaluationError, LoadedGeneration, MAX_IMAGES, ModelInfo,
};
pub use grades::{ImageGrades, resolve_judgements};
pub use rank::{QueryRanking, Ranker, ranks_of, top_indices};
pub use result::{
    ConfigurationResult, CorrectionCost, MeasureSummary, RankingChange, Separation, ShownResult,
};
pub use spec::{BaseConfiguration, ConfigurationSpec, MAX_CONFIGURATIONS};
