//! A lease that lets one worker of a catalogue at a time do the maintenance.
//!
//! A lease is an object that says who holds it and until when, `maintenance/<number>.json`. It is created
//! and never changed: whoever creates the next number after an expired lease holds the new one. This
//! needs nothing but conditional create. The lease only saves work: two workers that compact at the same
//! time, because their clocks differ, do no harm (see the compaction's commit).

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutMode, PutOptions};
use serde::{Deserialize, Serialize};

use crate::store::Store;
use crate::table::error::TableError;

/// The right to do the maintenance of a catalogue until the lease expires.
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
    /// Acquires the lease of the catalogue for `duration`. Returns `None` if another worker holds it.
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
            // Only the newest lease counts; the next holder removes any that is left behind.
            let _ = lease.store.object_store().delete(&lease_path(old)).await;
        }
        Ok(Some(lease))
    }

    /// Extends the lease to `duration` from now. Returns false if another worker has acquired it.
    pub async fn renew(&mut self, duration: Duration) -> Result<bool, TableError> {
        let terms = LeaseTerms { expires_at: Utc::now() + duration, ..self.terms.clone() };
        let next = Self { store: self.store.clone(), object_number: self.object_number + 1, terms };
        if !next.try_write().await? {
            return Ok(false);
        }
        let before = std::mem::replace(self, next);
        // The next holder removes it if this fails.
        let _ = self.store.object_store().delete(&lease_path(before.object_number)).await;
        Ok(true)
    }

    /// Releases the lease before it expires.
    pub async fn release(mut self) -> Result<(), TableError> {
        let current = lease_path(self.object_number);
        self.object_number += 1;
        self.terms.expires_at = Utc::now();
        if self.try_write().await? {
            self.store
                .object_store()
                .delete(&current)
                .await
                .map_err(|e| self.store.wrap_error(e))?;
        }
        Ok(())
    }

    /// Writes the lease. Returns false if another worker has written this number first.
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

/// Reads the terms of a lease. Returns `None` if it was removed since, or cannot be parsed.
async fn read_terms(store: &Store, number: u64) -> Result<Option<LeaseTerms>, TableError> {
    let bytes = match store.object_store().get(&lease_path(number)).await {
        Ok(object) => object.bytes().await,
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
