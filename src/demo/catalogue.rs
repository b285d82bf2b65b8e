//! The drawn catalogue: what is in each picture, said before a line of it is drawn.
//!
//! A scene is made from a seed and a number alone. Its attributes, its captions and the set of
//! scenes that match a query follow from the scene, so the truth about the catalogue is exact.

use std::collections::BTreeMap;

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
        pub enum $name { $(#[doc = $text] #[serde(rename = $text)] #[value(name = $text)] $variant),* }
        impl $name {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
            /// As it is written in attributes and captions.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

names! {
    /// What a product is.
    ProductKind {
        Mug = "mug", Shoe = "shoe", Lamp = "lamp", Chair = "chair", Bag = "bag", Bottle = "bottle",
        Clock = "clock", Hat = "hat", Umbrella = "umbrella", Teapot = "teapot", Vase = "vase",
        Book = "book", Guitar = "guitar", Cushion = "cushion", Watch = "watch", Sofa = "sofa",
        Table = "table", Candle = "candle", Helmet = "helmet", Backpack = "backpack",
        TShirt = "t-shirt", Kite = "kite", Bicycle = "bicycle", Drum = "drum",
    }
}

names! {
    /// Its main colour.
    Colour {
        Black = "black", White = "white", Grey = "grey", Red = "red", Orange = "orange",
        Yellow = "yellow", Green = "green", Blue = "blue", Purple = "purple", Pink = "pink",
        Brown = "brown",
    }
}

names! {
    /// What its surface shows.
    Pattern {
        Plain = "plain", Striped = "striped", Dotted = "dotted", Checked = "checked",
        Zigzag = "zigzag", TwoTone = "two-tone",
    }
}

names! {
    /// How pictures of a catalogue are taken.
    PhotoStyle {
        Studio = "studio", Shifted = "shifted", Clutter = "clutter",
    }
}

names! {
    /// What is behind the products.
    Background {
        White = "white", Wood = "wood", Gradient = "gradient", Room = "room",
    }
}

impl ProductKind {
    /// More than one of it.
    pub fn plural(self) -> String {
        match self {
            Self::Watch => "watches".into(),
            other => format!("{}s", other.name()),
        }
    }
}

/// One product, once or several times in a picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Product {
    /// What it is.
    pub kind: ProductKind,
    /// Its main colour.
    pub colour: Colour,
    /// What its surface shows.
    pub pattern: Pattern,
    /// How many equal ones: 1 to 3.
    pub count: u8,
}

/// One picture, before it is drawn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scene {
    /// Decides everything that is not said below: places, sizes, light, wording.
    pub seed: u64,
    /// How the picture is taken.
    pub style: PhotoStyle,
    /// What is behind the products.
    pub background: Background,
    /// One product, or two of different kinds; at most three things in all.
    pub products: Vec<Product>,
}

/// A generator for `purpose`, so that wording does not depend on how much the drawing draws.
pub fn seeded_rng(seed: u64, purpose: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(splitmix64(seed ^ splitmix64(purpose)))
}

/// The finaliser of splitmix64: neighbouring numbers become unrelated ones.
fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

fn choose_or<T: Copy>(rng: &mut ChaCha8Rng, all: &[T], default: T) -> T {
    all.choose(rng).copied().unwrap_or(default)
}

impl Scene {
    /// The scene `number` of the catalogue `seed`.
    pub fn sample(seed: u64, number: u64, style: PhotoStyle) -> Self {
        let seed = splitmix64(splitmix64(seed) ^ number);
        let rng = &mut seeded_rng(seed, 0);
        let mut products = vec![Product::sample(rng)];
        if rng.random_bool(0.3) {
            products[0].count = products[0].count.min(2);
            let mut second = Product::sample(rng);
            while second.kind == products[0].kind {
                second.kind = choose_or(rng, ProductKind::ALL, ProductKind::Mug);
            }
            second.count = 1;
            products.push(second);
        }
        let mut background = choose_or(rng, Background::ALL, Background::White);
        // A product must stand out from what is behind it.
        while products.iter().any(|p| background.hides_colour(p.colour)) {
            background = choose_or(rng, Background::ALL, Background::Room);
        }
        Self { seed, style, background, products }
    }

    /// The shortest full description.
    pub fn title(&self) -> String {
        let all: Vec<String> = self.products.iter().map(|p| p.describe(true, true)).collect();
        all.join(" and ")
    }

    /// Descriptions in varied words, not each with every attribute. The same scene gives the same.
    pub fn captions(&self) -> Vec<String> {
        let rng = &mut seeded_rng(self.seed, 1);
        let mut captions = vec![self.title()];
        for _ in 0..7 {
            let phrases: Vec<String> =
                self.products.iter().map(|p| p.describe_varied(rng)).collect();
            let joint = choose_or(rng, &[" and ", " next to ", " with ", " beside "], " and ");
            let things = phrases.join(joint);
            let place = match self.background {
                Background::White => " on a white background",
                Background::Wood => " on a wooden table",
                Background::Gradient => " on a soft background",
                Background::Room => " in a room",
            };
            let frames = [
                "{}",
                "{}",
                "a photo of {}",
                "a picture of {}",
                "product picture: {}",
                "{}@",
                "this is {}",
            ];
            let frame = choose_or(rng, &frames, "{}");
            captions.push(frame.replace("{}", &things).replace('@', place));
        }
        captions.dedup();
        captions
    }

    /// What a catalogue would say about the picture; kind, colour and pattern are those of the
    /// first product.
    pub fn attributes(&self) -> BTreeMap<String, String> {
        let mut attributes = BTreeMap::from([("title".to_owned(), self.title())]);
        if let Some(first) = self.products.first() {
            let count: u8 = self.products.iter().map(|p| p.count).sum();
            attributes.extend([
                ("kind".to_owned(), first.kind.name().to_owned()),
                ("colour".to_owned(), first.colour.name().to_owned()),
                ("pattern".to_owned(), first.pattern.name().to_owned()),
                ("count".to_owned(), count.to_string()),
            ]);
        }
        attributes
    }

    /// Whether training leaves this picture out: it shows a combination that is held out.
    pub fn is_held_out(&self) -> bool {
        self.products.iter().any(|p| is_held_out_combination(p.kind, p.colour, p.pattern))
    }
}

impl Background {
    /// Whether a product of this colour would be lost before it.
    fn hides_colour(self, colour: Colour) -> bool {
        matches!(
            (self, colour),
            (Self::White | Self::Gradient, Colour::White)
                | (Self::Wood, Colour::Brown | Colour::Orange)
        )
    }
}

/// Whether training leaves out this combination: about one in twelve, fixed for all seeds, so that
/// a model can be asked for what it has never seen together.
pub fn is_held_out_combination(kind: ProductKind, colour: Colour, pattern: Pattern) -> bool {
    let combination = (kind as u64 * 11 + colour as u64) * 6 + pattern as u64;
    splitmix64(combination).is_multiple_of(12)
}

impl Product {
    fn sample(rng: &mut ChaCha8Rng) -> Self {
        Self {
            kind: choose_or(rng, ProductKind::ALL, ProductKind::Mug),
            colour: choose_or(rng, Colour::ALL, Colour::Red),
            pattern: choose_or(rng, Pattern::ALL, Pattern::Plain),
            count: choose_or(rng, &[1, 1, 1, 1, 1, 2, 3], 1),
        }
    }

    /// "a red striped mug", "two mugs".
    pub fn describe(&self, colour: bool, pattern: bool) -> String {
        let mut words = Vec::new();
        if colour {
            words.push(self.colour.name());
        }
        if pattern {
            words.push(self.pattern.name());
        }
        let kind = if self.count == 1 { self.kind.name().to_owned() } else { self.kind.plural() };
        words.push(&kind);
        prefix_count(self.count, &words.join(" "))
    }

    fn describe_varied(&self, rng: &mut ChaCha8Rng) -> String {
        match rng.random_range(0..10) {
            0 => self.describe(false, false),
            1 | 2 => self.describe(true, false),
            3 | 4 => self.describe(false, true),
            5 => {
                let what = self.describe(false, false);
                let pattern = match self.pattern {
                    Pattern::Plain => "one plain colour",
                    Pattern::Striped => "stripes",
                    Pattern::Dotted => "dots",
                    Pattern::Checked => "a checked pattern",
                    Pattern::Zigzag => "a zigzag pattern",
                    Pattern::TwoTone => "two tones",
                };
                format!("{what} in {} with {pattern}", self.colour.name())
            }
            _ => self.describe(true, true),
        }
    }
}

/// `words` with an article or a number: "a red mug", "an orange mug", "two mugs".
pub fn prefix_count(count: u8, words: &str) -> String {
    let number = match count {
        1 if words.starts_with(['a', 'e', 'i', 'o', 'u']) => "an",
        1 => "a",
        2 => "two",
        _ => "three",
    };
    format!("{number} {words}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_scene_follows_from_seed_and_number() {
        let scene = |n| Scene::sample(7, n, PhotoStyle::Studio);
        assert_eq!(scene(3), scene(3));
        assert_ne!(scene(3), scene(4));
        assert_ne!(scene(3), Scene::sample(8, 3, PhotoStyle::Studio));
        assert_eq!(scene(3).captions(), scene(3).captions());
    }

    #[test]
    fn everything_occurs_and_nothing_is_hidden() {
        let scenes: Vec<Scene> =
            (0..2_000).map(|n| Scene::sample(1, n, PhotoStyle::Studio)).collect();
        let products: Vec<Product> = scenes.iter().flat_map(|s| s.products.clone()).collect();
        assert_eq!(products.iter().map(|p| p.kind).collect::<BTreeSet<_>>().len(), 24);
        assert_eq!(products.iter().map(|p| p.colour).collect::<BTreeSet<_>>().len(), 11);
        assert_eq!(products.iter().map(|p| p.pattern).collect::<BTreeSet<_>>().len(), 6);
        for scene in &scenes {
            assert!((1..=3).contains(&scene.products.iter().map(|p| p.count).sum::<u8>()));
            assert!(!scene.products.iter().any(|p| scene.background.hides_colour(p.colour)));
            assert!(scene.captions().iter().all(|c| c.is_ascii() && !c.contains(['{', '@'])));
        }
        let held_out = scenes.iter().filter(|s| s.is_held_out()).count();
        assert!((100..400).contains(&held_out), "{held_out}");
    }

    #[test]
    fn descriptions_of_products() {
        let product = Product {
            kind: ProductKind::Watch,
            colour: Colour::Orange,
            pattern: Pattern::Dotted,
            count: 1,
        };
        assert_eq!(product.describe(true, true), "an orange dotted watch");
        assert_eq!(Product { count: 2, ..product }.describe(false, true), "two dotted watches");
    }
}
