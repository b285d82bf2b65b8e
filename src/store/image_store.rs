//! Buckets and folders of somebody else's images, whose keys may be anything.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::{
    GetOptions, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt as _, ObjectStoreScheme,
};
use url::Url;

use super::folder::{Store, StoreError, merge_environment, parse_url};
use super::folder_listing;
use super::key_translation::{KeyTranslatingConnector, S3Signer};
use super::listed_object::ListedObject;
use super::object_keys::{
    NOT_PLAIN, is_plain_key, key_of_url, key_to_path, object_url, path_to_key,
};
use crate::diagnosis::describe;

/// Region of a bucket if none is configured.
const DEFAULT_S3_REGION: &str = "us-east-1";

/// A bucket, a prefix of one, or a local folder, from which images are read by their exact keys.
#[derive(Debug, Clone)]
pub struct ImageStore {
    url: Url,
    access: ImageAccess,
}

#[derive(Debug, Clone)]
enum ImageAccess {
    Folder(PathBuf),
    Bucket {
        /// The whole bucket.
        objects: Arc<dyn ObjectStore>,
        /// Prefix of the keys: empty, or with a slash at its end.
        prefix: String,
        /// Whether objects can be fetched whose keys `object_store` cannot express as paths.
        translates_keys: bool,
    },
}

impl ImageStore {
    /// Opens the bucket, prefix or folder that `url` names. Sends no request and creates nothing.
    pub fn open(url: &str, options: &BTreeMap<String, String>) -> Result<Self, StoreError> {
        let url = parse_url(url)?;
        let invalid_url = |reason: String| StoreError::InvalidUrl { url: url.to_string(), reason };
        if url.scheme() == "file" {
            let path =
                url.to_file_path().map_err(|()| invalid_url("names no local folder".into()))?;
            let folder = path.components().collect();
            return Ok(Self { url, access: ImageAccess::Folder(folder) });
        }
        let prefix = key_of_url(&url).ok_or_else(|| invalid_url("is not UTF-8".into()))?;
        let prefix = prefix.strip_suffix('/').unwrap_or(&prefix);
        if !prefix.is_empty() && !is_plain_key(prefix) {
            return Err(invalid_url(format!(
                "the prefix {prefix:?} has {NOT_PLAIN}; name a shorter prefix"
            )));
        }
        let (scheme, _) =
            ObjectStoreScheme::parse(&url).map_err(|error| invalid_url(describe(&error)))?;
        let (objects, translates_keys) =
            open_bucket(&scheme, &url, options).map_err(|error| invalid_url(describe(&error)))?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Self { url, access: ImageAccess::Bucket { objects, prefix, translates_keys } })
    }

    /// Reads the objects of a folder of this program's own.
    pub fn from_store(store: &Store) -> Self {
        let access = ImageAccess::Bucket {
            objects: store.object_store().clone(),
            prefix: String::new(),
            translates_keys: false,
        };
        Self { url: store.url().clone(), access }
    }

    /// Returns the URL of the bucket, prefix or folder.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Lists all objects, in the order of the store. Leaves out the empty objects with a slash at the end of
    /// their keys that consoles create for a "folder".
    pub fn list(&self) -> BoxStream<'static, Result<ListedObject, StoreError>> {
        match &self.access {
            ImageAccess::Folder(folder) => {
                folder_listing::list_files(folder.clone(), self.url.clone())
            }
            ImageAccess::Bucket { objects, prefix, translates_keys } => {
                let prefix_path =
                    (!prefix.is_empty()).then(|| key_to_path(prefix.trim_end_matches('/')));
                let (url, prefix, translates_keys) =
                    (self.url.clone(), prefix.clone(), *translates_keys);
                let listed = objects.list(prefix_path.as_ref()).filter_map(move |object| {
                    let object = match object {
                        Ok(meta) => describe_object(&url, &prefix, translates_keys, &meta).map(Ok),
                        Err(source) => {
                            Some(Err(StoreError::ObjectStore { url: url.to_string(), source }))
                        }
                    };
                    std::future::ready(object)
                });
                listed.boxed()
            }
        }
    }

    /// Checks that the store answers within `timeout`, whatever it contains.
    pub async fn check_reachable(&self, timeout: Duration) -> Result<(), StoreError> {
        match tokio::time::timeout(timeout, self.list().next()).await {
            Ok(listed) => listed.transpose().map(|_| ()),
            Err(_) => {
                Err(StoreError::Timeout { url: self.url.to_string(), seconds: timeout.as_secs() })
            }
        }
    }

    /// Whether there may be an object with the key `key`, by a request for that object: true for a key that no
    /// request can name.
    pub async fn may_contain(&self, key: &[u8]) -> Result<bool, StoreError> {
        match &self.access {
            ImageAccess::Folder(folder) => {
                let path = folder.join(OsStr::from_bytes(key));
                let exists = tokio::fs::try_exists(&path).await;
                exists.map_err(|source| StoreError::ReadFolder {
                    path: path.display().to_string(),
                    source,
                })
            }
            ImageAccess::Bucket { objects, prefix, translates_keys } => {
                let Ok(key) = std::str::from_utf8(key) else { return Ok(true) };
                let whole_key = format!("{prefix}{key}");
                let addressable = *translates_keys || is_plain_key(&whole_key);
                if !addressable || object_url(&self.url, key).is_err() {
                    return Ok(true);
                }
                match objects.head(&key_to_path(&whole_key)).await {
                    Ok(_) => Ok(true),
                    Err(object_store::Error::NotFound { .. }) => Ok(false),
                    Err(source) => {
                        Err(StoreError::ObjectStore { url: self.url.to_string(), source })
                    }
                }
            }
        }
    }

    /// Requests the object with the key `key` of the bucket, or one of its versions. Fails for a local folder,
    /// and for a key that no request can name.
    pub async fn get(&self, key: &str, version: Option<&str>) -> object_store::Result<GetResult> {
        let not_supported = |reason: &str| object_store::Error::NotSupported {
            source: format!("{}: {reason}", self.url).into(),
        };
        match &self.access {
            ImageAccess::Folder(_) => Err(not_supported("is a local folder")),
            ImageAccess::Bucket { objects, prefix, translates_keys } => {
                let key = format!("{prefix}{key}");
                if !*translates_keys && !is_plain_key(&key) {
                    return Err(not_supported(&format!(
                        "objects of this kind of store cannot be fetched if their key has {NOT_PLAIN}"
                    )));
                }
                let version = version.map(ToOwned::to_owned);
                let options = GetOptions { version, ..GetOptions::default() };
                objects.get_opts(&key_to_path(&key), options).await
            }
        }
    }
}

/// Opens a whole bucket. Returns with it whether keys are translated in requests, too: not for Azure, where
/// signatures cover the path in a form of their own.
fn open_bucket(
    scheme: &ObjectStoreScheme,
    url: &Url,
    options: &BTreeMap<String, String>,
) -> object_store::Result<(Arc<dyn ObjectStore>, bool)> {
    /// Sets the options that the builder knows, as [`object_store::parse_url_opts`] does.
    macro_rules! configure {
        ($builder:expr) => {
            merge_environment(options).fold(
                $builder.with_url(url.as_str()),
                |builder, (key, value)| match key.parse() {
                    Ok(key) => builder.with_config(key, value),
                    Err(_) => builder,
                },
            )
        };
    }
    let connector = KeyTranslatingConnector::default();
    match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let builder = configure!(AmazonS3Builder::new());
            let region = builder.get_config_value(&AmazonS3ConfigKey::Region);
            let bucket = builder.with_http_connector(connector.clone()).build()?;
            let region = region.unwrap_or_else(|| DEFAULT_S3_REGION.into());
            let signer = S3Signer { credentials: bucket.credentials().clone(), region };
            // Set only once, because the connector was made for this store.
            let _ = connector.signer.set(signer);
            Ok((Arc::new(bucket), true))
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = configure!(GoogleCloudStorageBuilder::new());
            Ok((Arc::new(builder.with_http_connector(connector).build()?), true))
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = configure!(MicrosoftAzureBuilder::new());
            Ok((Arc::new(builder.with_http_connector(connector).build()?), false))
        }
        _ => Err(object_store::Error::NotSupported {
            source: format!("{}: is not a bucket", url.scheme()).into(),
        }),
    }
}

/// Describes an object below `prefix`; `None` for the placeholder of a "folder".
fn describe_object(
    url: &Url,
    prefix: &str,
    translates_keys: bool,
    meta: &ObjectMeta,
) -> Option<ListedObject> {
    let whole_key = path_to_key(&meta.location);
    let key = whole_key.strip_prefix(prefix)?;
    if key.is_empty() || key.ends_with('/') {
        return None;
    }
    let uri = if translates_keys || is_plain_key(&whole_key) {
        object_url(url, key)
    } else {
        Err("objects with such keys cannot be fetched from this kind of store; rename the object"
            .into())
    };
    Some(ListedObject {
        key: key.as_bytes().to_vec(),
        uri,
        last_modified: meta.last_modified,
        size_bytes: meta.size,
    })
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use axum::Router;
    use axum::extract::Request;
    use axum::http::{StatusCode, header};
    use axum::response::{IntoResponse, Response};
    use futures::TryStreamExt as _;
    use percent_encoding::percent_decode_str;

    use super::*;

    /// Keys of the bucket, as a listing writes them, and as they are.
    const KEYS: [(&str, &str); 9] = [
        ("p/a//b.jpg", "p/a//b.jpg"),
        ("p//lead.jpg", "p//lead.jpg"),
        ("p/../up.jpg", "p/../up.jpg"),
        ("p/control&#x1;.jpg", "p/control\u{1}.jpg"),
        ("p/folder.jpg/", "p/folder.jpg/"),
        ("p/line&#10;break.jpg", "p/line\nbreak.jpg"),
        ("p/plain &amp; simple.jpg", "p/plain & simple.jpg"),
        ("p/ spaces .jpg ", "p/ spaces .jpg "),
        ("q.jpg", "q.jpg"),
    ];

    /// An S3 with the bucket `bucket` and [`KEYS`]; the content of each object is its key. Like S3, it keeps
    /// every byte of a key.
    async fn answer(request: Request) -> Response {
        let (path, query) = (request.uri().path(), request.uri().query().unwrap_or_default());
        if !request.headers().contains_key(header::AUTHORIZATION) {
            return StatusCode::FORBIDDEN.into_response();
        }
        let listing = |prefix: &str| {
            let mut text = String::from("<ListBucketResult><IsTruncated>false</IsTruncated>");
            for (written, _) in KEYS.iter().filter(|(_, key)| key.starts_with(prefix)) {
                write!(text, "<Contents><Key>{written}</Key><LastModified>2026-01-02T03:04:05.000Z</LastModified><Size>1</Size></Contents>").unwrap();
            }
            text + "</ListBucketResult>"
        };
        let Some(key) = path.strip_prefix("/bucket/") else {
            let prefix = if query.contains("prefix=p%2F") { "p/" } else { "" };
            return listing(prefix).into_response();
        };
        let key = percent_decode_str(key).decode_utf8().unwrap();
        match KEYS.iter().find(|(_, known)| *known == key) {
            Some((_, key)) => {
                let headers = [
                    (header::LAST_MODIFIED, "Fri, 02 Jan 2026 03:04:05 GMT"),
                    (header::ETAG, "\"1\""),
                ];
                (headers, *key).into_response()
            }
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    async fn start_s3() -> BTreeMap<String, String> {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
        let options = [
            ("aws_endpoint", endpoint.as_str()),
            ("aws_allow_http", "true"),
            ("aws_access_key_id", "id"),
            ("aws_secret_access_key", "secret"),
        ];
        options.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    #[tokio::test]
    async fn every_object_of_a_bucket_is_listed_and_fetched_under_its_own_key() {
        let options = start_s3().await;
        let bucket = ImageStore::open("s3://bucket", &options).unwrap();
        let prefix = ImageStore::open("s3://bucket/p", &options).unwrap();
        let listed: Vec<ListedObject> = prefix.list().try_collect().await.unwrap();
        let keys: Vec<_> = listed.iter().map(ListedObject::key_text).collect();
        let below_prefix = KEYS.iter().filter_map(|(_, key)| key.strip_prefix("p/"));
        let expected: Vec<_> = below_prefix.filter(|key| !key.ends_with('/')).collect();
        assert_eq!(keys, expected);
        assert_eq!(bucket.list().try_collect::<Vec<_>>().await.unwrap().len(), expected.len() + 1);
        for object in &listed {
            let key = object.key_text();
            match &object.uri {
                Ok(uri) => {
                    let whole_key = key_of_url(uri).unwrap();
                    assert_eq!(whole_key, format!("p/{key}"));
                    let fetched = bucket.get(&whole_key, None).await.unwrap().bytes().await;
                    assert_eq!(fetched.unwrap(), whole_key);
                }
                Err(reason) => assert!(key == "../up.jpg" && reason.contains("\"..\""), "{reason}"),
            }
            assert!(prefix.may_contain(key.as_bytes()).await.unwrap(), "{key:?}");
        }
        for missing in ["a/b.jpg", "lead.jpg", "a//c.jpg"] {
            assert!(!prefix.may_contain(missing.as_bytes()).await.unwrap(), "{missing}");
        }
    }

    #[test]
    fn a_prefix_that_would_be_listed_as_another_one_is_refused() {
        for url in ["s3://bucket//a", "s3://bucket/a//b/", "s3://bucket/a%0Ab"] {
            let error = ImageStore::open(url, &BTreeMap::new()).err().unwrap().to_string();
            assert!(error.contains("shorter prefix"), "{error}");
            assert!(error.contains("control character"), "{error}");
        }
    }
}
