//! One pass over the codes of all images, shared by the waiting queries, and an exact ranking.
//!
//! Waiting queries are collected into batches (`batch_scanner`). A batch is scanned once, task by task
//! (`pass`, `task`), which bounds the score of every row (`bounds`, `top_scores`); the exact ranking
//! follows from these bounds (`rank`). `no_match` decides whether the best hit means anything.
//!
//! # From codes to an exact ranking
//!
//! Scoring every stored embedding exactly would read two bytes per dimension of every image. The scan
//! reads one, and gives the same answer:
//!
//! 1. Approximate scores. An integer dot product of the codes of a row with the quantised query gives
//!    an approximate raw score r̃. The exact score differs from it by at most the error bound b, which
//!    depends on the query and on one number stored with the row (proof: `snapshot::quantise`).
//! 2. Bounds. The balanced score is α·r + β, where α and β depend on the image but not on the query. It
//!    therefore lies within |α|·b of α·r̃ + β, plus a margin for rounding in f32. Every row now has a
//!    lower and an upper bound of its raw and of its balanced score, although its embedding has not
//!    been read.
//! 3. The k-th lower bound. If k rows have a lower bound of at least t, the k-th best exact score is
//!    at least t. Each task keeps its k largest lower bounds; tasks that run later start from the
//!    largest t found so far and ignore rows below it. Merging all tasks gives the final t.
//! 4. Candidates. A row with an upper bound below t cannot be among the best k. All other rows are
//!    candidates, usually few more than k. The pass also keeps the largest upper bound of each group
//!    of 64 rows, so that most groups are skipped as a whole.
//! 5. Rescoring. Each candidate is scored in f64 from its stored embedding, with a fixed order of
//!    additions so that every machine gets the same score. Sorted by this score, then by id, the first
//!    k candidates are the answer.
//! 6. Ranks. Every hit also gets its rank in the other ranking: one more than the number of rows above
//!    it. A row whose lower bound is above the score of the hit is counted, a row whose upper bound is
//!    below it is not, and only the few rows whose bounds enclose the score are rescored.
//!
//! `exactness_tests` compares thousands of random queries with a brute-force ranking in f64.

mod batch_scanner;
mod bounds;
mod exact_dot_product;
mod hit;
mod no_match;
mod pass;
mod rank;
mod request;
mod task;
mod top_scores;

pub(crate) use batch_scanner::{BatchScanner, ScanGoal, ScanReply};
pub(crate) use exact_dot_product::ExactDotProduct;
pub(crate) use hit::{TopK, report_raw_score, report_score};
pub(crate) use request::ScanRequest;
#[cfg(test)]
pub(crate) use {
    pass::scan_snapshot,
    rank::ExactRanker,
    task::{BACKGROUND_GROUP_STRIDE, split_into_tasks},
};

pub use hit::Hit;
pub use no_match::NoMatchVerdict;
