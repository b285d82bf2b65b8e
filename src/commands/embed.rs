//! `bsap embed`: prints embeddings of texts and images.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use image::RgbImage;
use image::codecs::png::PngEncoder;
use serde_json::json;

use super::shared::checkpoint_args::CheckpointArgs;
use super::shared::error::{CommandError, CommandResult};
use super::shared::printing::print_line;
use crate::clip::{ClipModel, Encoders, Pixels};
use crate::ingest::decode::{self, decode_image};

/// `bsap embed`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Prints one line of JSON per input, texts first: kind, input, tokens of a text and what of it was not read (null:
nothing), embedding (of unit length).

Example:
  bsap embed --checkpoint clip-vit-base-patch32 --text 'a red mug' --image mug.jpg")]
pub struct EmbedArgs {
    /// Folder of the checkpoint, in the Hugging Face layout, or a model of the hub
    #[arg(long, value_name = "FOLDER|ID")]
    pub checkpoint: String,
    /// A text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub text: Vec<String>,
    /// File with one text per line, as a JSON string; `-` reads standard input
    #[arg(long, value_name = "FILE")]
    pub texts: Option<PathBuf>,
    /// An image file; may be repeated
    #[arg(long, value_name = "FILE")]
    pub image: Vec<PathBuf>,
    /// Write the square that the image encoder reads of each image into this folder, as PNG named
    /// by the position of the image among the arguments: 0.png, 1.png
    #[arg(long, value_name = "FOLDER")]
    pub pixels: Option<PathBuf>,
    /// Inputs per batch
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
    /// Device, precision and revision.
    #[command(flatten)]
    pub model: CheckpointArgs,
}

/// Prints one line of JSON per input.
pub fn run(args: &EmbedArgs) -> CommandResult {
    let mut texts = args.text.clone();
    if let Some(file) = &args.texts {
        texts.extend(read_texts(file)?);
    }
    if texts.is_empty() && args.image.is_empty() {
        return Err(CommandError::usage("nothing to embed: give --text, --texts or --image"));
    }
    let clip = ClipModel::load(&args.model.to_model_options(&args.checkpoint))?;
    for batch in texts.chunks(args.batch.into()) {
        let inputs: Vec<&str> = batch.iter().map(String::as_str).collect();
        for (text, embedding) in inputs.iter().zip(clip.embed_texts(&inputs)?) {
            let tokens = clip.tokenise(text)?;
            let unread = clip.find_unread(text).describe(clip.card());
            print_line!(
                "{}",
                json!({
                    "kind": "text", "input": text, "tokens": tokens, "unread": unread,
                    "embedding": embedding,
                })
            );
        }
    }
    if let Some(folder) = &args.pixels {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("--pixels: {}", folder.display()))?;
    }
    for (batch_number, files) in args.image.chunks(args.batch.into()).enumerate() {
        let pixels = files
            .iter()
            .map(|file| {
                load_pixels(&clip, file).with_context(|| format!("--image: {}", file.display()))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        if let Some(folder) = &args.pixels {
            for (i, pixels) in pixels.iter().enumerate() {
                let name = format!("{}.png", batch_number * usize::from(args.batch) + i);
                save_png(pixels, clip.card().image_side, &folder.join(name))?;
            }
        }
        for (file, embedding) in files.iter().zip(clip.embed_images(&pixels)?) {
            let input = file.to_string_lossy();
            print_line!("{}", json!({"kind": "image", "input": input, "embedding": embedding}));
        }
    }
    Ok(())
}

/// Reads a file with one JSON string per line.
fn read_texts(file: &Path) -> Result<Vec<String>, CommandError> {
    let name = file.display();
    let mut text = String::new();
    let read = if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|mut f| f.read_to_string(&mut text))
    };
    read.map_err(|e| CommandError::usage(format!("--texts: {name}: {e}")))?;
    let parse = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| {
            CommandError::usage(format!("--texts: {name}, line {}: not a JSON string: {e}", i + 1))
        })
    };
    text.lines().enumerate().map(parse).collect()
}

fn load_pixels(clip: &ClipModel, file: &Path) -> anyhow::Result<Pixels> {
    let picture = decode_image(&std::fs::read(file)?, &decode::DecodeOptions::default())?;
    Ok(clip.preprocess_image(&picture)?)
}

fn save_png(pixels: &Pixels, side: u32, file: &Path) -> anyhow::Result<()> {
    let square = RgbImage::from_raw(side, side, pixels.0.clone());
    let square = square.context("the pixels are not those of a square")?;
    let mut png = Vec::new();
    // Not `save`, which compiles the encoders of all formats.
    square.write_with_encoder(PngEncoder::new(&mut png))?;
    std::fs::write(file, png)?;
    Ok(())
}
