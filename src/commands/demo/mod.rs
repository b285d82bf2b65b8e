//! `bsap demo`: the whole system on drawn pictures, in one process.

mod arguments;
mod evaluate;
mod folder;
mod live;
mod render;
mod score;

pub use arguments::{DemoAction, DemoArgs};

use super::shared::error::CommandResult;

/// Runs the demo, or draws or evaluates pictures without starting anything.
pub fn run(args: &DemoArgs) -> CommandResult {
    match &args.action {
        None => live::run(args),
        Some(DemoAction::Render(args)) => render::run(args),
        Some(DemoAction::Evaluate(args)) => evaluate::run(args),
    }
}
