//! Tells pictures from other files: by the extension, and by the first bytes if the extension says nothing.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use super::item::SkipReason;
use crate::ingest::decode::{Recognised, recognise};
use crate::publish::IMAGE_EXTENSIONS;

/// Extensions of picture formats that are not read, some of them by no build.
const UNREAD_EXTENSIONS: [&str; 27] = [
    "arw", "avif", "cr2", "cr3", "dng", "eps", "exr", "hdr", "icns", "ico", "jp2", "nef", "orf",
    "pbm", "pgm", "pnm", "ppm", "psd", "qoi", "raf", "rw2", "svg", "svgz", "tga", "wmf", "xcf",
    "xpm",
];

/// First bytes that are read of a file whose extension says nothing.
const SNIFFED_BYTES: u64 = 32;

/// What the name of a file says about its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KindByName {
    /// A picture of a format that is read.
    Picture,
    /// A picture of a format that is not read.
    UnreadPicture(SkipReason),
    /// Nothing.
    Unknown,
}

/// Returns what the extension of a name says.
pub fn kind_by_name(name: &str) -> KindByName {
    let extension = name.rsplit_once('.').map(|(_, extension)| extension.to_ascii_lowercase());
    let Some(extension) = extension else { return KindByName::Unknown };
    if IMAGE_EXTENSIONS.contains(&extension.as_str()) {
        return KindByName::Picture;
    }
    if UNREAD_EXTENSIONS.contains(&extension.as_str()) {
        let format = extension.to_uppercase();
        return KindByName::UnreadPicture(SkipReason::not_a_picture(format!(
            "{format}, a format that is not read"
        )));
    }
    KindByName::Unknown
}

/// The reason for a file that is no picture.
pub fn no_picture() -> SkipReason {
    SkipReason::not_a_picture("no picture")
}

/// Whether a local file is a picture of a format that is read: by its extension, or else by its content.
pub fn check_local_file(path: &Path, name: &str) -> Result<(), SkipReason> {
    match kind_by_name(name) {
        KindByName::Picture => Ok(()),
        KindByName::UnreadPicture(reason) => Err(reason),
        KindByName::Unknown => match has_picture_content(path) {
            Ok(true) => Ok(()),
            Ok(false) => Err(no_picture()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                Err(unreadable_file(&error))
            }
            Err(_) => Err(no_picture()),
        },
    }
}

/// The reason for a file that this user may not read.
pub fn unreadable_file(error: &io::Error) -> SkipReason {
    SkipReason::failure(
        "cannot be read",
        format!("cannot be read: {error}; give this user the right to read it"),
    )
}

fn has_picture_content(path: &Path) -> io::Result<bool> {
    let mut start = Vec::new();
    File::open(path)?.take(SNIFFED_BYTES).read_to_end(&mut start)?;
    Ok(matches!(recognise(&start), Recognised::Readable(_)))
}
