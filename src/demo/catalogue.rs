//! The synthetic catalogue: what each picture shows, decided before it is drawn.
//!
//! A scene is generated from a seed and a number alone. Its attributes, its captions and the scenes
//! that match a query follow from the scene, so the ground truth of the catalogue is exact.

use std::collections::BTreeMap;

use rand::RngExt;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

/// Defines an enum whose variants have names, which are also their serialised form.
macro_rules! named_enum {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $text:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, clap::ValueEnum)]
        pub enum $name { $(#[doc = $text] #[serde(rename = $text)] #[value(name = $text)] $variant),* }
        impl $name {
            /// All variants.
            pub const ALL: &[Self] = &[$(Self::$variant),*];
            /// Returns the name in attributes and captions.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text),* }
            }
        }
    };
}

named_enum! {
    /// The kind of a product.
    ProductKind {
        Mug = "mug", Shoe = "shoe", Lamp = "lamp", Chair = "chair", Bag = "bag", Bottle = "bottle",
        Clock = "clock", Hat = "hat", Umbrella = "umbrella", Teapot = "teapot", Vase = "vase",
        Book = "book", Guitar = "guitar", Cushion = "cushion", Watch = "watch", Sofa = "sofa",
        Table = "table", Candle = "candle", Helmet = "helmet", Backpack = "backpack",
        TShirt = "t-shirt", Kite = "kite", Bicycle = "bicycle", Drum = "drum",
    }
}

named_enum! {
    /// The main colour of a product.
    Colour {
        Black = "black", White = "white", Grey = "grey", Red = "red", Orange = "orange",
        Yellow = "yellow", Green = "green", Blue = "blue", Purple = "purple", Pink = "pink",
        Brown = "brown",
    }
}

named_enum! {
    /// The pattern on a product's surface.
    Pattern {
        Plain = "plain", Striped = "striped", Dotted = "dotted", Checked = "checked",
        Zigzag = "zigzag", TwoTone = "two-tone",
    }
}

named_enum! {
    /// How the pictures of a catalogue are taken: before a plain background, in other light and
    /// slightly out of focus, or among other things.
    PhotoStyle {
        Studio = "studio", Shifted = "shifted", Clutter = "clutter",
    }
}

named_enum! {
    /// The background of a picture.
    Background {
        White = "white", Wood = "wood", Gradient = "gradient", Room = "room",
    }
}

impl ProductKind {
    /// Returns the plural of the name.
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
    /// The product's kind.
    pub kind: ProductKind,
    /// The product's main colour.
    pub colour: Colour,
    /// The pattern on the product's surface.
    pub pattern: Pattern,
    /// How often it is in the picture, 1 to 3 times.
    pub count: u8,
}

/// What one picture shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scene {
    /// Seed of everything that the other fields do not decide: positions, sizes, light, wording.
    pub seed: u64,
    /// How the picture is taken.
    pub style: PhotoStyle,
    /// The background of the products.
    pub background: Background,
    /// One product, or two of different kinds; their counts add up to at most three.
    pub products: Vec<Product>,
}

/// Returns a random generator for one purpose, so that, for example, captions do not depend on how
/// many random numbers the drawing takes.
pub fn seeded_rng(seed: u64, purpose: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(splitmix64(seed ^ splitmix64(purpose)))
}

/// Returns one step of splitmix64, which maps neighbouring numbers to unrelated ones.
fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Chooses one of `options` at random, or `default` if there are none.
fn choose_or<T: Copy>(rng: &mut ChaCha8Rng, options: &[T], default: T) -> T {
    options.choose(rng).copied().unwrap_or(default)
}

impl Scene {
    /// Generates the scene `number` of the catalogue with this seed.
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
        // Products must be visible before the background.
        while products.iter().any(|p| background.hides_colour(p.colour)) {
            background = choose_or(rng, Background::ALL, Background::Room);
        }
        Self { seed, style, background, products }
    }

    /// Returns the shortest complete description.
    pub fn title(&self) -> String {
        let descriptions: Vec<String> =
            self.products.iter().map(|p| p.describe(true, true)).collect();
        descriptions.join(" and ")
    }

    /// Returns descriptions in varied words, some without all attributes; always the same for a
    /// scene.
    pub fn captions(&self) -> Vec<String> {
        let rng = &mut seeded_rng(self.seed, 1);
        let mut captions = vec![self.title()];
        for _ in 0..7 {
            let phrases: Vec<String> =
                self.products.iter().map(|p| p.describe_randomly(rng)).collect();
            let joint = choose_or(rng, &[" and ", " next to ", " with ", " beside "], " and ");
            let products = phrases.join(joint);
            let location = match self.background {
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
            captions.push(frame.replace("{}", &products).replace('@', location));
        }
        captions.dedup();
        captions
    }

    /// Returns the attributes of the picture; kind, colour and pattern are those of the first
    /// product.
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

    /// Returns whether the picture shows a combination that is held out from training.
    pub fn is_held_out(&self) -> bool {
        self.products.iter().any(|p| is_held_out_combination(p.kind, p.colour, p.pattern))
    }
}

impl Background {
    /// Returns whether a product of this colour would hardly be visible before this background.
    fn hides_colour(self, colour: Colour) -> bool {
        matches!(
            (self, colour),
            (Self::White | Self::Gradient, Colour::White)
                | (Self::Wood, Colour::Brown | Colour::Orange)
        )
    }
}

/// Returns whether this combination is held out from training. About one in twelve is, the same
/// ones for all seeds, so that a model can be tested on combinations that it has never seen.
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

    /// Describes the product, with its colour and pattern if asked: "a red striped mug", "two
    /// mugs".
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
        with_article_or_number(self.count, &words.join(" "))
    }

    /// Describes the product in random words.
    fn describe_randomly(&self, rng: &mut ChaCha8Rng) -> String {
        match rng.random_range(0..10) {
            0 => self.describe(false, false),
            1 | 2 => self.describe(true, false),
            3 | 4 => self.describe(false, true),
            5 => {
                let kind = self.describe(false, false);
                let pattern = match self.pattern {
                    Pattern::Plain => "one plain colour",
                    Pattern::Striped => "stripes",
                    Pattern::Dotted => "dots",
                    Pattern::Checked => "a checked pattern",
                    Pattern::Zigzag => "a zigzag pattern",
                    Pattern::TwoTone => "two tones",
                };
                format!("{kind} in {} with {pattern}", self.colour.name())
            }
            _ => self.describe(true, true),
        }
    }
}

/// Prefixes `words` with an article or a number: "a red mug", "an orange mug", "two mugs".
pub fn with_article_or_number(count: u8, words: &str) -> String {
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
    fn a_scene_depends_on_seed_and_number_alone() {
        let scene = |n| Scene::sample(7, n, PhotoStyle::Studio);
        assert_eq!(scene(3), scene(3));
        assert_ne!(scene(3), scene(4));
        assert_ne!(scene(3), Scene::sample(8, 3, PhotoStyle::Studio));
        assert_eq!(scene(3).captions(), scene(3).captions());
    }

    #[test]
    fn all_kinds_colours_and_patterns_occur_and_every_product_is_visible() {
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
    fn products_are_described_with_article_or_number() {
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
