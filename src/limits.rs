//! What is wrong with options: the same words for the same fault.

/// Adds a line to `problems` where the option `name` is not between two limits, both allowed.
pub fn range(problems: &mut Vec<String>, name: &str, value: u64, low: u64, high: u64) {
    if !(low..=high).contains(&value) {
        problems.push(format!("{name}: {value} is not between {low} and {high}"));
    }
}
