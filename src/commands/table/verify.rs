//! `bsap verify`: integrity checks of the stored table.

use std::path::Path;

use chrono::Utc;
use clap::Args;
use tokio_util::sync::CancellationToken;

use super::formatting::{format_mebibytes, print_generation};
use crate::commands::shared::catalogue::open_catalogue;
use crate::commands::shared::configuration::{load_config_without_model, with_quiet_logging};
use crate::commands::shared::error::CommandResult;
use crate::commands::shared::printing::print_line;
use crate::commands::shared::progress::{progress_bar, progress_callback};
use crate::commands::shared::runtime::run_with_logging;
use crate::config::Config;
use crate::table::{self, Severity, VerificationReport};

/// `bsap verify`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Every file is read and compared with its checksum and with what the log says of it; every row is \
looked at, those of the generation beside the live one too. Ends with code 1 where something is lost \
or wrong; warnings alone do not fail it.

Whether the table holds what the bucket holds is another question: `bsap reconcile` answers it.")]
pub struct VerifyArgs {
    /// Print a JSON object a generation
    #[arg(long)]
    pub json: bool,
}

/// Verifies the tables of the live generation and of the standby generation.
pub fn run(args: &VerifyArgs, config_file: Option<&Path>) -> CommandResult {
    let config = with_quiet_logging(load_config_without_model(config_file)?);
    run_with_logging(config, |config, token| verify_tables(args, config, token))
}

/// Reads the tables of the live generation and of the one beside it, and says what is wrong.
async fn verify_tables(
    args: &VerifyArgs,
    config: Config,
    token: CancellationToken,
) -> CommandResult {
    let (store, state) = open_catalogue(&config).await?;
    let mut is_sound = true;
    for generation in state.generations() {
        let records = state.prompt_sets_of_generation(&generation.id).unwrap_or_default();
        let prompt_sets: Vec<_> = records.iter().map(|set| set.key.clone()).collect();
        let bar = progress_bar("reading", 0)?;
        let (options, now, progress) = (&config.maintenance, Utc::now(), progress_callback(&bar));
        let verified =
            table::verify_table(&store, generation, &prompt_sets, options, now, &progress, &token)
                .await?;
        bar.finish_and_clear();
        let Some(verified) = verified else {
            return Err(anyhow::anyhow!("interrupted before all was read").into());
        };
        if args.json {
            print_line!("{}", serde_json::to_string(&verified)?);
        } else {
            print_generation(&state, generation);
            print_verified(&verified);
        }
        is_sound &= verified.is_sound();
    }
    if is_sound { Ok(()) } else { Err(anyhow::anyhow!("the table is not sound").into()) }
}

fn print_verified(verified: &VerificationReport) {
    print_line!(
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
        print_line!(
            "{severity} {}: {}{more} {}",
            finding.code,
            finding.example,
            finding.description
        );
    }
    if verified.findings.is_empty() {
        print_line!("nothing is wrong");
    }
}
