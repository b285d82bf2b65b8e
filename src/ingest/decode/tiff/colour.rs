//! Colours of TIFF samples.

use super::super::pixels::{cmyk_to_rgb, onto_white, premultiplied_onto_white};
use super::layout::{Colours, Compression, Opacity, TiffLayout, Ycbcr, colour_samples};

/// Converts pixels of 8-bit samples to RGB on white.
pub struct Converter<'a> {
    layout: &'a TiffLayout<'a>,
    /// Where the sample of the opacity is.
    opacity_at: usize,
    ycbcr: Option<YcbcrTables>,
}

impl<'a> Converter<'a> {
    pub fn new(layout: &'a TiffLayout<'a>) -> Self {
        let ycbcr = match &layout.colours {
            // libjpeg-turbo has converted it already.
            Colours::Ycbcr(ycbcr) if layout.compression != Compression::Jpeg => {
                Some(YcbcrTables::new(ycbcr))
            }
            _ => None,
        };
        Self { layout, opacity_at: colour_samples(&layout.colours) as usize, ycbcr }
    }

    /// Converts one pixel.
    pub fn to_rgb(&self, pixel: &[u8]) -> [u8; 3] {
        let colour = match &self.layout.colours {
            Colours::WhiteIsZero => [255 - pixel[0]; 3],
            Colours::BlackIsZero => [pixel[0]; 3],
            Colours::Palette(palette) => palette[usize::from(pixel[0])],
            Colours::Cmyk => cmyk_to_rgb([pixel[0], pixel[1], pixel[2], pixel[3]]),
            Colours::Rgb | Colours::Ycbcr(_) => {
                let colour = [pixel[0], pixel[1], pixel[2]];
                self.ycbcr.as_ref().map_or(colour, |tables| tables.to_rgb(colour))
            }
        };
        match self.layout.opacity {
            Opacity::None => colour,
            Opacity::Separate => colour.map(|c| onto_white(c, pixel[self.opacity_at])),
            Opacity::Premultiplied => {
                colour.map(|c| premultiplied_onto_white(c, pixel[self.opacity_at]))
            }
        }
    }
}

/// Conversion of YCbCr by the coefficients and references of a file (TIFF 6, section 21).
struct YcbcrTables {
    brightness: Vec<f64>,
    blue: Vec<f64>,
    red: Vec<f64>,
    coefficients: [f64; 3],
}

impl YcbcrTables {
    fn new(ycbcr: &Ycbcr) -> Self {
        let [_, white, ..] = ycbcr.references;
        let table = |black: f64, white: f64, range: f64| -> Vec<f64> {
            let span = if white > black { white - black } else { 1.0 };
            (0..256).map(|code| (f64::from(code) - black) * range / span).collect()
        };
        let [y_black, _, cb_black, cb_white, cr_black, cr_white] = ycbcr.references;
        Self {
            brightness: table(y_black, white, 255.0),
            blue: table(cb_black, cb_white, 127.0),
            red: table(cr_black, cr_white, 127.0),
            coefficients: ycbcr.coefficients,
        }
    }

    fn to_rgb(&self, [y, cb, cr]: [u8; 3]) -> [u8; 3] {
        let [red_share, green_share, blue_share] = self.coefficients;
        let y = self.brightness[usize::from(y)];
        let r = self.red[usize::from(cr)] * (2.0 - 2.0 * red_share) + y;
        let b = self.blue[usize::from(cb)] * (2.0 - 2.0 * blue_share) + y;
        let g =
            if green_share > 0.0 { (y - blue_share * b - red_share * r) / green_share } else { y };
        [r, g, b].map(|c| (c + 0.5).clamp(0.0, 255.0) as u8)
    }
}
