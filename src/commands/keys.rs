//! `bsap keys`.

use super::cli::{KeysAction, KeysArgs};
use super::{CommandError, CommandResult};
use crate::serve::http::{ApiKey, HttpOptions};

/// Makes a key: its secret is printed once and kept nowhere.
pub fn run(args: &KeysArgs) -> CommandResult {
    let KeysAction::New { name, scopes } = &args.action;
    let (key, secret) = ApiKey::generate(name, scopes);
    let options = HttpOptions { keys: vec![key], ..HttpOptions::default() };
    if let Some(problem) = options.validate().first() {
        return Err(CommandError::usage(problem));
    }
    let [key] = &options.keys[..] else { return Ok(()) };
    say!("The key, which is shown only now; whoever has it may do what it may:\n\n{secret}\n");
    say!("What the query worker knows it by, for its configuration:\n");
    say!("[[http.keys]]\n{}", toml::to_string(key)?.trim_end());
    Ok(())
}
