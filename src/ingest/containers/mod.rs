//! Containers of images: segments, chunks and directories, what they say of the file, and the blocks of metadata in
//! them. [`super::decode`] takes the orientation from these blocks, and [`super::metadata`] texts.

mod blocks;
mod bmff;
mod bmp;
mod gif;
mod jpeg;
mod png;
mod tiff;
mod webp;

pub use blocks::{EXIF_PREFIX, MetadataBlocks, without_exif_prefix};
#[cfg(feature = "avif")]
pub use bmff::Fields;
pub use bmff::{ItemPlace, bmff_boxes, bmff_brands, item_entries, read_item_places};
pub use bmp::is_bmp_damaged;
pub use gif::gif_frame_end;
pub use jpeg::{JpegSegment, find_in_jpeg, jpeg_segments};
pub use png::{find_in_png, png_chunks};
pub use tiff::{TiffEntry, TiffFile, read_number};
pub use webp::{find_in_webp, is_webp_cut_off};
