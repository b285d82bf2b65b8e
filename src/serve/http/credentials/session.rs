//! Sessions of the page. Browsers cannot send a key with requests for pictures and event streams,
//! but they send a cookie with them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::api_keys::{ApiKey, random_token};

pub const SESSION_COOKIE_NAME: &str = "bsap_session";

/// The open sessions, in the memory of this process. They are stored and found by the hash of their
/// token, so that the duration of a look-up reveals nothing about a token.
pub struct SessionStore {
    max_sessions: usize,
    session_lifetime: Duration,
    /// Path that the cookie is sent with: that of the page.
    cookie_path: String,
    sessions_by_token_hash: Mutex<HashMap<[u8; 32], Session>>,
}

struct Session {
    api_key: Arc<ApiKey>,
    started_at: Instant,
}

impl SessionStore {
    /// `base_path` is `http.base_path`.
    pub fn new(max_sessions: usize, lifetime: Duration, base_path: &str) -> Self {
        Self {
            max_sessions,
            session_lifetime: lifetime,
            cookie_path: if base_path.is_empty() { "/".into() } else { base_path.into() },
            sessions_by_token_hash: Mutex::default(),
        }
    }

    /// Opens a session for the holder of `key` and returns its token. If there are too many
    /// sessions, ends the oldest.
    pub fn open_session(&self, key: Arc<ApiKey>) -> String {
        let token = random_token("");
        let now = Instant::now();
        self.with_sessions(|sessions| {
            sessions.retain(|_, session| now - session.started_at < self.session_lifetime);
            if sessions.len() >= self.max_sessions {
                let oldest = sessions.iter().min_by_key(|(_, session)| session.started_at);
                if let Some(oldest) = oldest.map(|(hash, _)| *hash) {
                    sessions.remove(&oldest);
                }
            }
            sessions.insert(hash_token(&token), Session { api_key: key, started_at: now });
        });
        token
    }

    /// Returns the key with which the session of `token` was opened; `None` if it has ended.
    pub fn find_session_key(&self, token: &str) -> Option<Arc<ApiKey>> {
        self.with_sessions(|sessions| {
            let session = sessions.get(&hash_token(token))?;
            (session.started_at.elapsed() < self.session_lifetime).then(|| session.api_key.clone())
        })
    }

    /// Ends the session of `token`.
    pub fn end_session(&self, token: &str) {
        self.with_sessions(|sessions| sessions.remove(&hash_token(token)));
    }

    /// Returns the value of `Set-Cookie` that gives `token` to a browser or, without a token,
    /// deletes it there. Scripts cannot read the cookie and requests of other sites do not carry
    /// it; with `secure` it is sent by TLS only.
    pub fn session_cookie_header_value(&self, token: Option<&str>, secure: bool) -> String {
        let seconds = token.map_or(0, |_| self.session_lifetime.as_secs());
        let value = token.unwrap_or_default();
        let secure = if secure { "; Secure" } else { "" };
        let path = &self.cookie_path;
        format!(
            "{SESSION_COOKIE_NAME}={value}; HttpOnly; SameSite=Strict; Path={path}; Max-Age={seconds}{secure}"
        )
    }

    fn with_sessions<T>(&self, work: impl FnOnce(&mut HashMap<[u8; 32], Session>) -> T) -> T {
        work(&mut self.sessions_by_token_hash.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

fn hash_token(token: &str) -> [u8; 32] {
    Sha256::digest(token).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::http::credentials::api_keys::Scope;

    #[test]
    fn sessions_end_by_sign_out_by_age_and_by_newer_sessions() {
        let key = Arc::new(ApiKey::generate("shop", &[Scope::Search]).0);
        let sessions = SessionStore::new(2, Duration::from_secs(60), "");
        let tokens: Vec<String> = (0..3).map(|_| sessions.open_session(key.clone())).collect();
        let open: Vec<bool> =
            tokens.iter().map(|t| sessions.find_session_key(t).is_some()).collect();
        assert_eq!(open, [false, true, true]);
        sessions.end_session(&tokens[1]);
        assert!(
            sessions.find_session_key(&tokens[1]).is_none()
                && sessions.find_session_key(&tokens[2]).is_some()
        );
        let without_lifetime = SessionStore::new(2, Duration::ZERO, "/search");
        assert!(without_lifetime.find_session_key(&without_lifetime.open_session(key)).is_none());
        let cookie = without_lifetime.session_cookie_header_value(None, false);
        assert!(cookie.contains("; Path=/search; "), "{cookie}");
    }
}
