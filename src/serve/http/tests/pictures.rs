//! Pictures and previews of them, through the router.

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode};
use image::{DynamicImage, ImageFormat, Rgb, RgbImage, Rgba, RgbaImage};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tower::ServiceExt;

use super::{DIMENSION, start_server_with_rows};
use crate::ingest::decode::{DecodeOptions, decode_image};
use crate::ingest::fetch::FetchOptions;
use crate::record::to_hex;
use crate::search::testing::{clip_like_embedding, sample_row};
use crate::serve::http::options::HttpOptions;

/// A query worker that may read the files of a folder, with one image per file.
struct PictureServer {
    folder: tempfile::TempDir,
    router: Router,
}

impl PictureServer {
    /// Starts a query worker with these files and, below `nowhere` and `outside`, two images that
    /// cannot be read.
    async fn start(options: HttpOptions, files: &[(&str, Vec<u8>)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let mut rows = Vec::new();
        let mut add_row = |id: &str, path: &std::path::Path| {
            let embedding = clip_like_embedding(rows.len() as u64, DIMENSION);
            let mut row = sample_row(id, 1, Some(embedding));
            let image = row.image.as_mut().unwrap();
            image.uri = Some(url::Url::from_file_path(path).unwrap().into());
            image.content_hash = to_hex(&Sha256::digest(id));
            rows.push(row);
        };
        for (name, bytes) in files {
            std::fs::write(root.join(name), bytes).unwrap();
            add_row(name, &root.join(name));
        }
        add_row("nowhere", &root.join("nowhere"));
        add_row("outside", &folder.path().join("outside"));
        let fetch = FetchOptions { file_roots: vec![root], ..FetchOptions::default() };
        let (router, _) = start_server_with_rows(options, None, rows, &fetch).await;
        Self { folder, router }
    }

    /// Requests the picture of an image; `query` begins with `&`.
    async fn get(
        &self,
        id: &str,
        query: &str,
        tag: Option<&str>,
    ) -> (StatusCode, HeaderMap, Vec<u8>) {
        let mut request = Request::get(format!("/v1/images/picture?id={id}{query}"));
        if let Some(tag) = tag {
            request = request.header("if-none-match", tag);
        }
        let request = request.body(Body::empty()).unwrap();
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (status, headers) = (response.status(), response.headers().clone());
        let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
        (status, headers, bytes.to_vec())
    }

    async fn get_preview(&self, id: &str, side: u32) -> RgbImage {
        let (status, headers, bytes) = self.get(id, &format!("&v=1&side={side}"), None).await;
        assert_eq!(status, StatusCode::OK, "{id}");
        assert_eq!(headers["content-type"], "image/jpeg", "{id}");
        decode_image(&bytes, &DecodeOptions::default()).unwrap()
    }

    async fn get_problem(&self, id: &str, query: &str) -> (u16, String) {
        let (status, headers, bytes) = self.get(id, query, None).await;
        assert_eq!(headers["content-type"], "application/problem+json", "{id}{query}");
        let problem: Value = serde_json::from_slice(&bytes).unwrap();
        (status.as_u16(), problem["code"].as_str().unwrap().to_owned())
    }
}

fn encode_picture(image: impl Into<DynamicImage>, format: ImageFormat) -> Vec<u8> {
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.into().write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

fn encode_jpeg(picture: &RgbImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let (width, height) = (picture.width() as u16, picture.height() as u16);
    jpeg_encoder::Encoder::new(&mut bytes, 95)
        .encode(picture, width, height, jpeg_encoder::ColorType::Rgb)
        .unwrap();
    bytes
}

/// Writes an uncompressed TIFF of one strip.
fn encode_tiff(picture: &RgbImage) -> Vec<u8> {
    let (width, height, size) = (picture.width(), picture.height(), picture.len() as u32);
    // Tag, type (3: two bytes, 4: four bytes) and value of width, height, bits (of which there are three, in the
    // header's spare bytes), compression, colours, position of the pixels, samples, rows and size.
    let entries: [(u16, u16, u32, u32); 9] = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 3, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 14),
        (277, 3, 1, 3),
        (278, 4, 1, height),
        (279, 4, 1, size),
    ];
    let mut bytes = [b"II*\0".as_slice(), &(14 + size).to_le_bytes()].concat();
    bytes.extend([8, 0, 8, 0, 8, 0]);
    bytes.extend_from_slice(picture);
    bytes.extend((entries.len() as u16).to_le_bytes());
    for (tag, kind, count, value) in entries {
        bytes.extend([tag, kind].map(u16::to_le_bytes).as_flattened());
        bytes.extend([count, value].map(u32::to_le_bytes).as_flattened());
    }
    bytes.extend([0; 4]);
    bytes
}

#[tokio::test]
async fn previews_are_small_upright_jpegs_of_every_format() {
    let picture = RgbImage::from_fn(600, 300, |x, _| {
        Rgb(if x < 300 { [250, 10, 10] } else { [10, 10, 250] })
    });
    let mut files: Vec<(&str, Vec<u8>)> = vec![
        ("bmp", encode_picture(picture.clone(), ImageFormat::Bmp)),
        ("png", encode_picture(picture.clone(), ImageFormat::Png)),
        ("webp", encode_picture(picture.clone(), ImageFormat::WebP)),
        ("gif", encode_picture(picture.clone(), ImageFormat::Gif)),
        ("jpeg", encode_jpeg(&picture)),
        ("tiff", encode_tiff(&picture)),
    ];
    let formats: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
    let small = ["small.heic", "small.jxl"];
    files.extend(
        small.map(|name| {
            (name, std::fs::read(format!("tests/fuzz/corpus/picture/{name}")).unwrap())
        }),
    );
    files.push((
        "clear",
        encode_picture(RgbaImage::from_pixel(40, 20, Rgba([0, 0, 0, 0])), ImageFormat::Png),
    ));
    // Stored with 2 × 1 blocks of which EXIF says that they are to be turned by 90°.
    let turned = std::fs::read("tests/fuzz/corpus/picture/turned.jpeg").unwrap();
    let upright = decode_image(&turned, &DecodeOptions::default()).unwrap();
    files.push(("turned", turned));
    let server = PictureServer::start(HttpOptions::default(), &files).await;
    for name in formats {
        for (side, expected) in
            [(1, (128, 64)), (128, (128, 64)), (200, (256, 128)), (1024, (600, 300))]
        {
            let preview = server.get_preview(name, side).await;
            assert_eq!(preview.dimensions(), expected, "{name} {side}");
            let (left, right) = (expected.0 / 4, expected.0 * 3 / 4);
            let [left, right] = [left, right].map(|x| preview.get_pixel(x, expected.1 / 2).0);
            assert!(
                left[0] > 230 && left[2] < 30 && right[0] < 30 && right[2] > 230,
                "{name}: {left:?} {right:?}"
            );
        }
        let (status, headers, bytes) = server.get(name, "", None).await;
        assert_eq!(status, StatusCode::OK);
        assert_eq!(headers["content-type"], format!("image/{name}").as_str());
        assert_eq!(bytes, files.iter().find(|(file, _)| *file == name).unwrap().1, "the original");
    }
    for name in small {
        let bytes = &files.iter().find(|(file, _)| *file == name).unwrap().1;
        let original = decode_image(bytes, &DecodeOptions::default()).unwrap();
        assert_eq!(server.get_preview(name, 128).await.dimensions(), original.dimensions());
    }
    let clear = server.get_preview("clear", 128).await;
    assert!(clear.pixels().all(|pixel| pixel.0.iter().all(|value| *value > 250)), "on white");
    let turned = server.get_preview("turned", 128).await;
    assert_eq!(turned.dimensions(), upright.dimensions());
    for (preview, original) in turned.as_raw().iter().zip(upright.as_raw()) {
        assert!(preview.abs_diff(*original) < 40);
    }
}

#[tokio::test]
async fn a_preview_is_made_once_and_not_sent_again_to_clients_that_have_it() {
    let png = encode_picture(RgbImage::from_pixel(300, 300, Rgb([1, 2, 3])), ImageFormat::Png);
    let server = PictureServer::start(HttpOptions::default(), &[("a", png.clone())]).await;
    let (_, headers, first) = server.get("a", "&side=256", None).await;
    let tag = headers["etag"].to_str().unwrap().to_owned();
    assert_eq!(headers["cache-control"], "private, max-age=3600");
    // The original is not read again.
    std::fs::remove_file(server.folder.path().join("root/a")).unwrap();
    let (status, headers, second) = server.get("a", "&side=250", None).await;
    assert_eq!(
        (status, headers["etag"].to_str().unwrap(), &second),
        (StatusCode::OK, &*tag, &first)
    );
    for given in [tag.clone(), format!("\"other\", W/{tag}"), "*".into()] {
        let (status, headers, body) = server.get("a", "&side=256", Some(&given)).await;
        assert_eq!((status, body.len()), (StatusCode::NOT_MODIFIED, 0), "{given}");
        assert_eq!(headers["etag"], *tag);
    }
    let (status, ..) = server.get("a", "&side=256", Some("\"other\"")).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(server.get_problem("a", "&side=512").await, (404, "image_not_found".into()));

    let without_cache = HttpOptions { preview_cache_mib: 0, ..HttpOptions::default() };
    let server = PictureServer::start(without_cache, &[("a", png)]).await;
    server.get_preview("a", 256).await;
    std::fs::remove_file(server.folder.path().join("root/a")).unwrap();
    assert_eq!(server.get_problem("a", "&side=256").await, (404, "image_not_found".into()));
}

#[tokio::test]
async fn what_has_no_preview_is_answered_with_the_reason() {
    let mut cut = encode_picture(RgbImage::new(64, 64), ImageFormat::Png);
    cut.truncate(60);
    let wide = encode_picture(RgbImage::new(20_001, 1), ImageFormat::Png);
    let files = [("cut", cut), ("wide", wide), ("text", b"<script>alert(1)</script>".to_vec())];
    let server = PictureServer::start(HttpOptions::default(), &files).await;
    for (id, query, status, code) in [
        ("cut", "&side=128", 415, "image_damaged"),
        ("wide", "&side=128", 415, "image_too_large"),
        ("text", "&side=128", 415, "unknown_image_format"),
        ("text", "", 415, "not_an_image"),
        ("nowhere", "&side=128", 404, "image_not_found"),
        ("outside", "&side=128", 404, "uri_not_allowed"),
        ("unknown", "&side=128", 404, "not_found"),
        ("cut", "&side=0", 422, "invalid_field"),
        ("cut", "&side=1025", 422, "invalid_field"),
        ("cut", "&side=-1", 400, "invalid_query"),
        ("cut", "&side=wide", 400, "invalid_query"),
        ("cut", "&size=128", 400, "invalid_query"),
    ] {
        assert_eq!(server.get_problem(id, query).await, (status, code.into()), "{id}{query}");
    }
    let without_pictures = HttpOptions { serve_pictures: false, ..HttpOptions::default() };
    let server = PictureServer::start(without_pictures, &files).await;
    assert_eq!(server.get_problem("cut", "&side=128").await, (404, "not_found".into()));
}
