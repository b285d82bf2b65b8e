//! A drawn catalogue to evaluate on: what is in each picture is known, so is every right answer.

use std::sync::Arc;

use super::bar;
use super::cli::evaluate::EvaluateArgs;
use crate::balance::normalise::Normaliser;
use crate::catalogue::Serving;
use crate::clip::{Clip, Options, Towers};
use crate::demo::catalogue::{Scene, Style};
use crate::demo::judge::Drawn;
use crate::demo::queries::queries;
use crate::demo::write_model;
use crate::evaluate::{Asked, Rows, World};
use crate::prompts::{EmbeddedSet, PromptSet};

/// Side of the drawn pictures in pixels, as in the demo.
const SIDE: u32 = 256;
/// The model's folder gives it its name.
const MODEL: &str = "demo-clip";
/// k of `nnn`, as by default.
pub const TOP_K: usize = 8;

/// A drawn catalogue.
pub struct DrawnCatalogue {
    towers: Arc<dyn Towers>,
    drawn: Drawn,
    style: Style,
    seed: u64,
    per_difficulty: usize,
    sets: Vec<Arc<EmbeddedSet>>,
}

/// The demo's model, or another checkpoint.
pub fn model(checkpoint: Option<&str>) -> anyhow::Result<Clip> {
    let scratch = std::env::temp_dir().join(format!("bsap-evaluate-{}", std::process::id()));
    let checkpoint = if let Some(checkpoint) = checkpoint {
        checkpoint.to_owned()
    } else {
        let folder = scratch.join(MODEL);
        write_model(&folder)?;
        folder.display().to_string()
    };
    let clip = Clip::load(&Options { checkpoint, ..Options::default() });
    // Only what this made itself; where there is nothing, nothing is left to do.
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(clip?)
}

/// Draws and embeds what the arguments ask for. Computes: blocks for long.
pub fn draw(args: &EvaluateArgs) -> anyhow::Result<DrawnCatalogue> {
    let drawing = &args.drawing;
    let style = args.drawn.unwrap_or(Style::Studio);
    let towers: Arc<dyn Towers> = Arc::new(model(drawing.checkpoint.as_deref())?);
    let bar = bar(style.name(), drawing.count)?;
    let on_embedded = |n| bar.inc(n);
    let drawn = Drawn::draw(&*towers, style, drawing.seed, drawing.count, SIDE, on_embedded)?;
    bar.finish_and_clear();
    let embed = |name: &str| PromptSet::load(name)?.embed(&*towers, TOP_K).map(Arc::new);
    let sets = ["demo", "photographs"].into_iter().map(embed).collect::<Result<Vec<_>, _>>()?;
    let (seed, per_difficulty) = (drawing.seed, drawing.per_difficulty);
    Ok(DrawnCatalogue { towers, drawn, style, seed, per_difficulty, sets })
}

impl DrawnCatalogue {
    /// What the catalogue and its queries are called in a report.
    pub fn names(&self) -> (String, String) {
        let count = self.drawn.scenes().len();
        let catalogue =
            format!("{count} drawn pictures ({}, seed {})", self.style.name(), self.seed);
        (catalogue, "what is in the drawn pictures".to_owned())
    }

    /// What must be known to read the figures.
    pub fn notes() -> Vec<String> {
        vec!["Drawn pictures and the words that describe them are few; a drawn catalogue must not decide for photographs.".to_owned()]
    }

    /// The queries, with what matches them.
    pub fn asked(&self) -> Vec<Asked> {
        self.drawn.asked(&queries(self.seed, self.per_difficulty))
    }

    /// What is in each picture.
    pub fn scenes(&self) -> &[Scene] {
        self.drawn.scenes()
    }

    /// The pictures in memory.
    pub fn world(&self) -> World {
        let images = self.drawn.images();
        World::of(vec![Rows::of("live", "drawn", 0, self.towers.clone(), images)])
    }

    /// The demo's prompt sets.
    pub fn sets(&self) -> &[Arc<EmbeddedSet>] {
        &self.sets
    }

    /// What the demo serves.
    pub fn serving(&self) -> Serving {
        Serving::new(self.sets[0].key.clone(), Normaliser::Nnn, 0.25)
    }
}
