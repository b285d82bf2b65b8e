//! Sessions of the page: pictures and event streams cannot send a key, but browsers add a cookie to
//! them by themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::keys::{Key, token};

/// Name of the cookie.
pub const COOKIE: &str = "bsap_session";

/// Who is signed in, in this process's memory. Tokens are kept as hashes, by which they are also
/// found: how long that takes tells nothing of the token.
pub struct Sessions {
    limit: usize,
    lifetime: Duration,
    signed_in: Mutex<HashMap<[u8; 32], Session>>,
}

struct Session {
    key: Arc<Key>,
    since: Instant,
}

impl Sessions {
    /// At most `limit` at one time, each for at most `lifetime`.
    pub fn new(limit: usize, lifetime: Duration) -> Self {
        Self { limit, lifetime, signed_in: Mutex::default() }
    }

    /// Signs the holder of `key` in: the token of the session. Where there are as many as may be, the
    /// oldest is signed out.
    pub fn sign_in(&self, key: Arc<Key>) -> String {
        let token = token("");
        let now = Instant::now();
        self.with(|signed_in| {
            signed_in.retain(|_, session| now - session.since < self.lifetime);
            if signed_in.len() >= self.limit {
                let oldest = signed_in.iter().min_by_key(|(_, session)| session.since);
                if let Some(oldest) = oldest.map(|(hash, _)| *hash) {
                    signed_in.remove(&oldest);
                }
            }
            signed_in.insert(hash(&token), Session { key, since: now });
        });
        token
    }

    /// The key that the session of `token` was opened with, while it lasts.
    pub fn key(&self, token: &str) -> Option<Arc<Key>> {
        self.with(|signed_in| {
            let session = signed_in.get(&hash(token))?;
            (session.since.elapsed() < self.lifetime).then(|| session.key.clone())
        })
    }

    /// Ends the session of `token`.
    pub fn sign_out(&self, token: &str) {
        self.with(|signed_in| signed_in.remove(&hash(token)));
    }

    /// The cookie that hands `token` to a browser, or with none takes it back. Scripts cannot read it,
    /// other sites cannot have it sent; with `secure` it never leaves TLS.
    pub fn cookie(&self, token: Option<&str>, secure: bool) -> String {
        let seconds = token.map_or(0, |_| self.lifetime.as_secs());
        let value = token.unwrap_or_default();
        let secure = if secure { "; Secure" } else { "" };
        format!("{COOKIE}={value}; HttpOnly; SameSite=Strict; Path=/; Max-Age={seconds}{secure}")
    }

    fn with<T>(&self, work: impl FnOnce(&mut HashMap<[u8; 32], Session>) -> T) -> T {
        work(&mut self.signed_in.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn hash(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::http::keys::Scope;

    #[test]
    fn sessions_end_by_signing_out_by_age_and_by_newer_ones() {
        let key = Arc::new(Key::mint("shop", &[Scope::Search]).0);
        let sessions = Sessions::new(2, Duration::from_secs(60));
        let tokens: Vec<String> = (0..3).map(|_| sessions.sign_in(key.clone())).collect();
        let alive: Vec<bool> = tokens.iter().map(|t| sessions.key(t).is_some()).collect();
        assert_eq!(alive, [false, true, true]);
        sessions.sign_out(&tokens[1]);
        assert!(sessions.key(&tokens[1]).is_none() && sessions.key(&tokens[2]).is_some());
        let brief = Sessions::new(2, Duration::ZERO);
        assert!(brief.key(&brief.sign_in(key)).is_none());
    }
}
