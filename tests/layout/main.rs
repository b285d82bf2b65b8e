//! The layout stays in order: imports run one way, files and folders stay small, the two lists of
//! layers agree, and pages name only what exists.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod checks;
mod circles;
mod imports;
mod layers;
mod pages;
mod planted;
mod source_tree;

use std::path::Path;

use checks::Layout;

/// Cargo runs tests in the folder of the package.
fn layout_of_this_crate() -> Layout {
    Layout::read(Path::new("."))
}

#[track_caller]
fn assert_none(messages: &[String]) {
    assert!(messages.is_empty(), "\n{}\n", messages.join("\n"));
}

#[test]
fn architecture_page_and_lib_list_the_same_layers() {
    assert_none(&layout_of_this_crate().differing_lists());
}

#[test]
fn imports_run_to_earlier_layers_only() {
    assert_none(&layout_of_this_crate().upward_imports());
}

#[test]
fn imports_close_no_circle_of_files_or_folders() {
    assert_none(&layout_of_this_crate().circles());
}

#[test]
fn files_stay_short() {
    assert_none(&layout_of_this_crate().long_files());
}

#[test]
fn folders_stay_small() {
    assert_none(&layout_of_this_crate().crowded_folders());
}

#[test]
fn pages_name_files_and_functions_that_exist() {
    assert_none(&pages::outdated_references(Path::new(".")));
}
