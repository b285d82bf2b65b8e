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
use crate::table::TableError;

/// The right to do the upkeep, for a while.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    number: u64,
    terms: Terms,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Terms {
    holder: String,
    until: DateTime<Utc>,
}

impl Lease {
    /// Takes the lease of the catalogue for `time`; `None` while somebody else holds it.
    pub async fn take(
        catalogue: &Store,
        holder: &str,
        time: Duration,
    ) -> Result<Option<Self>, TableError> {
        let store = catalogue.child("upkeep");
        let numbers: Vec<u64> = store
            .objects()
            .list(None)
            .map_ok(|object| object.location)
            .try_filter_map(|path| async move {
                let digits = path.filename().and_then(|name| name.strip_suffix(".json"));
                Ok(digits.and_then(|digits| digits.parse::<u64>().ok()))
            })
            .try_collect()
            .await
            .map_err(|e| store.error(e))?;
        let newest = numbers.iter().copied().max().unwrap_or_default();
        if newest > 0
            && let Some(terms) = read(&store, newest).await?
            && terms.until > Utc::now()
            && terms.holder != holder
        {
            return Ok(None);
        }
        let terms = Terms { holder: holder.to_owned(), until: Utc::now() + time };
        let lease = Self { store, number: newest + 1, terms };
        if !lease.write().await? {
            return Ok(None);
        }
        for old in numbers {
            // The newest alone counts; one that is left behind is removed by the next holder.
            let _ = lease.store.objects().delete(&path(old)).await;
        }
        Ok(Some(lease))
    }

    /// Holds the lease for another `time`; false where somebody else has taken it.
    pub async fn renew(&mut self, time: Duration) -> Result<bool, TableError> {
        let terms = Terms { until: Utc::now() + time, ..self.terms.clone() };
        let next = Self { store: self.store.clone(), number: self.number + 1, terms };
        if !next.write().await? {
            return Ok(false);
        }
        let before = std::mem::replace(self, next);
        // One that is left behind is removed by the next holder.
        let _ = self.store.objects().delete(&path(before.number)).await;
        Ok(true)
    }

    /// Gives the lease back before its time.
    pub async fn give_back(mut self) -> Result<(), TableError> {
        let held = path(self.number);
        self.number += 1;
        self.terms.until = Utc::now();
        if self.write().await? {
            self.store.objects().delete(&held).await.map_err(|e| self.store.error(e))?;
        }
        Ok(())
    }

    /// Writes the lease; false where somebody else wrote this number first.
    async fn write(&self) -> Result<bool, TableError> {
        let bytes = serde_json::to_vec(&self.terms).map_err(|error| TableError::Corrupt {
            file: path(self.number).to_string(),
            reason: error.to_string(),
        })?;
        let create = PutOptions::from(PutMode::Create);
        match self.store.objects().put_opts(&path(self.number), bytes.into(), create).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
            Err(error) => Err(self.store.error(error).into()),
        }
    }
}

/// The terms of a lease; none where it was removed meanwhile or says nothing.
async fn read(store: &Store, number: u64) -> Result<Option<Terms>, TableError> {
    let bytes = match store.objects().get(&path(number)).await {
        Ok(found) => found.bytes().await,
        Err(error) => Err(error),
    };
    match bytes {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(object_store::Error::NotFound { .. }) => Ok(None),
        Err(error) => Err(store.error(error).into()),
    }
}

fn path(number: u64) -> Path {
    Path::from(format!("{number:020}.json"))
}
