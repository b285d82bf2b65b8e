//! API keys: what a key may do, and how one is made, stored and recognised.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::record::to_hex;

/// What keys begin with, so that programs that look for leaked secrets know one.
const KEY_PREFIX: &str = "bsap_";
/// What hashes begin with: a name of the method, should there ever be another.
const HASH_PREFIX: &str = "sha256:";

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Ask: searches, explanations, images and their pictures, changes, state.
    Search,
    /// Say whether an answer was right.
    Feedback,
    /// All of these, and whatever changes how is served.
    Admin,
}

impl Scope {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Search => "search",
            Self::Feedback => "feedback",
            Self::Admin => "admin",
        }
    }
}

/// The hash of a key, `sha256:` and 64 hexadecimal digits. A key is 256 random bits, which nobody
/// guesses however fast hashes are made: what slows guessing of passwords down is not needed.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// The hash of `secret`.
    pub fn from_secret(secret: &str) -> Self {
        Self(Sha256::digest(secret).into())
    }
}

impl TryFrom<String> for KeyHash {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digits = text.strip_prefix(HASH_PREFIX).filter(|d| d.len() == 64);
        let digits = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let byte = |at: usize| u8::from_str_radix(digits?.get(2 * at..2 * at + 2)?, 16).ok();
        let bytes: Option<Vec<u8>> = (0..32).map(byte).collect();
        // What was written may be the key itself: it is not repeated.
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
            "a hash is no sha256: and 64 hexadecimal digits, as `bsap keys new` prints them".into()
        })
    }
}

impl From<KeyHash> for String {
    fn from(hash: KeyHash) -> Self {
        hash.to_string()
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HASH_PREFIX}{}", to_hex(&self.0))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A key that is accepted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// Who holds it, for the log.
    pub name: String,
    /// Its hash.
    pub hash: KeyHash,
    /// What it may do.
    pub scopes: Vec<Scope>,
}

impl ApiKey {
    /// A new key named `name`, and its secret, which is kept nowhere.
    pub fn generate(name: &str, scopes: &[Scope]) -> (Self, String) {
        let secret = random_token(KEY_PREFIX);
        let key = Self {
            name: name.to_owned(),
            hash: KeyHash::from_secret(&secret),
            scopes: scopes.to_owned(),
        };
        (key, secret)
    }

    /// Whether it may do what `scope` stands for.
    pub fn allows(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin)
    }
}

/// 256 random bits as text, after `prefix`.
pub fn random_token(prefix: &str) -> String {
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// The one of `keys` whose secret this is. All are compared, each to its end, so that the time
/// tells nothing.
pub fn find_by_secret<'a, K: AsRef<ApiKey>>(keys: &'a [K], secret: &str) -> Option<&'a K> {
    let hash = KeyHash::from_secret(secret);
    let same = |key: &&K| bool::from(key.as_ref().hash.0.ct_eq(&hash.0));
    keys.iter().filter(same).last()
}

/// What is wrong with `keys`, a line each.
pub fn validate(keys: &[ApiKey]) -> Vec<String> {
    /// Names are labels in logs.
    const MAX_NAME_BYTES: usize = 64;
    let mut problems = Vec::new();
    for (at, key) in keys.iter().enumerate() {
        let name = &key.name;
        let known =
            name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@'));
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !known {
            problems.push(format!(
                "keys: the name {name:?} is not 1 to {MAX_NAME_BYTES} letters, digits, -, _, . or @"
            ));
        }
        if key.scopes.is_empty() {
            problems
                .push(format!("keys: {name:?} may do nothing; scopes are search, feedback, admin"));
        }
        if keys[..at].iter().any(|other| other.name == key.name || other.hash == key.hash) {
            problems.push(format!("keys: {name:?} has the name or the hash of another key"));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_key_is_known_by_its_secret_alone() {
        let made: Vec<_> = ["a", "b"].map(|name| ApiKey::generate(name, &[Scope::Search])).into();
        let keys: Vec<Arc<ApiKey>> = made.iter().map(|(key, _)| Arc::new(key.clone())).collect();
        for (key, secret) in &made {
            assert_eq!(find_by_secret(&keys, secret).map(|k| &**k), Some(key));
            assert_eq!(secret.len(), KEY_PREFIX.len() + 43);
            assert!(
                find_by_secret(&keys, &secret[1..]).is_none()
                    && find_by_secret(&keys, "").is_none()
            );
            assert!(find_by_secret(&keys, &key.hash.to_string()).is_none(), "a hash is no key");
        }
    }

    #[test]
    fn hashes_are_read_as_they_are_written() {
        let hash = KeyHash::from_secret("bsap_x");
        assert_eq!(KeyHash::try_from(String::from(hash)), Ok(hash));
        for wrong in ["", "sha256:", "bsap_swordfish", &hash.to_string()[..70], "sha256:é"] {
            let error = KeyHash::try_from(wrong.to_owned()).unwrap_err();
            assert!(error.contains("bsap keys new") && !error.contains("swordfish"), "{error}");
        }
        let signed = format!("sha256:{}", "+f".repeat(32));
        assert!(KeyHash::try_from(signed).is_err());
    }

    #[test]
    fn admin_scope_allows_everything_and_others_only_themselves() {
        let may = |given: &[Scope], scope| ApiKey::generate("k", given).0.allows(scope);
        assert!(may(&[Scope::Search], Scope::Search) && !may(&[Scope::Search], Scope::Feedback));
        assert!(may(&[Scope::Admin], Scope::Search) && !may(&[Scope::Feedback], Scope::Admin));
    }
}
