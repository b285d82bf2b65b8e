//! Upkeep by one worker at a time, across the fleet.
//!
//! A lease is an object that says who holds it and until when, `upkeep/<number>.json`, created and
//! never changed: whoever creates the next number after one that has run out holds it. That needs
//! nothing but conditional create. It only spares work: two that compact at once, because their
//! clocks differ, do no harm (see the compaction's commit).

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::table::error::TableError;

/// The right to do the upkeep, for a while.
#[derive(Debug)]
pub struct MaintenanceLease {
    store: Store,
    object_number: u64,
    terms: LeaseTerms,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LeaseTerms {
    holder: String,
    expires_at: DateTime<Utc>,
}

impl MaintenanceLease {
    /// Takes the lease of the catalogue for `time`; `None` while somebody else holds it.
    pub async fn acquire(
        catalogue: &Store,
        holder: &str,
        duration: Duration,
    ) -> Result<Option<Self>, TableError> {
        let store = catalogue.subfolder("maintenance");
        let numbers: Vec<u64> = store
            .object_store()
            .list(None)
            .map_ok(|object| object.location)
            .try_filter_map(|path| async move {
                let digits = path.filename().and_then(|name| name.strip_suffix(".json"));
                Ok(digits.and_then(|digits| digits.parse::<u64>().ok()))
            })
            .try_collect()
            .await
            .map_err(|e| store.wrap_error(e))?;
        let newest = numbers.iter().copied().max().unwrap_or_default();
        if newest > 0
            && let Some(terms) = read_terms(&store, newest).await?
            && terms.expires_at > Utc::now()
            && terms.holder != holder
        {
            return Ok(None);
        }
        let terms = LeaseTerms { holder: holder.to_owned(), expires_at: Utc::now() + duration };
        let lease = Self { store, object_number: newest + 1, terms };
        if !lease.try_write().await? {
            return Ok(None);
        }
        for old in numbers {
            // The newest alone counts; one that is left behind is removed by the next holder.
            let _ = lease.store.object_store().delete(&lease_path(old)).await;
        }
        Ok(Some(lease))
    }

    /// Holds the lease for another `time`; false where somebody else has taken it.
    pub async fn renew(&mut self, duration: Duration) -> Result<bool, TableError> {
        let terms = LeaseTerms { expires_at: Utc::now() + duration, ..self.terms.clone() };
        let next = Self { store: self.store.clone(), object_number: self.object_number + 1, terms };
        if !next.try_write().await? {
            return Ok(false);
        }
        let before = std::mem::replace(self, next);
        // One that is left behind is removed by the next holder.
        let _ = self.store.object_store().delete(&lease_path(before.object_number)).await;
        Ok(true)
    }

    /// Gives the lease back before its time.
    pub async fn release(mut self) -> Result<(), TableError> {
        let held = lease_path(self.object_number);
        self.object_number += 1;
        self.terms.expires_at = Utc::now();
        if self.try_write().await? {
            self.store.object_store().delete(&held).await.map_err(|e| self.store.wrap_error(e))?;
        }
        Ok(())
    }

    /// Writes the lease; false where somebody else wrote this number first.
    async fn try_write(&self) -> Result<bool, TableError> {
        let bytes = serde_json::to_vec(&self.terms).map_err(|error| TableError::Corrupt {
            file: lease_path(self.object_number).to_string(),
            reason: error.to_string(),
        })?;
        let create = PutOptions::from(PutMode::Create);
        match self
            .store
            .object_store()
            .put_opts(&lease_path(self.object_number), bytes.into(), create)
            .await
        {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(self.store.wrap_error(error).into()),
        }
    }
}

/// The terms of a lease; none where it was removed meanwhile or says nothing.
async fn read_terms(store: &Store, number: u64) -> Result<Option<LeaseTerms>, TableError> {
    let bytes = match store.object_store().get(&lease_path(number)).await {
        Ok(found) => found.bytes().await,
        Err(error) => Err(error),
    };
    match bytes {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(store.wrap_error(error).into()),
    }
}

fn lease_path(number: u64) -> Path {
    Path::from(format!("{number:020}.json"))
}
