//! `bsap keys`: API keys for the query worker.

use clap::{Args, Subcommand};

use super::shared::error::{CommandError, CommandResult};
use super::shared::printing::print_line;
use crate::serve::http::{ApiKey, HttpOptions, Scope};

/// `bsap keys`.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: KeysAction,
}

/// What `bsap keys` does.
#[derive(Debug, Subcommand)]
pub enum KeysAction {
    /// Print a new key, and the lines of the configuration for it
    New {
        /// Name of its holder, for the log
        #[arg(long)]
        name: String,
        /// What the key permits; may be repeated. `admin` permits everything
        #[arg(long = "scope", required = true, value_name = "SCOPE")]
        scopes: Vec<Scope>,
    },
}

/// Makes a key. Its secret is printed and not stored.
pub fn run(args: &KeysArgs) -> CommandResult {
    let KeysAction::New { name, scopes } = &args.action;
    let (key, secret) = ApiKey::generate(name, scopes);
    let options = HttpOptions { keys: vec![key], ..HttpOptions::default() };
    if let Some(problem) = options.validate().first() {
        return Err(CommandError::usage(problem));
    }
    let [key] = &options.keys[..] else { return Ok(()) };
    print_line!(
        "The key, which is shown only now; whoever has it has its permissions:\n\n{secret}\n"
    );
    print_line!("For the configuration of the query worker:\n");
    print_line!("[[http.keys]]\n{}", toml::to_string(key)?.trim_end());
    Ok(())
}
