//! Finds circles in a graph.

use std::collections::{BTreeMap, BTreeSet};

/// Returns the groups of nodes in which each node reaches each other one.
pub fn find_circles<'a>(edges: &BTreeSet<(&'a str, &'a str)>) -> Vec<BTreeSet<&'a str>> {
    let sources: BTreeSet<&str> = edges.iter().map(|(from, _)| *from).collect();
    let reached: BTreeMap<&str, BTreeSet<&str>> =
        sources.iter().map(|node| (*node, reachable(edges, node))).collect();
    let mut circles = Vec::new();
    for (node, targets) in &reached {
        let circle: BTreeSet<&str> = targets
            .iter()
            .filter(|target| reached.get(*target).is_some_and(|back| back.contains(node)))
            .copied()
            .collect();
        // Every member finds the same circle: the first one reports it.
        if circle.len() > 1 && circle.first() == Some(node) {
            circles.push(circle);
        }
    }
    circles
}

/// Returns the nodes at the end of a path of at least one edge.
fn reachable<'a>(edges: &BTreeSet<(&'a str, &'a str)>, start: &str) -> BTreeSet<&'a str> {
    let mut reached = BTreeSet::new();
    let mut pending = vec![start];
    while let Some(node) = pending.pop() {
        for (_, to) in edges.iter().filter(|(from, _)| *from == node) {
            if reached.insert(*to) {
                pending.push(*to);
            }
        }
    }
    reached
}

#[test]
fn circles_are_found_and_paths_into_them_are_not() {
    let edges =
        [("in", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "out"), ("x", "y"), ("y", "x")];
    let found = find_circles(&edges.into_iter().collect());
    assert_eq!(found, [BTreeSet::from(["a", "b", "c"]), BTreeSet::from(["x", "y"])]);
}
