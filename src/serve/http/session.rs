//! Sessions of the page: pictures and event streams cannot send a key, but browsers add a cookie to
//! them by themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::api_keys::{ApiKey, random_token};

/// Name of the cookie.
pub const COOKIE_NAME: &str = "bsap_session";

/// Who is signed in, in this process's memory. Tokens are kept as hashes, by which they are also
/// found: how long that takes tells nothing of the token.
pub struct SessionStore {
    max_sessions: usize,
    lifetime: Duration,
    by_token_hash: Mutex<HashMap<[u8; 32], Session>>,
}

struct Session {
    key: Arc<ApiKey>,
    started_at: Instant,
}

impl SessionStore {
    /// At most `limit` at one time, each for at most `lifetime`.
    pub fn new(limit: usize, lifetime: Duration) -> Self {
        Self { max_sessions: limit, lifetime, by_token_hash: Mutex::default() }
    }

    /// Signs the holder of `key` in: the token of the session. Where there are as many as may be, the
    /// oldest is signed out.
    pub fn sign_in(&self, key: Arc<ApiKey>) -> String {
        let token = random_token("");
        let now = Instant::now();
        self.with_sessions(|signed_in| {
            signed_in.retain(|_, session| now - session.started_at < self.lifetime);
            if signed_in.len() >= self.max_sessions {
                let oldest = signed_in.iter().min_by_key(|(_, session)| session.started_at);
                if let Some(oldest) = oldest.map(|(hash, _)| *hash) {
                    signed_in.remove(&oldest);
                }
            }
            signed_in.insert(hash_token(&token), Session { key, started_at: now });
        });
        token
    }

    /// The key that the session of `token` was opened with, while it lasts.
    pub fn find_key(&self, token: &str) -> Option<Arc<ApiKey>> {
        self.with_sessions(|signed_in| {
            let session = signed_in.get(&hash_token(token))?;
            (session.started_at.elapsed() < self.lifetime).then(|| session.key.clone())
        })
    }

    /// Ends the session of `token`.
    pub fn sign_out(&self, token: &str) {
        self.with_sessions(|signed_in| signed_in.remove(&hash_token(token)));
    }

    /// The cookie that hands `token` to a browser, or with none takes it back. Scripts cannot read it,
    /// other sites cannot have it sent; with `secure` it never leaves TLS.
    pub fn set_cookie_value(&self, token: Option<&str>, secure: bool) -> String {
        let seconds = token.map_or(0, |_| self.lifetime.as_secs());
        let value = token.unwrap_or_default();
        let secure = if secure { "; Secure" } else { "" };
        format!(
            "{COOKIE_NAME}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{secure}"
        )
    }

    fn with_sessions<T>(&self, work: impl FnOnce(&mut HashMap<[u8; 32], Session>) -> T) -> T {
        work(&mut self.by_token_hash.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn hash_token(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::http::api_keys::Scope;

    #[test]
    fn sessions_end_by_signing_out_by_age_and_by_newer_ones() {
        let key = Arc::new(ApiKey::generate("shop", &[Scope::Search]).0);
        let sessions = SessionStore::new(2, Duration::from_secs(60));
        let tokens: Vec<String> = (0..3).map(|_| sessions.sign_in(key.clone())).collect();
        let alive: Vec<bool> = tokens.iter().map(|t| sessions.find_key(t).is_some()).collect();
        assert_eq!(alive, [false, true, true]);
        sessions.sign_out(&tokens[1]);
        assert!(sessions.find_key(&tokens[1]).is_none() && sessions.find_key(&tokens[2]).is_some());
        let brief = SessionStore::new(2, Duration::ZERO);
        assert!(brief.find_key(&brief.sign_in(key)).is_none());
    }
}
