//! API keys: their scopes, and how they are generated, stored and verified.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use clap::ValueEnum;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::record::to_hex;

/// Prefix of secrets, by which scanners for leaked secrets recognise them.
const SECRET_PREFIX: &str = "bsap_";
/// Prefix of hashes: the hash function, in case another one is added.
const HASH_PREFIX: &str = "sha256:";

/// What a key permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Searches, explanations, images and their pictures, the change feed, the state.
    Search,
    /// Sending feedback on results.
    Feedback,
    /// All of these, and future routes that change the configuration.
    Admin,
}

impl Scope {
    /// The name in configuration and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Search => "search",
            Self::Feedback => "feedback",
            Self::Admin => "admin",
        }
    }
}

/// The hash of a key's secret: `sha256:` and 64 hexadecimal digits. A fast hash function is enough:
/// unlike a password, a secret of 256 random bits cannot be guessed.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Hashes the secret of a key.
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
        // The error must not repeat the text, which may be a secret.
        bytes.and_then(|bytes| bytes.try_into().ok()).map(Self).ok_or_else(|| {
            "a hash is not sha256: and 64 hexadecimal digits, as `bsap keys new` prints it".into()
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

/// An accepted key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// Name of its holder, for logs.
    pub name: String,
    /// Hash of its secret.
    pub hash: KeyHash,
    /// What it permits.
    pub scopes: Vec<Scope>,
}

impl ApiKey {
    /// Returns a new key and its secret, which is stored nowhere.
    pub fn generate(name: &str, scopes: &[Scope]) -> (Self, String) {
        let secret = random_token(SECRET_PREFIX);
        let key = Self {
            name: name.to_owned(),
            hash: KeyHash::from_secret(&secret),
            scopes: scopes.to_owned(),
        };
        (key, secret)
    }

    /// Returns whether the key has `scope`.
    pub fn allows(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope) || self.scopes.contains(&Scope::Admin)
    }
}

/// Returns `prefix`, followed by 256 random bits in base64url.
pub fn random_token(prefix: &str) -> String {
    format!("{prefix}{}", URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// Returns the key of `secret`. Every key is compared, and in constant time, so that the duration
/// does not reveal how much of a guess is right.
pub fn find_key_by_secret<'a, K: AsRef<ApiKey>>(keys: &'a [K], secret: &str) -> Option<&'a K> {
    let hash = KeyHash::from_secret(secret);
    let matches = |key: &&K| bool::from(key.as_ref().hash.0.ct_eq(&hash.0));
    keys.iter().filter(matches).last()
}

/// Returns one line per invalid key.
pub fn validate_keys(keys: &[ApiKey]) -> Vec<String> {
    const MAX_NAME_BYTES: usize = 64;
    let mut problems = Vec::new();
    for (index, key) in keys.iter().enumerate() {
        let name = &key.name;
        let has_valid_characters =
            name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '@'));
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !has_valid_characters {
            problems.push(format!(
                "keys: the name {name:?} is not 1 to {MAX_NAME_BYTES} letters, digits, -, _, . or @"
            ));
        }
        if key.scopes.is_empty() {
            problems
                .push(format!("keys: {name:?} has no scopes; scopes are search, feedback, admin"));
        }
        if keys[..index].iter().any(|other| other.name == key.name || other.hash == key.hash) {
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
    fn a_key_is_found_only_by_its_secret() {
        let generated: Vec<_> =
            ["a", "b"].map(|name| ApiKey::generate(name, &[Scope::Search])).into();
        let keys: Vec<Arc<ApiKey>> =
            generated.iter().map(|(key, _)| Arc::new(key.clone())).collect();
        for (key, secret) in &generated {
            assert_eq!(find_key_by_secret(&keys, secret).map(|k| &**k), Some(key));
            assert_eq!(secret.len(), SECRET_PREFIX.len() + 43);
            assert!(
                find_key_by_secret(&keys, &secret[1..]).is_none()
                    && find_key_by_secret(&keys, "").is_none()
            );
            assert!(
                find_key_by_secret(&keys, &key.hash.to_string()).is_none(),
                "a hash is not a secret"
            );
        }
    }

    #[test]
    fn hashes_round_trip_and_errors_do_not_repeat_the_text() {
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
        let allows = |given: &[Scope], scope| ApiKey::generate("k", given).0.allows(scope);
        assert!(
            allows(&[Scope::Search], Scope::Search) && !allows(&[Scope::Search], Scope::Feedback)
        );
        assert!(
            allows(&[Scope::Admin], Scope::Search) && !allows(&[Scope::Feedback], Scope::Admin)
        );
    }
}
