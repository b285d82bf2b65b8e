//! Who computes which unit: small objects that run out by themselves.
//!
//! `claims/<unit>.json` is created conditionally by whoever takes the unit and removed when it is
//! committed. One whose time is over, because its holder was killed, is overwritten. A claim only
//! spares work: a unit that two compute at once is committed once all the same.

use std::time::Duration;

use chrono::{DateTime, Utc};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::table::TableError;

/// How long a claim holds without being renewed. A unit of the largest file takes some ten seconds.
const CLAIM_LIFETIME: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
struct ClaimRecord {
    holder: String,
    expires_at: DateTime<Utc>,
}

/// The claims of one process.
#[derive(Debug, Clone)]
pub struct ClaimStore {
    store: Store,
    holder: String,
}

impl ClaimStore {
    /// For the process that calls itself `holder`.
    pub fn new(catalogue: &Store, holder: String) -> Self {
        Self { store: catalogue.subfolder("reindex-claims"), holder }
    }

    /// Takes a unit; false while somebody else holds it.
    pub async fn try_acquire(&self, unit: &str) -> Result<bool, TableError> {
        let create = PutOptions::from(PutMode::Create);
        match self
            .store
            .object_store()
            .put_opts(&claim_path(unit), self.claim_json()?.into(), create)
            .await
        {
            Ok(_) => return Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => {}
            Err(error) => return Err(self.store.wrap_error(error).into()),
        }
        let held = match self.store.object_store().get(&claim_path(unit)).await {
            Ok(found) => found.bytes().await,
            Err(error) => Err(error),
        };
        match held {
            Ok(bytes) => {
                let terms: Option<ClaimRecord> = serde_json::from_slice(&bytes).ok();
                let free = |t: ClaimRecord| t.expires_at <= Utc::now() || t.holder == self.holder;
                if !terms.is_none_or(free) {
                    return Ok(false);
                }
            }
            // Given back meanwhile: done, or the next look will find it.
            Err(object_store::Error::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(self.store.wrap_error(error).into()),
        }
        self.renew(unit).await?;
        Ok(true)
    }

    /// Holds a unit for another while.
    pub async fn renew(&self, unit: &str) -> Result<(), TableError> {
        let put = self.store.object_store().put(&claim_path(unit), self.claim_json()?.into()).await;
        put.map(drop).map_err(|e| self.store.wrap_error(e).into())
    }

    /// Gives a unit back. One that cannot be given back runs out.
    pub async fn release(&self, unit: &str) {
        let _ = self.store.object_store().delete(&claim_path(unit)).await;
    }

    /// How long before a claim runs out it is renewed.
    pub fn renewal_interval() -> Duration {
        CLAIM_LIFETIME / 3
    }

    fn claim_json(&self) -> Result<Vec<u8>, TableError> {
        let terms =
            ClaimRecord { holder: self.holder.clone(), expires_at: Utc::now() + CLAIM_LIFETIME };
        serde_json::to_vec(&terms).map_err(|error| TableError::Corrupt {
            file: self.store.url().to_string(),
            reason: error.to_string(),
        })
    }
}

fn claim_path(unit: &str) -> Path {
    Path::from(format!("{unit}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unit_is_held_by_one_until_it_is_given_back_or_runs_out() {
        let store = Store::in_memory();
        let (a, b) = (ClaimStore::new(&store, "a".into()), ClaimStore::new(&store, "b".into()));
        assert!(a.try_acquire("u").await.unwrap());
        assert!(!b.try_acquire("u").await.unwrap());
        assert!(a.try_acquire("u").await.unwrap(), "its own");
        a.release("u").await;
        assert!(b.try_acquire("u").await.unwrap());
        let over = ClaimRecord { holder: "b".into(), expires_at: Utc::now() - CLAIM_LIFETIME };
        let bytes = serde_json::to_vec(&over).unwrap();
        store
            .subfolder("reindex-claims")
            .object_store()
            .put(&claim_path("u"), bytes.into())
            .await
            .unwrap();
        assert!(a.try_acquire("u").await.unwrap(), "its holder was killed");
        assert!(!b.try_acquire("u").await.unwrap());
    }
}
