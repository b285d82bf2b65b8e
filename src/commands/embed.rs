//! `bsap embed`.

use std::io::Read;
use std::path::Path;

use anyhow::Context;
use image::RgbImage;
use serde_json::json;

use super::cli::model::EmbedArgs;
use super::{CommandError, CommandResult};
use crate::clip::{ClipModel, Encoders, Pixels};
use crate::ingest::decode::{self, decode};

/// Prints embeddings, a JSON line an input.
pub fn run(args: &EmbedArgs) -> CommandResult {
    let mut texts = args.text.clone();
    if let Some(file) = &args.texts {
        texts.extend(read_texts(file)?);
    }
    if texts.is_empty() && args.image.is_empty() {
        return Err(CommandError::usage("nothing to embed: give --text, --texts or --image"));
    }
    let clip = ClipModel::load(&args.model.to_options(&args.checkpoint))?;
    for batch in texts.chunks(args.batch.into()) {
        let inputs: Vec<&str> = batch.iter().map(String::as_str).collect();
        for (text, embedding) in inputs.iter().zip(clip.embed_texts(&inputs)?) {
            let tokens = clip.tokenise(text)?;
            say!(
                "{}",
                json!({"kind": "text", "input": text, "tokens": tokens, "embedding": embedding})
            );
        }
    }
    if let Some(folder) = &args.pixels {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("--pixels: {}", folder.display()))?;
    }
    for (number, files) in args.image.chunks(args.batch.into()).enumerate() {
        let pixels = files
            .iter()
            .map(|file| {
                load_pixels(&clip, file).with_context(|| format!("--image: {}", file.display()))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        if let Some(folder) = &args.pixels {
            for (i, pixels) in pixels.iter().enumerate() {
                let name = format!("{}.png", number * usize::from(args.batch) + i);
                save_png(pixels, clip.card().image_side, &folder.join(name))?;
            }
        }
        for (file, embedding) in files.iter().zip(clip.embed_images(&pixels)?) {
            let input = file.to_string_lossy();
            say!("{}", json!({"kind": "image", "input": input, "embedding": embedding}));
        }
    }
    Ok(())
}

/// The JSON strings of a file.
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
    let picture = decode(&std::fs::read(file)?, &decode::DecodeOptions::default())?;
    Ok(clip.preprocess_image(&picture)?)
}

fn save_png(pixels: &Pixels, side: u32, file: &Path) -> anyhow::Result<()> {
    let square = RgbImage::from_raw(side, side, pixels.0.clone());
    square.context("the picture is no square")?.save(file)?;
    Ok(())
}
