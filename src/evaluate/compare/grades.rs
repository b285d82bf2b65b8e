//! TODO

use super::corpus::Corpus;
use crate::evaluate::judgements::{JudgedQuery, Judgements};

/// The right images of a query that are in the world.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageGrades {
    /// Place in [`World::pictures`] and grade, by place; 0 is judged wrong.
    pub grades: Vec<(u32, f64)>,
    /// Whether only these images are ranked.
    pub judged_only: bool,
}

impl ImageGrades {
    /// Grade of an image; 0 where it was not judged.
    pub fn grade(&self, image_position: u32) -> f64 {
        let found = self.grades.binary_search_by_key(&image_position, |(place, _)| *place);
        found.map_or(0.0, |i| self.grades[i].1)
    }

    /// Grades of the right images, largest first.
    pub fn ideal_grades(&self) -> Vec<f64> {
        let right = self.grades.iter().map(|(_, grade)| *grade).filter(|grade| *grade > 0.0);
        let mut ideal: Vec<f64> = right.collect();
        ideal.sort_unstable_by(|a, b| b.total_cmp(a));
        ideal
    }
}

/// Right images of a query that are in the world, and how many are not.
pub fn resolve_judgements(query: &JudgedQuery, corpus: &Corpus) -> (ImageGrades, usize) {
    let Judgements::Graded { grades, judged_only: condensed } = &query.judgements else {
        return (ImageGrades::default(), 0);
    };
    let found: Vec<(u32, f64)> = grades
        .iter()
        .filter_map(|(id, grade)| Some((corpus.image_position(id)?, *grade)))
        .collect();
    let missing = grades.len() - found.len();
    (ImageGrades { grades: found, judged_only: *condensed }, missing)
}
