//! `bsap keys`.

use super::cli::{KeysAction, KeysArgs};
use super::{Done, Failure};
use crate::serve::http::{Key, Options};

/// Makes a key: its secret is printed once and kept nowhere.
pub fn run(args: &KeysArgs) -> Done {
    let KeysAction::New { name, scopes } = &args.action;
    let (key, secret) = Key::mint(name, scopes);
    let options = Options { keys: vec![key], ..Options::default() };
    if let Some(problem) = options.problems().first() {
        return Err(Failure::usage(problem));
    }
    let [key] = &options.keys[..] else { return Ok(()) };
    say!("The key, which is shown only now; whoever has it may do what it may:\n\n{secret}\n");
    say!("What the query worker knows it by, for its configuration:\n");
    say!("[[http.keys]]\n{}", toml::to_string(key)?.trim_end());
    Ok(())
}
