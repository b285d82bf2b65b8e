//! Queries on the synthetic catalogue whose right answers are known exactly.

use std::collections::HashSet;

use rand::RngExt;
use rand::seq::{IndexedRandom, SliceRandom};
use serde::{Deserialize, Serialize};

use super::catalogue::{
    Colour, Pattern, Product, ProductKind, Scene, is_held_out_combination, seeded_rng,
    with_article_or_number,
};

/// The attributes that a product must have; `None` allows any value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProductCondition {
    /// The required kind.
    pub kind: Option<ProductKind>,
    /// The required main colour.
    pub colour: Option<Colour>,
    /// The required pattern.
    pub pattern: Option<Pattern>,
    /// The required count.
    pub count: Option<u8>,
}

impl ProductCondition {
    fn matches(&self, product: &Product) -> bool {
        self.kind.is_none_or(|kind| kind == product.kind)
            && self.colour.is_none_or(|colour| colour == product.colour)
            && self.pattern.is_none_or(|pattern| pattern == product.pattern)
            && self.count.is_none_or(|count| count == product.count)
    }

    /// Parses a description of [`Self::describe`]; `None` for any other text.
    fn parse(text: &str) -> Option<Self> {
        let (number, words) = text.split_once(' ')?;
        let count = match number {
            "two" => Some(2),
            "three" => Some(3),
            _ => None,
        };
        let mut condition = Self { count, ..Self::default() };
        for word in words.split(' ') {
            let kind = |kind: &&ProductKind| kind.name() == word || kind.plural() == word;
            let pattern = |pattern: &&Pattern| pattern.name() == word;
            let colour = |colour: &&Colour| colour.name() == word;
            condition.kind = condition.kind.or(ProductKind::ALL.iter().find(kind).copied());
            condition.pattern = condition.pattern.or(Pattern::ALL.iter().find(pattern).copied());
            condition.colour = condition.colour.or(Colour::ALL.iter().find(colour).copied());
        }
        Some(condition).filter(|condition| condition.describe() == text)
    }

    fn as_product(&self) -> Option<Product> {
        let Self { kind, colour, pattern, count } = *self;
        Some(Product { kind: kind?, colour: colour?, pattern: pattern?, count: count.unwrap_or(1) })
    }

    /// Describes the condition: "a red striped mug", "something dotted", "three green candles".
    fn describe(&self) -> String {
        let mut words: Vec<&str> = Vec::new();
        words.extend(self.colour.map(Colour::name));
        words.extend(self.pattern.map(Pattern::name));
        let count = self.count.unwrap_or(1);
        let Some(kind) = self.kind else {
            return if words.len() == 1 {
                format!("something {}", words[0])
            } else {
                with_article_or_number(1, &format!("{} product", words.join(" ")))
            };
        };
        let kind = if count == 1 { kind.name().to_owned() } else { kind.plural() };
        words.push(&kind);
        with_article_or_number(count, &words.join(" "))
    }
}

/// How many attributes a query requires.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueryDifficulty {
    /// One attribute.
    One,
    /// Two attributes.
    Two,
    /// Kind, colour and pattern.
    Three,
    /// Kind, colour and count.
    Count,
    /// Two products in one picture.
    Pair,
}

impl QueryDifficulty {
    /// All difficulties, from easy to hard.
    pub const ALL: [Self; 5] = [Self::One, Self::Two, Self::Three, Self::Count, Self::Pair];

    /// Returns the name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Two => "two",
            Self::Three => "three",
            Self::Count => "count",
            Self::Pair => "pair",
        }
    }
}

/// A query with the conditions that a matching picture meets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttributeQuery {
    /// The text that a user types.
    pub text: String,
    /// How many attributes it requires.
    pub difficulty: QueryDifficulty,
    /// One or two conditions, each to be met by a different product of the picture.
    pub conditions: Vec<ProductCondition>,
}

impl AttributeQuery {
    fn new(conditions: Vec<ProductCondition>, joint: &str, difficulty: QueryDifficulty) -> Self {
        let words: Vec<String> = conditions.iter().map(ProductCondition::describe).collect();
        Self { text: words.join(joint), difficulty, conditions }
    }

    /// Returns whether it requires a combination that is held out from training.
    pub fn is_held_out(&self) -> bool {
        self.conditions.iter().any(|c| match (c.kind, c.colour, c.pattern) {
            (Some(kind), Some(colour), Some(pattern)) => {
                is_held_out_combination(kind, colour, pattern)
            }
            _ => false,
        })
    }

    /// Parses a text as [`generate_queries`] writes them; `None` for any other text, whose right answers
    /// are not known.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_lowercase();
        let joint = [" next to ", " and "].into_iter().find(|joint| text.contains(joint));
        let parts = match joint {
            Some(joint) => text.split(joint).collect(),
            None => vec![text.as_str()],
        };
        let conditions =
            parts.into_iter().map(ProductCondition::parse).collect::<Option<Vec<_>>>()?;
        let difficulty = match conditions.as_slice() {
            [_, _] => QueryDifficulty::Pair,
            [ProductCondition { count: Some(_), .. }] => QueryDifficulty::Count,
            [one] => {
                let attributes = [one.kind.is_some(), one.colour.is_some(), one.pattern.is_some()];
                match attributes.into_iter().filter(|is_required| *is_required).count() {
                    1 => QueryDifficulty::One,
                    2 => QueryDifficulty::Two,
                    _ => QueryDifficulty::Three,
                }
            }
            _ => return None,
        };
        Some(Self { text, difficulty, conditions })
    }

    /// Returns whether the scene is a right answer.
    pub fn matches(&self, scene: &Scene) -> bool {
        self.matches_products(&scene.products)
    }

    /// Returns whether a picture of these products is a right answer.
    pub fn matches_products(&self, products: &[Product]) -> bool {
        match self.conditions.as_slice() {
            [one] => products.iter().any(|p| one.matches(p)),
            [one, other] => products.iter().enumerate().any(|(i, p)| {
                one.matches(p)
                    && products.iter().enumerate().any(|(j, q)| i != j && other.matches(q))
            }),
            _ => false,
        }
    }
}

/// Returns the products that a title names, as [`Scene::title`] writes it; `None` for any other text.
pub fn parse_title(title: &str) -> Option<Vec<Product>> {
    title.split(" and ").map(|part| ProductCondition::parse(part)?.as_product()).collect()
}

/// Generates distinct queries, up to `per_difficulty` of each difficulty; the same seed gives the
/// same queries.
pub fn generate_queries(seed: u64, per_difficulty: usize) -> Vec<AttributeQuery> {
    let rng = &mut seeded_rng(seed, 2);
    let mut seen = HashSet::new();
    let mut queries = Vec::new();
    for difficulty in QueryDifficulty::ALL {
        let mut generated = 0;
        // The attempts are limited because there are only 41 different queries of one attribute.
        for _ in 0..per_difficulty * 50 {
            if generated == per_difficulty {
                break;
            }
            let mut random_condition = || ProductCondition {
                kind: ProductKind::ALL.choose(rng).copied(),
                colour: Colour::ALL.choose(rng).copied(),
                pattern: Pattern::ALL.choose(rng).copied(),
                count: [2, 3].choose(rng).copied(),
            };
            let (full, second) = (random_condition(), random_condition());
            let conditions = match difficulty {
                QueryDifficulty::One => vec![keep_attributes(full, 1 << rng.random_range(0..3))],
                QueryDifficulty::Two => {
                    vec![keep_attributes(full, 7 ^ (1 << rng.random_range(0..3)))]
                }
                QueryDifficulty::Three => vec![keep_attributes(full, 7)],
                QueryDifficulty::Count => vec![keep_attributes(full, 11)],
                QueryDifficulty::Pair if full.kind == second.kind => continue,
                QueryDifficulty::Pair => {
                    let kept = if rng.random_bool(0.5) { 1 } else { 3 };
                    vec![keep_attributes(full, kept), keep_attributes(second, kept)]
                }
            };
            let joint = if rng.random_bool(0.5) { " and " } else { " next to " };
            let query = AttributeQuery::new(conditions, joint, difficulty);
            if seen.insert(query.text.clone()) {
                queries.push(query);
                generated += 1;
            }
        }
    }
    queries
}

/// Generates one query for every combination of kind, colour and pattern that is held out from
/// training, and the same number for combinations that are not.
pub fn generate_combination_queries(seed: u64) -> Vec<AttributeQuery> {
    let kinds = ProductKind::ALL.iter().copied();
    let surfaces = Colour::ALL.iter().flat_map(|c| Pattern::ALL.iter().map(move |p| (*c, *p)));
    let (unseen, mut seen): (Vec<_>, Vec<_>) = kinds
        .flat_map(|kind| {
            surfaces.clone().map(move |(colour, pattern)| {
                let condition = ProductCondition {
                    kind: Some(kind),
                    colour: Some(colour),
                    pattern: Some(pattern),
                    count: None,
                };
                AttributeQuery::new(vec![condition], "", QueryDifficulty::Three)
            })
        })
        .partition(AttributeQuery::is_held_out);
    seen.shuffle(&mut seeded_rng(seed, 3));
    seen.truncate(unseen.len());
    [unseen, seen].concat()
}

/// Returns `full` with only the attributes whose bit is set: 1 kind, 2 colour, 4 pattern, 8 count.
fn keep_attributes(full: ProductCondition, bits: u8) -> ProductCondition {
    ProductCondition {
        kind: full.kind.filter(|_| bits & 1 != 0),
        colour: full.colour.filter(|_| bits & 2 != 0),
        pattern: full.pattern.filter(|_| bits & 4 != 0),
        count: full.count.filter(|_| bits & 8 != 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::catalogue::{Background, PhotoStyle};

    #[test]
    fn a_query_matches_scenes_that_its_text_describes() {
        let mug = Product {
            kind: ProductKind::Mug,
            colour: Colour::Red,
            pattern: Pattern::Striped,
            count: 2,
        };
        let hat = Product {
            kind: ProductKind::Hat,
            colour: Colour::Blue,
            pattern: Pattern::Plain,
            count: 1,
        };
        let scene = Scene {
            seed: 0,
            style: PhotoStyle::Studio,
            background: Background::Wood,
            products: vec![mug, hat],
        };
        let all = generate_queries(3, 2_000);
        let hits = |text: &str| {
            let query = all.iter().find(|q| q.text == text);
            query.unwrap_or_else(|| panic!("no query {text:?}")).matches(&scene)
        };
        for right in [
            "a mug",
            "something blue",
            "a red mug",
            "a striped mug",
            "a red striped mug",
            "two red mugs",
            "a mug and a hat",
        ] {
            assert!(hits(right), "{right}");
        }
        for wrong in
            ["a chair", "something dotted", "a blue mug", "three red mugs", "a mug and a chair"]
        {
            assert!(!hits(wrong), "{wrong}");
        }
    }

    #[test]
    fn texts_are_parsed_to_what_they_were_written_from_and_others_are_not() {
        let mut queries = generate_queries(5, 300);
        queries.extend(generate_combination_queries(5));
        for query in queries {
            assert_eq!(AttributeQuery::parse(&query.text).as_ref(), Some(&query));
        }
        for number in 0..2_000 {
            let scene = Scene::sample(3, number, PhotoStyle::Studio);
            assert_eq!(parse_title(&scene.title()), Some(scene.products.clone()));
        }
        for example in crate::demo::EXAMPLE_QUERIES {
            assert!(AttributeQuery::parse(example).is_some(), "{example}");
        }
        assert_eq!(AttributeQuery::parse(" A Red mug "), AttributeQuery::parse("a red mug"));
        for other in
            ["", "mug", "a mug on a table", "an red mug", "two mug", "a mug and a hat and a bag"]
        {
            assert_eq!(AttributeQuery::parse(other), None, "{other}");
        }
        assert_eq!(parse_title("a red mug"), None, "the pattern is missing");
    }

    #[test]
    fn queries_are_distinct_and_depend_on_the_seed_alone() {
        let all = generate_queries(1, 100);
        assert_eq!(all, generate_queries(1, 100));
        assert_eq!(all.len(), 41 + 4 * 100);
        let texts: HashSet<_> = all.iter().map(|q| &q.text).collect();
        assert_eq!(texts.len(), all.len());
    }

    #[test]
    fn half_of_the_combinations_are_held_out() {
        let all = generate_combination_queries(1);
        let unseen = all.iter().filter(|q| q.is_held_out()).count();
        assert_eq!(unseen * 2, all.len());
        assert!((100..170).contains(&unseen), "{unseen}");
        assert_eq!(all.iter().map(|q| &q.text).collect::<HashSet<_>>().len(), all.len());
    }
}
