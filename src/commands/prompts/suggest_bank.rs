//! `bsap prompts suggest` without judged queries: chooses prompts by coverage, and measures their fit.

use std::sync::Arc;

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use tokio_util::sync::CancellationToken;

use super::suggest_shared::{
    ChosenBalance, PromptsSuggestArgs, load_corpus, make_candidate, write_set,
};
use crate::balance::bank::BankReport;
use crate::balance::evidence::describe_gain_of_similar_banks;
use crate::balance::proposal::{BankMeasurement, PROPOSED_STATISTICS, ProposedBalance};
use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_line;
use crate::commands::shared::query_files::read_query_logs;
use crate::config::Config;
use crate::evaluate::{
    BankSuggestion, Corpus, MAX_SAMPLED_TEXTS, PromptPool, TextSample, divide_texts, suggest_bank,
};
use crate::prompts::{EmbeddedPromptSet, PromptSet};
use crate::record::Embedding;

/// Chooses prompts for the stored catalogue, measures their fit to held-out queries, and writes them; with
/// `--candidate` makes them the candidate.
pub async fn suggest_bank_set(
    args: &PromptsSuggestArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let logged = read_query_logs(&args.query_log)?;
    let loaded = load_corpus(&config, &token).await?;
    let (corpus, encoders) = (&loaded.corpus, &loaded.encoders);
    let attributes = sample_attribute_values(args, corpus);
    let (held_out, pool) = divide(args, logged, attributes)?;
    let set = args.prompt_set(pool.texts);
    if let Some(warning) = set.script_warning(&**encoders) {
        print_line!("WARNING: {warning}");
    }
    print_line!(
        "{} texts in the pool, {} held out ({})",
        set.texts.len(),
        held_out.texts.len(),
        held_out.description
    );
    let suggestion = tokio::task::block_in_place(|| {
        let pool = set.embed(&**encoders, PROPOSED_STATISTICS)?;
        let texts: Vec<&str> = held_out.texts.iter().map(String::as_str).collect();
        let queries = encoders.embed_texts_in_batches(&texts)?;
        let mut others = Vec::new();
        for name in PromptSet::builtin_names().into_iter().filter(|name| *name != "demo") {
            let set = PromptSet::load_builtin_or_file(name)?;
            if set.script_warning(&**encoders).is_none() {
                others.push((
                    name.to_owned(),
                    Arc::new(set.embed(&**encoders, PROPOSED_STATISTICS)?),
                ));
            }
        }
        let served = loaded.state.find_prompt_set(loaded.state.serving.prompt_set.as_str());
        if let Some(record) = served {
            let set = EmbeddedPromptSet::from_record(record, &**encoders)?;
            others.push((format!("{}@{}, served now", record.name, record.version), Arc::new(set)));
        }
        let embeddings = corpus.tables.iter().flat_map(|table| table.embeddings());
        let images = embeddings.map(Embedding::values).collect();
        anyhow::Ok(suggest_bank(images, &pool, args.texts.into(), &queries, &others))
    })?;
    if token.is_cancelled() {
        return Err(anyhow::anyhow!("interrupted; nothing was written").into());
    }
    print_banks(&suggestion);
    let notes = describe_choice(&suggestion, &held_out.description);
    print_line!("{notes}");
    let prompt_set = PromptSet { notes, ..suggestion.chosen.prompt_set.clone() };
    write_set(&args.out, &toml::to_string_pretty(&prompt_set)?)?;
    print_line!("{} texts are in {}.", prompt_set.texts.len(), args.out.display());
    print_line!("Read them before you serve them: who searches can see them in explanations.");
    let Some(candidate) = &args.candidate else { return Ok(()) };
    let weight = suggestion.report.proposed_weight;
    if weight == 0.0 {
        print_line!("No candidate was set, as plain CLIP is proposed.");
        return Ok(());
    }
    let ProposedBalance { normaliser, lambda, .. } = ProposedBalance::with_weight(weight);
    let balance = ChosenBalance { normaliser, weight, lambda, evaluation_fingerprint: None };
    make_candidate(&config, &loaded, suggestion.chosen, candidate, balance, &token).await
}

/// Texts on which the fit is measured.
struct HeldOutTexts {
    texts: Vec<String>,
    /// What they are.
    description: String,
}

/// Returns the values of the attributes that the arguments name.
fn sample_attribute_values(args: &PromptsSuggestArgs, corpus: &Corpus) -> TextSample {
    let mut values = TextSample::default();
    for name in &args.attributes {
        let before = values.len();
        corpus
            .images
            .iter()
            .filter_map(|image| image.attributes.get(name))
            .for_each(|value| values.add(value));
        if values.len() == before {
            print_line!("Note: no image has an attribute {name:?} with a new text.");
        }
    }
    values
}

/// Divides logged queries, or attribute values if there are none, into texts that are held out and texts that
/// may become prompts, and adds all other texts to the latter.
fn divide(
    args: &PromptsSuggestArgs,
    logged: TextSample,
    attributes: TextSample,
) -> Result<(HeldOutTexts, PromptPool), CommandError> {
    if logged.is_truncated() || attributes.is_truncated() {
        print_line!("Note: of more than {MAX_SAMPLED_TEXTS} texts, a random sample is used.");
    }
    let logged = logged.into_texts(args.min_count);
    if logged.is_empty() && !args.query_log.is_empty() {
        return Err(CommandError::usage(format!(
            "--min-count: no query occurs {} times in --query-log; give a smaller number",
            args.min_count
        )));
    }
    let attributes = attributes.into_texts(1);
    let description = if logged.is_empty() {
        "attribute values in the place of queries, which may fit less well"
    } else {
        "queries of the log"
    };
    let ((held_out, rest), others) = if logged.is_empty() {
        (divide_texts(attributes), Vec::new())
    } else {
        (divide_texts(logged), attributes)
    };
    let mut pool = PromptPool::without_texts(held_out.iter().map(String::as_str));
    pool.add_texts(rest.iter().map(String::as_str));
    pool.add_texts(others.iter().map(String::as_str));
    args.add_files(&mut pool)?;
    args.add_builtin_sets(&mut pool)?;
    if pool.texts.len() < 2 {
        return Err(CommandError::usage(format!(
            "there are {} different texts, of which half is held out; give more by --query-log, --attribute or --pool",
            held_out.len() + pool.texts.len()
        )));
    }
    Ok((HeldOutTexts { texts: held_out, description: description.into() }, pool))
}

/// Prints what was measured of the suggested bank and of others.
fn print_banks(suggestion: &BankSuggestion) {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header([
        "bank",
        "texts",
        "fit (95 %)",
        "concentration",
        "proposed weight",
    ]);
    let own = ("suggested".to_owned(), suggestion.report.clone());
    for (name, report) in std::iter::once(&own).chain(&suggestion.compared) {
        let BankReport { texts, fit, concentration, proposed_weight, .. } = report;
        table.add_row([
            name.clone(),
            texts.to_string(),
            fit.map_or("–".into(), |fit| fit.to_string()),
            concentration.map_or("–".into(), |value| format!("{value:.2}")),
            proposed_weight.to_string(),
        ]);
    }
    print_line!("{table}");
}

/// Says how the bank was chosen, what is proposed for it, and what such banks gained.
fn describe_choice(suggestion: &BankSuggestion, held_out: &str) -> String {
    let BankReport { texts, fit, concentration, proposed_weight, reason } = &suggestion.report;
    let figures = match (fit, concentration) {
        (Some(fit), concentration) => format!(
            "Fit {fit}, concentration {}, for {} texts that were held out: {held_out}.",
            concentration.map_or("not known".into(), |value| format!("{value:.2}")),
            fit.queries
        ),
        (None, _) => "Too few texts could be held out to measure the fit.".into(),
    };
    let bank = BankMeasurement {
        texts: *texts,
        fit: fit.map(|fit| fit.value),
        concentration: *concentration,
    };
    format!(
        "Chosen by bsap prompts suggest, by coverage and without judged queries. {figures} Proposed: nnn with k 16 and weight {proposed_weight}, because {reason}. {}",
        describe_gain_of_similar_banks(&bank, *proposed_weight)
    )
}
