//! Claims of processes on units of work: small objects that expire.
//!
//! The process that starts a unit creates `reindex-claims/<unit>.json` with a conditional put and
//! deletes it after the commit. An expired claim, whose holder was killed, is overwritten. Claims
//! only avoid duplicate work: a unit that two processes compute at once is committed once.

use std::time::Duration;

use chrono::{DateTime, Utc};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::table::TableError;

/// How long a claim is valid unless it is renewed. The unit of the largest file takes about ten
/// seconds.
const CLAIM_LIFETIME: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
struct ClaimRecord {
    holder: String,
    expires_at: DateTime<Utc>,
}

/// Acquires, renews and releases the claims of one process.
#[derive(Debug, Clone)]
pub struct ClaimStore {
    store: Store,
    holder: String,
}

impl ClaimStore {
    /// Creates the claims of the process `holder`, a name that no other process has.
    pub fn new(catalogue: &Store, holder: String) -> Self {
        Self { store: catalogue.subfolder("reindex-claims"), holder }
    }

    /// Claims a unit; returns whether this process holds it now.
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
        let existing = match self.store.object_store().get(&claim_path(unit)).await {
            Ok(object) => object.bytes().await,
            Err(error) => Err(error),
        };
        match existing {
            Ok(bytes) => {
                let record: Option<ClaimRecord> = serde_json::from_slice(&bytes).ok();
                let is_free = |record: ClaimRecord| {
                    record.expires_at <= Utc::now() || record.holder == self.holder
                };
                if !record.is_none_or(is_free) {
                    return Ok(false);
                }
            }
            // Released in the meantime: the unit is committed, or the next list of pending files
            // has it.
            Err(object_store::Error::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(self.store.wrap_error(error).into()),
        }
        self.renew(unit).await?;
        Ok(true)
    }

    /// Extends the claim on a unit by [`CLAIM_LIFETIME`] from now.
    pub async fn renew(&self, unit: &str) -> Result<(), TableError> {
        let result =
            self.store.object_store().put(&claim_path(unit), self.claim_json()?.into()).await;
        result.map(drop).map_err(|e| self.store.wrap_error(e).into())
    }

    /// Releases a unit. If that fails, the claim expires.
    pub async fn release(&self, unit: &str) {
        let _ = self.store.object_store().delete(&claim_path(unit)).await;
    }

    /// Returns how often a claim must be renewed.
    pub fn renewal_interval() -> Duration {
        CLAIM_LIFETIME / 3
    }

    fn claim_json(&self) -> Result<Vec<u8>, TableError> {
        let record =
            ClaimRecord { holder: self.holder.clone(), expires_at: Utc::now() + CLAIM_LIFETIME };
        serde_json::to_vec(&record).map_err(|error| TableError::Corrupt {
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
    async fn a_unit_is_held_by_one_process_until_it_is_released_or_expires() {
        let store = Store::in_memory();
        let (a, b) = (ClaimStore::new(&store, "a".into()), ClaimStore::new(&store, "b".into()));
        assert!(a.try_acquire("u").await.unwrap());
        assert!(!b.try_acquire("u").await.unwrap());
        assert!(a.try_acquire("u").await.unwrap(), "its holder may claim it again");
        a.release("u").await;
        assert!(b.try_acquire("u").await.unwrap());
        let expired = ClaimRecord { holder: "b".into(), expires_at: Utc::now() - CLAIM_LIFETIME };
        let bytes = serde_json::to_vec(&expired).unwrap();
        store
            .subfolder("reindex-claims")
            .object_store()
            .put(&claim_path("u"), bytes.into())
            .await
            .unwrap();
        assert!(a.try_acquire("u").await.unwrap(), "the claim of `b` has expired");
        assert!(!b.try_acquire("u").await.unwrap());
    }
}
