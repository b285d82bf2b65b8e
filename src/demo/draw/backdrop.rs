//! Draws the background of a picture.

use std::fmt::Write as _;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::surface::{NEAR_BLACK, NEAR_WHITE, Rgb};
use crate::demo::catalogue::Background;

/// Returns the background of a picture as SVG, in a view box of 100 × 100.
pub fn draw_backdrop(background: Background, rng: &mut ChaCha8Rng) -> String {
    match background {
        Background::White => draw_gradient(NEAR_WHITE, Rgb([226.0, 227.0, 230.0]), rng),
        Background::Gradient => {
            let hue = muted_colour(rng);
            draw_gradient(hue.mix_toward(NEAR_WHITE, 0.72), hue.mix_toward(NEAR_WHITE, 0.3), rng)
        }
        Background::Wood => draw_wood(rng),
        Background::Room => draw_room(rng),
    }
}

/// Returns a random colour that is less saturated than any product's.
fn muted_colour(rng: &mut ChaCha8Rng) -> Rgb {
    let mut random_value = || rng.random_range(120.0..200.0);
    Rgb([random_value(), random_value(), random_value()])
}

fn draw_gradient(inner: Rgb, outer: Rgb, rng: &mut ChaCha8Rng) -> String {
    let (cx, cy) = (rng.random_range(30..70), rng.random_range(25..60));
    format!(
        r##"<defs><radialGradient id="bg" cx="{cx}%" cy="{cy}%" r="85%"><stop offset="0" stop-color="{}"/><stop offset="1" stop-color="{}"/></radialGradient></defs><rect width="100" height="100" fill="url(#bg)"/>"##,
        inner.to_hex(),
        outer.to_hex()
    )
}

fn draw_wood(rng: &mut ChaCha8Rng) -> String {
    let wood = Rgb([186.0, 146.0, 104.0]).mix_toward(NEAR_WHITE, rng.random_range(0.0..0.4));
    let planks = rng.random_range(3..6);
    let height = 100.0 / planks as f32;
    let mut svg = String::new();
    for plank in 0..planks {
        let y = plank as f32 * height;
        let tone = wood.mix_toward(NEAR_BLACK, rng.random_range(0.0..0.1)).to_hex();
        // Writing to a string cannot fail.
        let _ =
            write!(svg, r#"<rect y="{y}" width="100" height="{}" fill="{tone}"/>"#, height + 0.5);
        let grain = wood.mix_toward(NEAR_BLACK, 0.22).to_hex();
        for _ in 0..4 {
            let at = y + rng.random_range(0.1..0.9) * height;
            let bend: f32 = rng.random_range(-3.0..3.0);
            let _ = write!(
                svg,
                r#"<path d="M0 {at}Q30 {} 60 {at}T100 {at}" fill="none" stroke="{grain}" stroke-width=".4" opacity=".6"/>"#,
                at + bend
            );
        }
        let _ = write!(svg, r#"<rect y="{y}" width="100" height=".7" fill="{grain}"/>"#);
    }
    svg
}

fn draw_room(rng: &mut ChaCha8Rng) -> String {
    let wall = muted_colour(rng).mix_toward(NEAR_WHITE, rng.random_range(0.25..0.6));
    let floor = muted_colour(rng).mix_toward(Rgb([150.0, 120.0, 92.0]), 0.6);
    let line: f32 = rng.random_range(58.0..72.0);
    format!(
        r#"<rect width="100" height="{line}" fill="{}"/><rect y="{line}" width="100" height="{}" fill="{}"/><rect y="{}" width="100" height="2.4" fill="{}"/>"#,
        wall.to_hex(),
        100.0 - line,
        floor.to_hex(),
        line - 2.4,
        wall.mix_toward(NEAR_WHITE, 0.7).to_hex()
    )
}
