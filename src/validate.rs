//! What is wrong with options: the same words for the same fault.

/// Adds a line to `problems` where the option `name` is not between two limits, both allowed.
pub fn check_range(problems: &mut Vec<String>, name: &str, value: u64, min: u64, max: u64) {
    if !(min..=max).contains(&value) {
        problems.push(format!("{name}: {value} is not between {min} and {max}"));
    }
}

/// Adds a line to `problems` where `topic`, the value of the option `name`, is none that brokers take as
/// a topic's name.
pub fn check_topic_name(problems: &mut Vec<String>, name: &str, topic: &str) {
    let legal = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let special = [".", ".."].contains(&topic);
    if special || !(1..=249).contains(&topic.len()) || !topic.chars().all(legal) {
        problems.push(format!(
            "{name}: {topic:?} is not a Kafka topic name (1 to 249 of a-z A-Z 0-9 . _ -)"
        ));
    }
}
