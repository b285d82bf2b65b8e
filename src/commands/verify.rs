//! `bsap verify`.

use chrono::Utc;
use tokio_util::sync::CancellationToken;

use super::cli::table::VerifyArgs;
use super::upkeep::{format_mebibytes, print_generation};
use super::{CommandResult, setup};
use crate::config::Config;
use crate::table::{self, Severity, VerificationReport};

/// Reads the tables of the live generation and of the one beside it, and says what is wrong.
pub async fn run(args: &VerifyArgs, config: Config, token: CancellationToken) -> CommandResult {
    let (store, state) = setup::open_catalogue(&config).await?;
    let mut is_sound = true;
    for generation in state.generations() {
        let records = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
        let prompt_sets: Vec<_> = records.iter().map(|set| set.key.clone()).collect();
        let bar = super::progress_bar("reading", 0)?;
        let (options, now, progress) =
            (&config.maintenance, Utc::now(), super::progress_callback(&bar));
        let verified =
            table::verify_table(&store, generation, &prompt_sets, options, now, &progress, &token)
                .await?;
        bar.finish_and_clear();
        let Some(verified) = verified else {
            return Err(anyhow::anyhow!("interrupted before all was read").into());
        };
        if args.json {
            say!("{}", serde_json::to_string(&verified)?);
        } else {
            print_generation(&state, generation);
            print_verified(&verified);
        }
        is_sound &= verified.is_sound();
    }
    if is_sound { Ok(()) } else { Err(anyhow::anyhow!("the table is not sound").into()) }
}

fn print_verified(verified: &VerificationReport) {
    say!(
        "version {}: {} files of {}, {} rows: {} images, {} deleted, {} rows superseded",
        verified.version,
        verified.files,
        format_mebibytes(verified.bytes),
        verified.rows,
        verified.images,
        verified.deleted,
        verified.superseded
    );
    for finding in &verified.findings {
        let severity = match finding.severity {
            Severity::Error => "ERROR  ",
            Severity::Warning => "warning",
        };
        let more = match finding.count {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        say!("{severity} {}: {}{more} {}", finding.code, finding.example, finding.description);
    }
    if verified.findings.is_empty() {
        say!("nothing is wrong");
    }
}
