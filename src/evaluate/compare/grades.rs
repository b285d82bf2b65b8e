//! Judgements of a query, resolved against the images of a corpus.

use super::corpus::Corpus;
use crate::evaluate::judgements::{JudgedQuery, Judgements};

/// Grades of the judged images of a query that are in the corpus.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageGrades {
    /// Index into [`Corpus::images`] and grade, ordered by index; grade 0 is judged wrong.
    pub grades_by_position: Vec<(u32, f64)>,
    /// Whether only these images are ranked.
    pub judged_only: bool,
}

impl ImageGrades {
    /// Returns the grade of an image; 0 if it was not judged.
    pub fn grade_of(&self, image_position: u32) -> f64 {
        let index = self
            .grades_by_position
            .binary_search_by_key(&image_position, |(position, _)| *position);
        index.map_or(0.0, |i| self.grades_by_position[i].1)
    }

    /// Returns the grades of the relevant images, largest first.
    pub fn ideal_grades(&self) -> Vec<f64> {
        let above_zero =
            self.grades_by_position.iter().map(|(_, grade)| *grade).filter(|grade| *grade > 0.0);
        let mut ideal: Vec<f64> = above_zero.collect();
        ideal.sort_unstable_by(|a, b| b.total_cmp(a));
        ideal
    }
}

/// Returns the grades of the judged images that are in the corpus, and how many judged images are
/// not.
pub fn resolve_judgements(query: &JudgedQuery, corpus: &Corpus) -> (ImageGrades, usize) {
    let Judgements::Graded { grades, judged_only } = &query.judgements else {
        return (ImageGrades::default(), 0);
    };
    let in_corpus: Vec<(u32, f64)> = grades
        .iter()
        .filter_map(|(id, grade)| Some((corpus.image_position(id)?, *grade)))
        .collect();
    let missing = grades.len() - in_corpus.len();
    (ImageGrades { grades_by_position: in_corpus, judged_only: *judged_only }, missing)
}
