//! Colours and surface patterns of products.

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

use crate::demo::catalogue::{Colour, Pattern};

/// Red, green, blue, each 0..=255.
#[derive(Debug, Clone, Copy)]
pub struct Rgb(pub [f32; 3]);

impl Rgb {
    /// Returns the colour as SVG writes it: `#rrggbb`.
    pub fn to_hex(self) -> String {
        let [r, g, b] = self.0.map(|v| v.round().clamp(0.0, 255.0) as u8);
        format!("#{r:02x}{g:02x}{b:02x}")
    }

    /// Returns the mixture with the given share (0 to 1) of `other`.
    pub fn mix_toward(self, other: Self, share: f32) -> Self {
        let mut mixed = self.0;
        for (value, target) in mixed.iter_mut().zip(other.0) {
            *value += (target - *value) * share;
        }
        Self(mixed)
    }
}

/// Black that still shows shadows.
pub const NEAR_BLACK: Rgb = Rgb([30.0, 32.0, 38.0]);
/// White that still shows highlights.
pub const NEAR_WHITE: Rgb = Rgb([250.0, 249.0, 245.0]);

fn base_colour(colour: Colour) -> Rgb {
    Rgb(match colour {
        Colour::Black => [38.0, 38.0, 43.0],
        Colour::White => [246.0, 246.0, 243.0],
        Colour::Grey => [140.0, 144.0, 150.0],
        Colour::Red => [207.0, 52.0, 48.0],
        Colour::Orange => [238.0, 136.0, 38.0],
        Colour::Yellow => [243.0, 205.0, 58.0],
        Colour::Green => [58.0, 150.0, 80.0],
        Colour::Blue => [46.0, 102.0, 200.0],
        Colour::Purple => [122.0, 72.0, 176.0],
        Colour::Pink => [243.0, 155.0, 188.0],
        Colour::Brown => [122.0, 77.0, 44.0],
    })
}

/// The tones of one product.
pub struct ProductTones {
    /// The product's colour.
    pub main: Rgb,
    /// A darker tone of the colour.
    pub dark: Rgb,
    /// A lighter tone of the colour.
    pub light: Rgb,
    /// The second colour of the pattern.
    pub pattern: Rgb,
}

impl ProductTones {
    /// Returns random tones of `colour`, which differ slightly between products.
    pub fn sample(colour: Colour, rng: &mut ChaCha8Rng) -> Self {
        let mut main = base_colour(colour);
        for value in &mut main.0 {
            *value += rng.random_range(-9.0..9.0);
        }
        let dark = main.mix_toward(NEAR_BLACK, if colour == Colour::White { 0.22 } else { 0.35 });
        let light = main.mix_toward(NEAR_WHITE, 0.45);
        let second = match colour {
            Colour::White => NEAR_BLACK.mix_toward(NEAR_WHITE, rng.random_range(0.15..0.45)),
            Colour::Yellow | Colour::Pink => {
                *[NEAR_WHITE, NEAR_BLACK.mix_toward(main, 0.3)].choose(rng).unwrap_or(&NEAR_WHITE)
            }
            Colour::Black | Colour::Brown => {
                main.mix_toward(NEAR_WHITE, rng.random_range(0.6..1.0))
            }
            _ => *[NEAR_WHITE, main.mix_toward(NEAR_WHITE, 0.6), main.mix_toward(NEAR_BLACK, 0.55)]
                .choose(rng)
                .unwrap_or(&NEAR_WHITE),
        };
        Self { main, dark, light, pattern: second }
    }
}

/// Returns the SVG definition of the paint `id` that covers a product's body. At most two fifths of
/// the surface have the second colour, so that the main colour dominates.
pub fn paint_definition(
    id: &str,
    pattern: Pattern,
    tones: &ProductTones,
    rng: &mut ChaCha8Rng,
) -> String {
    let (main, second) = (tones.main.to_hex(), tones.pattern.to_hex());
    let rotation = *[0.0, 90.0, 45.0, -45.0].choose(rng).unwrap_or(&0.0);
    let step: f32 = rng.random_range(11.0..17.0);
    let tile = |width: f32, height: f32, angle: f32, marks: String| {
        format!(
            r#"<pattern id="{id}" width="{width}" height="{height}" patternUnits="userSpaceOnUse" patternTransform="rotate({angle})"><rect width="{width}" height="{height}" fill="{main}"/>{marks}</pattern>"#
        )
    };
    match pattern {
        Pattern::Plain => tile(100.0, 100.0, 0.0, String::new()),
        Pattern::Striped => {
            let width = step * 0.38;
            tile(
                step,
                step,
                rotation,
                format!(r#"<rect width="{width}" height="{step}" fill="{second}"/>"#),
            )
        }
        Pattern::Dotted => {
            let (a, b, r) = (step * 0.25, step * 0.75, step * 0.19);
            let dots = format!(
                r#"<g fill="{second}"><circle cx="{a}" cy="{a}" r="{r}"/><circle cx="{b}" cy="{b}" r="{r}"/></g>"#
            );
            tile(step, step, 0.0, dots)
        }
        Pattern::Checked => {
            let half = step * 0.5;
            let angle = if rotation.abs() == 45.0 { 45.0 } else { 0.0 };
            let squares = format!(
                r#"<path d="M0 0h{half}v{half}h-{half}zM{half} {half}h{half}v{half}h-{half}z" fill="{second}"/>"#
            );
            tile(step, step, angle, squares)
        }
        Pattern::Zigzag => {
            let (half, line) = (step * 0.5, step * 0.24);
            let (top, low) = (step * 0.3, step * 0.8);
            let line = format!(
                r#"<path d="M-{half} {top}L0 {low}L{half} {top}L{step} {low}L{} {top}" fill="none" stroke="{second}" stroke-width="{line}"/>"#,
                step + half
            );
            tile(step, step * 1.1, if rotation.abs() == 45.0 { 0.0 } else { rotation }, line)
        }
        Pattern::TwoTone => {
            // Bodies are lower than their box, so the main colour covers the lower part or one
            // side.
            let (x2, y2, at) = if rng.random_bool(0.4) {
                (0, 100, rng.random_range(0.45..0.52))
            } else {
                (100, 0, rng.random_range(0.36..0.44))
            };
            format!(
                r#"<linearGradient id="{id}" gradientUnits="userSpaceOnUse" x1="0" y1="0" x2="{x2}" y2="{y2}"><stop offset="{at}" stop-color="{second}"/><stop offset="{at}" stop-color="{main}"/></linearGradient>"#
            )
        }
    }
}
