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
const TIME: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize, Deserialize)]
struct Terms {
    holder: String,
    until: DateTime<Utc>,
}

/// The claims of one process.
#[derive(Debug, Clone)]
pub struct Claims {
    store: Store,
    holder: String,
}

impl Claims {
    /// For the process that calls itself `holder`.
    pub fn new(catalogue: &Store, holder: String) -> Self {
        Self { store: catalogue.child("claims"), holder }
    }

    /// Takes a unit; false while somebody else holds it.
    pub async fn take(&self, unit: &str) -> Result<bool, TableError> {
        let create = PutOptions::from(PutMode::Create);
        match self.store.objects().put_opts(&path(unit), self.terms()?.into(), create).await {
            Ok(_) => return Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => {}
            Err(error) => return Err(self.store.error(error).into()),
        }
        let held = match self.store.objects().get(&path(unit)).await {
            Ok(found) => found.bytes().await,
            Err(error) => Err(error),
        };
        match held {
            Ok(bytes) => {
                let terms: Option<Terms> = serde_json::from_slice(&bytes).ok();
                let free = |t: Terms| t.until <= Utc::now() || t.holder == self.holder;
                if !terms.is_none_or(free) {
                    return Ok(false);
                }
            }
            // Given back meanwhile: done, or the next look will find it.
            Err(object_store::Error::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(self.store.error(error).into()),
        }
        self.renew(unit).await?;
        Ok(true)
    }

    /// Holds a unit for another while.
    pub async fn renew(&self, unit: &str) -> Result<(), TableError> {
        let put = self.store.objects().put(&path(unit), self.terms()?.into()).await;
        put.map(drop).map_err(|e| self.store.error(e).into())
    }

    /// Gives a unit back. One that cannot be given back runs out.
    pub async fn release(&self, unit: &str) {
        let _ = self.store.objects().delete(&path(unit)).await;
    }

    /// How long before a claim runs out it is renewed.
    pub fn renewal() -> Duration {
        TIME / 3
    }

    fn terms(&self) -> Result<Vec<u8>, TableError> {
        let terms = Terms { holder: self.holder.clone(), until: Utc::now() + TIME };
        serde_json::to_vec(&terms).map_err(|error| TableError::Corrupt {
            file: self.store.url().to_string(),
            reason: error.to_string(),
        })
    }
}

fn path(unit: &str) -> Path {
    Path::from(format!("{unit}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_unit_is_held_by_one_until_it_is_given_back_or_runs_out() {
        let store = Store::memory();
        let (a, b) = (Claims::new(&store, "a".into()), Claims::new(&store, "b".into()));
        assert!(a.take("u").await.unwrap());
        assert!(!b.take("u").await.unwrap());
        assert!(a.take("u").await.unwrap(), "its own");
        a.release("u").await;
        assert!(b.take("u").await.unwrap());
        let over = Terms { holder: "b".into(), until: Utc::now() - TIME };
        let bytes = serde_json::to_vec(&over).unwrap();
        store.child("claims").objects().put(&path("u"), bytes.into()).await.unwrap();
        assert!(a.take("u").await.unwrap(), "its holder was killed");
        assert!(!b.take("u").await.unwrap());
    }
}
