//! What others write into a catalogue, any bytes: a revision of its state, a query worker's report, a
//! request on the control topic. Taken in, or refused with the reason.
//!
//! The first byte says which; the rest is its content.

#![no_main]

use std::sync::LazyLock;

use bsap::backfill::Request;
use bsap::store::Store;
use bsap::catalogue::{Readers, StateStore};
use libfuzzer_sys::fuzz_target;
use object_store::ObjectStoreExt;
use object_store::path::Path;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
});

async fn read(which: u8, content: &[u8]) {
    let store = Store::memory();
    let place = if which == 0 { "state/00000000000000000001.json" } else { "readers/a.json" };
    store.objects().put(&Path::from(place), content.to_vec().into()).await.expect("put");
    if which == 0 {
        match StateStore::new(&store).newest().await {
            Ok(state) => {
                let state = state.expect("it is there");
                let again = serde_json::to_vec(&state).expect("JSON");
                assert_eq!(
                    serde_json::from_slice::<bsap::catalogue::CatalogueState>(&again).ok(),
                    Some(state)
                );
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    } else if let Err(error) = Readers::new(&store).all(chrono::DateTime::UNIX_EPOCH).await {
        assert!(!error.to_string().is_empty());
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((which, content)) = data.split_first() else { return };
    match which % 3 {
        2 => {
            if let Ok(request) = serde_json::from_slice::<Request>(content) {
                let again = serde_json::to_vec(&request).expect("JSON");
                assert_eq!(serde_json::from_slice::<Request>(&again).ok(), Some(request));
            }
        }
        which => RUNTIME.block_on(read(which, content)),
    }
});
