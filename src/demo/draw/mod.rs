//! Draws the picture of a scene.
//!
//! The scene is written as SVG and rendered by resvg, so that shapes stay readable in the source
//! and the same picture can be rendered at any size. Everything that the scene does not decide
//! comes from its seed.

mod backdrop;
mod products;
mod surface;

use std::fmt::Write as _;

use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use resvg::tiny_skia::{Pixmap, Transform};
use resvg::usvg;

use super::catalogue::{PhotoStyle, Product, Scene, seeded_rng};
use surface::ProductTones;

/// A picture could not be drawn, which is a bug of this program.
#[derive(Debug, thiserror::Error)]
#[error("a picture could not be drawn: {0}")]
pub struct DrawError(String);

/// Renders a scene as a JPEG of `side_px` × `side_px` pixels.
pub fn render_jpeg(scene: &Scene, side_px: u32) -> Result<Vec<u8>, DrawError> {
    let rng = &mut seeded_rng(scene.seed, 3);
    let svg = scene_svg(scene, rng);
    let tree = usvg::Tree::from_str(&svg, &usvg::Options::default())
        .map_err(|e| DrawError(e.to_string()))?;
    let mut pixmap = Pixmap::new(side_px, side_px)
        .ok_or_else(|| DrawError(format!("no picture has {side_px} pixels a side")))?;
    let scale = side_px as f32 / 100.0;
    resvg::render(&tree, Transform::from_scale(scale, scale), &mut pixmap.as_mut());
    let mut rgb: Vec<u8> = pixmap.data().chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    if scene.style == PhotoStyle::Shifted {
        add_grain(&mut rgb, rng);
    }
    let quality = rng.random_range(72..=92);
    let mut jpeg = Vec::new();
    let side = u16::try_from(side_px)
        .map_err(|_| DrawError(format!("{side_px} pixels a side are too many")))?;
    jpeg_encoder::Encoder::new(&mut jpeg, quality)
        .encode(&rgb, side, side, jpeg_encoder::ColorType::Rgb)
        .map_err(|e| DrawError(e.to_string()))?;
    Ok(jpeg)
}

/// Adds sensor noise.
fn add_grain(rgb: &mut [u8], rng: &mut ChaCha8Rng) {
    let strength = rng.random_range(3..14);
    for value in rgb {
        let noise = rng.random_range(-strength..=strength);
        *value = (i16::from(*value) + noise).clamp(0, 255) as u8;
    }
}

/// Centre and side length of one product, in hundredths of the picture's side.
#[derive(Clone, Copy)]
struct Placement {
    centre_x: f32,
    centre_y: f32,
    side: f32,
}

/// Returns random placements for `count` products that hardly overlap.
fn place_products(count: usize, rng: &mut ChaCha8Rng) -> Vec<Placement> {
    let (centres, sizes): (&[(f32, f32)], _) = match count {
        1 => (&[(50.0, 52.0)], 44.0..76.0),
        2 if rng.random_bool(0.7) => (&[(28.0, 54.0), (72.0, 54.0)], 34.0..46.0),
        2 => (&[(32.0, 33.0), (68.0, 69.0)], 34.0..46.0),
        _ if rng.random_bool(0.5) => (&[(20.0, 55.0), (50.0, 55.0), (80.0, 55.0)], 26.0..31.0),
        _ => (&[(30.0, 70.0), (70.0, 70.0), (50.0, 28.0)], 28.0..37.0),
    };
    let size: f32 = rng.random_range(sizes);
    let slack = if count == 1 { (90.0 - size) / 4.0 } else { 3.0 };
    let mut placements: Vec<Placement> = centres
        .iter()
        .map(|(x, y)| Placement {
            centre_x: x + rng.random_range(-slack..slack),
            centre_y: y + rng.random_range(-slack..slack),
            side: size * rng.random_range(0.92..1.08),
        })
        .collect();
    placements.shuffle(rng);
    placements
}

fn scene_svg(scene: &Scene, rng: &mut ChaCha8Rng) -> String {
    let mut body = backdrop::draw_backdrop(scene.background, rng);
    let cluttered = scene.style == PhotoStyle::Clutter;
    if cluttered {
        draw_clutter(&mut body, rng.random_range(3..6), 14.0..26.0, rng);
    }
    let products: Vec<&Product> =
        scene.products.iter().flat_map(|p| std::iter::repeat_n(p, usize::from(p.count))).collect();
    let mut last_tones: Option<(&Product, ProductTones)> = None;
    for (i, (product, mut placement)) in
        products.iter().zip(place_products(products.len(), rng)).enumerate()
    {
        if cluttered {
            placement.side *= 0.86;
        }
        // Equal products have equal tones, but each has its own pattern.
        let tones = match &mut last_tones {
            Some((known, tones)) if *known == *product => tones,
            other => &mut other.insert((product, ProductTones::sample(product.colour, rng))).1,
        };
        draw_product(&mut body, product, tones, placement, i, rng);
    }
    if cluttered {
        draw_clutter(&mut body, rng.random_range(0..3), 9.0..15.0, rng);
    }
    if scene.style == PhotoStyle::Shifted {
        body = shift_svg(&body, rng);
    } else {
        body.push_str(&light_svg(rng, 0.1));
    }
    format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100" width="100" height="100">{body}</svg>"#
    )
}

/// Draws one product with its shadow.
fn draw_product(
    svg: &mut String,
    product: &Product,
    tones: &ProductTones,
    placement: Placement,
    number: usize,
    rng: &mut ChaCha8Rng,
) {
    let shape = products::product_shape(product.kind);
    let (paint, shade, glow) = (format!("p{number}"), format!("s{number}"), format!("g{number}"));
    let fill_colours = |part: &str| {
        part.replace("@c", &tones.main.to_hex())
            .replace("@d", &tones.dark.to_hex())
            .replace("@l", &tones.light.to_hex())
            .replace("@m", "#4a5058")
            .replace("@k", "#a97c50")
            .replace("@w", "#f6f4ee")
    };
    let rotation: f32 = rng.random_range(-12.0..12.0);
    let flip = if rng.random_bool(0.5) { -1.0 } else { 1.0 };
    let scale = placement.side / 100.0;
    let (dark, bright) = (rng.random_range(0.18..0.34), rng.random_range(0.15..0.35));
    // Writing to a string cannot fail.
    let _ = write!(
        svg,
        r##"<defs>{paint_definition}
<linearGradient id="{shade}" gradientUnits="userSpaceOnUse" x1="8" y1="20" x2="92" y2="80"><stop offset=".45" stop-color="#101420" stop-opacity="0"/><stop offset="1" stop-color="#101420" stop-opacity="{dark}"/></linearGradient>
<radialGradient id="{glow}" gradientUnits="userSpaceOnUse" cx="32" cy="30" r="46"><stop offset="0" stop-color="#fff" stop-opacity="{bright}"/><stop offset="1" stop-color="#fff" stop-opacity="0"/></radialGradient>
<radialGradient id="d{number}"><stop offset=".2" stop-color="#0c0f18" stop-opacity=".4"/><stop offset="1" stop-color="#0c0f18" stop-opacity="0"/></radialGradient>
<g id="b{number}">{body}</g></defs>
<ellipse cx="{sx}" cy="{sy}" rx="{rx}" ry="{ry}" fill="url(#d{number})"/>
<g transform="translate({x} {y}) rotate({rotation}) scale({sx_scale} {scale}) translate(-50 -50)">{back}
<use href="#b{number}" fill="url(#{paint})" stroke="url(#{paint})" stroke-width="0"/>
<use href="#b{number}" fill="url(#{shade})" stroke="url(#{shade})" stroke-width="0"/>
<use href="#b{number}" fill="url(#{glow})" stroke="url(#{glow})" stroke-width="0"/>
{front}</g>"##,
        paint_definition = surface::paint_definition(&paint, product.pattern, tones, rng),
        body = shape.body_layer,
        back = fill_colours(shape.back_layer),
        front = fill_colours(shape.front_layer),
        x = placement.centre_x,
        y = placement.centre_y,
        sx_scale = scale * flip,
        sx = placement.centre_x + placement.side * 0.04,
        sy = placement.centre_y + placement.side * 0.46,
        rx = placement.side * 0.56,
        ry = placement.side * 0.11,
    );
}

/// Draws small things around the products.
fn draw_clutter(svg: &mut String, count: usize, sizes: std::ops::Range<f32>, rng: &mut ChaCha8Rng) {
    for _ in 0..count {
        let shape = products::CLUTTER_SHAPES.choose(rng).copied().unwrap_or_default();
        let scale = rng.random_range(sizes.clone()) / 100.0;
        let (x, y) = (rng.random_range(4.0..96.0), rng.random_range(8.0..96.0));
        let rotation: f32 = rng.random_range(0.0..360.0);
        // Writing to a string cannot fail.
        let _ = write!(
            svg,
            r#"<g transform="translate({x} {y}) rotate({rotation}) scale({scale}) translate(-50 -50)" opacity=".9">{shape}</g>"#
        );
    }
}

/// Returns an overlay of light from one side.
fn light_svg(rng: &mut ChaCha8Rng, strength: f32) -> String {
    let (x1, x2) = if rng.random_bool(0.5) { (0, 100) } else { (100, 0) };
    let strength = rng.random_range(0.0..strength);
    format!(
        r##"<defs><linearGradient id="li" gradientUnits="userSpaceOnUse" x1="{x1}" y1="0" x2="{x2}" y2="100"><stop offset="0" stop-color="#fff" stop-opacity="{strength}"/><stop offset="1" stop-color="#0a0d18" stop-opacity="{strength}"/></linearGradient></defs><rect width="100" height="100" fill="url(#li)"/>"##
    )
}

/// Returns the same picture in other light: with a colour cast, darker corners and slightly out of
/// focus.
fn shift_svg(body: &str, rng: &mut ChaCha8Rng) -> String {
    let cast =
        *["#ffd29a", "#a9c8ff", "#c9f0c4", "#8f8fa8", "#f3b7c6"].choose(rng).unwrap_or(&"#ffd29a");
    let amount: f32 = rng.random_range(0.35..0.85);
    let blur: f32 = rng.random_range(0.05..0.5);
    let vignette: f32 = rng.random_range(0.2..0.6);
    format!(
        r##"<defs><filter id="soft" x="0" y="0" width="1" height="1"><feGaussianBlur stdDeviation="{blur}"/></filter><radialGradient id="vi" cx="50%" cy="50%" r="75%"><stop offset=".5" stop-color="#000" stop-opacity="0"/><stop offset="1" stop-color="#000" stop-opacity="{vignette}"/></radialGradient></defs>
<g filter="url(#soft)">{body}</g><rect width="100" height="100" fill="{cast}" opacity="{amount}" style="mix-blend-mode:multiply"/><rect width="100" height="100" fill="url(#vi)"/>{}"##,
        light_svg(rng, 0.25)
    )
}
