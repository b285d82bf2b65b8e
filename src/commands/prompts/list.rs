//! `bsap prompts list` and `bsap prompts show`: the shipped and the configured sets.

use std::collections::BTreeSet;

use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;

use crate::commands::shared::error::{CommandError, CommandResult};
use crate::commands::shared::printing::print_line;
use crate::config::Config;
use crate::prompts::PromptSet;

/// Prints the shipped and the configured sets.
pub fn print_sets(config: &Config) -> CommandResult {
    let configured = &config.prompts.sets;
    let names: BTreeSet<&str> = PromptSet::builtin_names()
        .into_iter()
        .chain(configured.iter().map(String::as_str))
        .collect();
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY).set_header([
        "set",
        "version",
        "language",
        "prompts",
        "fingerprint",
        "used",
        "for",
    ]);
    for name in names {
        let set = PromptSet::load_builtin_or_file(name).map_err(CommandError::usage)?;
        let used = configured
            .iter()
            .position(|c| c == name)
            .map_or("", |index| if index == 0 { "served first" } else { "yes" });
        table.add_row([
            name.to_owned(),
            set.version.to_string(),
            set.language.clone(),
            set.texts.len().to_string(),
            format!("{:.12}", set.fingerprint()),
            used.to_owned(),
            set.notes.lines().next().unwrap_or_default().to_owned(),
        ]);
    }
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    print_line!("{table}");
    Ok(())
}

/// Prints a set as a TOML file.
pub fn print_set(name: &str) -> CommandResult {
    let set = PromptSet::load_builtin_or_file(name).map_err(CommandError::usage)?;
    print_line!("{}", toml::to_string_pretty(&set)?.trim_end());
    Ok(())
}
