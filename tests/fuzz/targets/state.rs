//! Arbitrary bytes as what other programs write for a catalogue: a revision of its state, the
//! report of a query worker, a request on the control topic. They are read, or rejected with a
//! reason.
//!
//! The first byte chooses the kind of object; the rest is its content.

#![no_main]

use std::sync::LazyLock;

use bsap::backfill::ControlRequest;
use bsap::catalogue::{CatalogueState, ReplicaReports, StateStore};
use bsap::store::Store;
use libfuzzer_sys::fuzz_target;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
});

async fn read_catalogue_object(is_state: bool, content: &[u8]) {
    let store = Store::in_memory();
    let path = if is_state { "state/00000000000000000001.json" } else { "replicas/a.json" };
    store.object_store().put(&Path::from(path), content.to_vec().into()).await.expect("put");
    if is_state {
        match StateStore::new(&store).read_newest().await {
            Ok(state) => {
                let state = state.expect("the revision that was written");
                let json = serde_json::to_vec(&state).expect("JSON");
                assert_eq!(serde_json::from_slice::<CatalogueState>(&json).ok(), Some(state));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    } else if let Err(error) =
        ReplicaReports::new(&store).list_and_remove_expired(chrono::DateTime::UNIX_EPOCH).await
    {
        assert!(!error.to_string().is_empty());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((kind, content)) = data.split_first() else { return };
    match kind % 3 {
        2 => {
            if let Ok(request) = serde_json::from_slice::<ControlRequest>(content) {
                let json = serde_json::to_vec(&request).expect("JSON");
                assert_eq!(serde_json::from_slice::<ControlRequest>(&json).ok(), Some(request));
            }
        }
        kind => RUNTIME.block_on(read_catalogue_object(kind == 0, content)),
    }
});
