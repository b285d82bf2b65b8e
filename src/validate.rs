//! Checks of options that several modules share, so that equal problems have equal messages.

/// Adds a line to `problems` if the option `name` is not in `min..=max`.
pub fn check_range(problems: &mut Vec<String>, name: &str, value: u64, min: u64, max: u64) {
    if !(min..=max).contains(&value) {
        problems.push(format!("{name}: {value} is not between {min} and {max}"));
    }
}

/// Adds a line to `problems` if `topic`, the value of the option `name`, is not a valid Kafka topic
/// name.
pub fn check_topic_name(problems: &mut Vec<String>, name: &str, topic: &str) {
    let is_allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let is_reserved = [".", ".."].contains(&topic);
    if is_reserved || !(1..=249).contains(&topic.len()) || !topic.chars().all(is_allowed) {
        problems.push(format!(
            "{name}: {topic:?} is not a Kafka topic name (1 to 249 of a-z A-Z 0-9 . _ -)"
        ));
    }
}
