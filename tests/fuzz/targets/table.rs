//! A table of which one file is any bytes, under a name with the right checksum, as a writer gone
//! wrong would leave it: readers take it in or name it, and never panic.
//!
//! The first byte says which file: a data file, or the commit that names it. With BSAP_SEEDS=<folder>
//! the files of a small table are written there, to begin with.

#![no_main]

#[path = "../caught.rs"]
mod caught;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use bsap::record::{Embedding, Image, ImageId, Ordering, Partition, Row, Sequence};
use bsap::store::Store;
use bsap::table::{Follower, Generation, PartitionBatch, Writer};
use futures::TryStreamExt;
use libfuzzer_sys::fuzz_target;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
});
/// The files of a small table, by place.
static FILES: LazyLock<Vec<(Path, Vec<u8>)>> = LazyLock::new(|| RUNTIME.block_on(small_table()));

fn generation() -> Generation {
    Generation::new("tiny", &"ab12".repeat(16), 4, 100.0, Ordering::Sequence)
}

async fn small_table() -> Vec<(Path, Vec<u8>)> {
    let store = Store::memory();
    let mut writer = Writer::open(&store, &generation(), 1).await.expect("a table");
    let row = |offset: i64| Row {
        image_id: ImageId::new(format!("image-{offset}")).expect("an id"),
        sequence: Sequence::from_number(1),
        event_time: None,
        embedded_at: chrono::DateTime::UNIX_EPOCH,
        image: (offset != 1).then(|| Image {
            uri: Some("s3://bucket/a.jpg".into()),
            content_hash: "00".repeat(32),
            bytes: 9,
            width: 1,
            height: 1,
            attributes: BTreeMap::from([("colour".into(), "red".into())]),
            embedding: Embedding::round(&[0.5; 4]),
            statistics: BTreeMap::new(),
        }),
    };
    let partition = Partition { topic: "images".into(), number: 0 };
    let rows = (0..3).map(|offset| (offset, row(offset))).collect();
    let batch = PartitionBatch { partition, expected: None, next_offset: 3, rows };
    writer.append(vec![batch], &CancellationToken::new()).await.expect("appended");
    let objects = store.objects();
    let found: Vec<_> = objects.list(None).try_collect().await.expect("listed");
    let mut files = Vec::new();
    for file in found {
        let bytes = objects.get(&file.location).await.expect("there").bytes().await;
        files.push((file.location, bytes.expect("read").to_vec()));
    }
    files
}

/// The table with `content` in the place of its data file, or of the commit that names it.
async fn read(in_log: bool, content: &[u8]) {
    let store = Store::memory();
    let checksum = Sha256::digest(content);
    let digits: String = checksum.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = format!("0000000000000000-{digits}.parquet");
    for (place, bytes) in FILES.iter() {
        let is_commit = place.as_ref().ends_with("00000000000000000001.json");
        let (place, bytes) = match place.extension() {
            Some("parquet") if !in_log => {
                let (folder, _) = place.as_ref().rsplit_once('/').expect("in a folder");
                (Path::from(format!("{folder}/{name}")), content.to_vec())
            }
            _ if is_commit && in_log => (place.clone(), content.to_vec()),
            _ if is_commit => (place.clone(), renamed(bytes, &name, content.len())),
            _ => (place.clone(), bytes.clone()),
        };
        store.objects().put(&place, bytes.into()).await.expect("put");
    }
    let mut follower = match Follower::open(&store, &generation()).await {
        Ok(follower) => follower,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    if let Err(error) = follower.next(&|_, _| {}).await {
        assert!(!error.to_string().is_empty());
    }
}

/// A commit that names the file `name` of `size` bytes.
fn renamed(commit: &[u8], name: &str, size: usize) -> Vec<u8> {
    let text = std::str::from_utf8(commit).expect("JSON lines");
    let lines = text.lines().map(|line| {
        let mut action: serde_json::Value = serde_json::from_str(line).expect("JSON");
        if let Some(add) = action.get_mut("add") {
            add["path"] = name.into();
            add["size"] = size.into();
        }
        format!("{action}\n")
    });
    lines.collect::<String>().into_bytes()
}

fn seeds(folder: &std::ffi::OsStr) {
    for (place, bytes) in FILES.iter() {
        let name = place.filename().expect("a name");
        let is_commit = name == "00000000000000000001.json";
        if is_commit || place.extension() == Some("parquet") {
            let name = if is_commit { "commit" } else { "rows" };
            let seed = [&[u8::from(is_commit)], bytes.as_slice()].concat();
            std::fs::write(std::path::Path::new(folder).join(name), seed).expect("written");
        }
    }
}

fuzz_target!(init: {
    // At a schema that makes no sense.
    caught::pass_over("arrow-ipc");
    // Here, because it needs the runtime to itself.
    LazyLock::force(&FILES);
    if let Some(folder) = std::env::var_os("BSAP_SEEDS") {
        seeds(&folder);
    }
}, |data: &[u8]| {
    let Some((kind, content)) = data.split_first() else { return };
    RUNTIME.block_on(read(kind & 1 == 1, content));
});
