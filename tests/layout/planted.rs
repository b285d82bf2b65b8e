//! The checks report exactly what is wrong with small crates that are written for them.

use std::path::Path;

use crate::checks::{Layout, MAX_ENTRIES_IN_SRC, MAX_FILES_PER_FOLDER, MAX_LINES_PER_FILE};
use crate::layers::RULE;
use crate::pages::outdated_references;

/// The layers of most planted crates.
const LAYERS: &str = "leaves: base\nwiring: app\n";

/// Writes a crate and reads its layout. Layers are given as ARCHITECTURE.md lists them and as
/// `src/lib.rs` does, files with their path below `src`.
fn plant(page: &str, lib: &str, files: &[(&str, &str)]) -> Layout {
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "ARCHITECTURE.md", &format!("{RULE}.\n\n```layers\n{page}```\n"));
    write(root.path(), "src/lib.rs", &list_in_lib(lib));
    for (path, text) in files {
        write(root.path(), &format!("src/{path}"), text);
    }
    Layout::read(root.path())
}

fn plant_files(files: &[(&str, &str)]) -> Layout {
    plant(LAYERS, LAYERS, files)
}

fn write(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Turns `leaves: base` into a heading and a commented module.
fn list_in_lib(layers: &str) -> String {
    let layer = |line: &str| {
        let (name, modules) = line.split_once(':').unwrap();
        let module = |module: &str| format!("// A comment.\npub mod {module};\n");
        let modules: Vec<String> = modules.split_whitespace().map(module).collect();
        format!("// # {name}: a heading.\n\n{}\n", modules.concat())
    };
    format!("//! {RULE}.\n\n{}", layers.lines().map(layer).collect::<Vec<_>>().concat())
}

/// A crate without a breach, with everything that is easily taken for one.
const SOUND: &[(&str, &str)] = &[
    (
        "base/mod.rs",
        "//! A façade.\nmod low;\nmod high;\npub use high::High;\npub use self::low::{Low as Lowest};\n",
    ),
    (
        "base/low.rs",
        "pub struct Low;\n#[cfg(test)]\nmod tests { use super::super::high::High; use crate::app; }\n",
    ),
    // A façade's re-export leads to `low.rs`, not into a circle with `mod.rs`.
    ("base/high.rs", "use super::Lowest;\npub struct High(Lowest);\n"),
    (
        "app/mod.rs",
        "mod run;\n#[cfg(test)]\nmod checks;\npub fn run() -> crate::base::High { run::run() }\n",
    ),
    (
        "app/run.rs",
        "use std::fmt;\nuse crate::base::{self, Lowest};\npub fn run() { base::High; fmt::Error; }\n",
    ),
    // Compiled for tests only, with the files below it.
    ("app/checks/mod.rs", "mod deep;\nuse super::run;\n"),
    ("app/checks/deep.rs", "use crate::app::run;\n"),
    ("main.rs", "fn main() { bsap::app::run() }\n"),
];

fn plant_sound_with(changes: &[(&str, &str)]) -> Layout {
    plant_files(&[SOUND, changes].concat())
}

#[track_caller]
fn assert_reports(layout: &Layout, upward: &[&str], circles: &[&str]) {
    assert_eq!(layout.upward_imports(), upward);
    assert_eq!(layout.circles(), circles);
}

#[test]
fn a_sound_crate_is_not_reported() {
    let layout = plant_sound_with(&[]);
    assert_reports(&layout, &[], &[]);
    for messages in [layout.differing_lists(), layout.long_files(), layout.crowded_folders()] {
        assert_eq!(messages, [""; 0]);
    }
}

#[test]
fn an_upward_import_is_reported() {
    let low = "pub struct Low;\npub fn low() { crate::app::stop() }\n";
    let layout = plant_files(&[
        ("base/mod.rs", "pub mod low;\n"),
        ("base/low.rs", low),
        ("app/mod.rs", "pub mod run;\npub use run::stop;\n"),
        ("app/run.rs", "pub fn stop() {}\n"),
    ]);
    let expected = "src/base/low.rs imports `crate::app::run::stop` from src/app/run.rs: \
                    `app` (wiring) is in a later layer than `base` (leaves)";
    assert_reports(&layout, &[expected], &[]);
}

#[test]
fn a_re_export_of_a_later_layer_is_an_upward_import() {
    let layout =
        plant_files(&[("base.rs", "pub use crate::app::Run;\n"), ("app.rs", "pub struct Run;\n")]);
    let expected = "src/base.rs imports `crate::app::Run` from src/app.rs: \
                    `app` (wiring) is in a later layer than `base` (leaves)";
    assert_reports(&layout, &[expected], &[]);
}

#[test]
fn a_circle_of_two_files_in_a_folder_is_reported() {
    let layout = plant_sound_with(&[(
        "base/low.rs",
        "use super::High;\npub struct Low(Option<Box<High>>);\n",
    )]);
    let expected = "src/base: high.rs, low.rs import each other in a circle\n    \
                    src/base/high.rs imports `crate::base::low::Low` from src/base/low.rs\n    \
                    src/base/low.rs imports `crate::base::high::High` from src/base/high.rs";
    assert_reports(&layout, &[], &[expected]);
}

#[test]
fn a_circle_of_a_file_and_what_its_mod_rs_defines_is_reported() {
    let layout = plant_sound_with(&[
        ("base/mod.rs", "mod low;\npub struct Error;\npub fn run() { low::run() }\n"),
        ("base/low.rs", "pub fn run() -> super::Error { super::Error }\n"),
        ("base/high.rs", ""),
        ("app/run.rs", ""),
    ]);
    let expected = "src/base: low.rs, mod.rs import each other in a circle\n    \
                    src/base/low.rs imports `crate::base::Error` from src/base/mod.rs\n    \
                    src/base/mod.rs imports `crate::base::low::run` from src/base/low.rs";
    assert_reports(&layout, &[], &[expected]);
}

#[test]
fn a_circle_of_two_folders_is_reported_although_their_files_form_none() {
    let layout = plant_files(&[
        ("base.rs", ""),
        ("app/mod.rs", "mod read;\nmod write;\n"),
        ("app/read/mod.rs", "pub mod one;\npub mod two;\n"),
        ("app/read/one.rs", "pub fn one() { crate::app::write::three::three() }\n"),
        ("app/read/two.rs", "pub fn two() {}\n"),
        ("app/write/mod.rs", "pub mod three;\npub mod four;\n"),
        ("app/write/three.rs", "pub fn three() {}\n"),
        ("app/write/four.rs", "use super::super::read::two;\npub fn four() { two::two() }\n"),
    ]);
    let expected = "src/app: read, write import each other in a circle\n    \
        src/app/read/one.rs imports `crate::app::write::three::three` from src/app/write/three.rs\n    \
        src/app/write/four.rs imports `crate::app::read::two` from src/app/read/two.rs\n    \
        src/app/write/four.rs imports `crate::app::read::two::two` from src/app/read/two.rs";
    assert_reports(&layout, &[], &[expected]);
}

#[test]
fn a_circle_of_top_level_modules_in_one_layer_is_reported() {
    let layers = "leaves: one two\n";
    let layout = plant(
        layers,
        layers,
        &[
            ("one.rs", "pub const A: u8 = crate::two::B;\n"),
            ("two.rs", "pub const B: u8 = crate::one::A;\n"),
        ],
    );
    let expected = "src: one.rs, two.rs import each other in a circle\n    \
                    src/one.rs imports `crate::two::B` from src/two.rs\n    \
                    src/two.rs imports `crate::one::A` from src/one.rs";
    assert_reports(&layout, &[], &[expected]);
}

#[test]
fn imports_are_found_in_macros_attributes_and_functions() {
    let places = [
        ("x!(a, [crate::app::Run]);", "crate::app::Run"),
        ("macro_rules! x { () => { $crate::app::Run } }", "crate::app::Run"),
        ("#[arg(default = crate::app::Run)] struct A;", "crate::app::Run"),
        ("fn a() { use crate::app::Run as R; }", "crate::app::Run"),
        ("fn a() -> Vec<super::app::Run> {}", "crate::app::Run"),
        ("mod inner { use super::super::app::*; }", "crate::app"),
        ("use crate::{app as other};", "crate::app"),
    ];
    for (text, item) in places {
        let layout = plant_files(&[("base.rs", text), ("app.rs", "pub struct Run;\n")]);
        let expected = format!(
            "src/base.rs imports `{item}` from src/app.rs: \
             `app` (wiring) is in a later layer than `base` (leaves)"
        );
        assert_reports(&layout, &[&expected], &[]);
    }
}

#[test]
fn a_file_is_too_long_only_outside_of_its_test_modules() {
    let line = "// line\n";
    let tests = format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "    // test\n".repeat(700));
    let half = line.repeat(MAX_LINES_PER_FILE / 2);
    let layout = plant_files(&[
        ("app/mod.rs", ""),
        ("app/tests_in_the_middle.rs", &[half.as_str(), &tests, &half].concat()),
        ("app/too_long.rs", &line.repeat(MAX_LINES_PER_FILE + 1)),
        ("app/too_long_after_tests.rs", &[half.as_str(), &tests, &half, line].concat()),
        ("base.rs", &line.repeat(MAX_LINES_PER_FILE)),
    ]);
    let message = |file: &str| {
        format!("src/app/{file} has 601 lines outside its test modules, more than 600")
    };
    assert_eq!(layout.long_files(), [message("too_long.rs"), message("too_long_after_tests.rs")]);
}

#[test]
fn a_crowded_folder_is_reported() {
    let in_folder: Vec<String> =
        (0..=MAX_FILES_PER_FOLDER).map(|i| format!("app/page/file{i}.js")).collect();
    // With base.rs, app, lib.rs one more than allowed.
    let in_src: Vec<String> =
        (0..MAX_ENTRIES_IN_SRC - 2).map(|i| format!("folder{i}/file.js")).collect();
    let mut files = vec![("base.rs", ""), ("app/mod.rs", "")];
    files.extend(in_folder.iter().chain(&in_src).map(|path| (path.as_str(), "")));
    let layout = plant_files(&files);
    assert_eq!(
        layout.crowded_folders(),
        ["src has 27 entries, more than 26", "src/app/page has 16 files, more than 15"]
    );
}

#[test]
fn lists_that_differ_are_reported() {
    let page = "leaves: one gone\nwiring: one\n";
    let messages =
        plant(page, "leaves: one two\n", &[("one.rs", ""), ("two.rs", "")]).differing_lists();
    assert!(messages[0].starts_with("ARCHITECTURE.md lists ["), "{}", messages[0]);
    assert_eq!(
        messages[1..],
        [
            "ARCHITECTURE.md lists `gone`, which src/ does not have",
            "ARCHITECTURE.md lists `one` 2 times",
            "ARCHITECTURE.md does not list `two`, which src/ has",
        ]
    );
}

#[test]
fn outdated_references_of_pages_are_reported() {
    let root = tempfile::tempdir().unwrap();
    write(root.path(), "src/table/writer.rs", "fn append() {}\nfn open<T>() {}\n");
    let page = "`table/writer.rs`: `Writer::append()`, `open()`, `app()`, `gone()`. `table/log.rs`\n\
                ```text\n`in/a/block.rs`\n```\n`src/table/writer.rs` `source.topic`\n";
    write(root.path(), "ARCHITECTURE.md", page);
    let glossary = "[a](../src/table) [b](../src/table/writer.rs) [c](../src/gone)\n";
    write(root.path(), "docs/glossary.md", glossary);
    assert_eq!(
        outdated_references(root.path()),
        [
            "ARCHITECTURE.md names `app()`, which table/writer.rs does not declare",
            "ARCHITECTURE.md names `gone()`, which table/writer.rs does not declare",
            "ARCHITECTURE.md names the file `table/log.rs`, which does not exist",
            "docs/glossary.md links to ../src/gone, which does not exist",
        ]
    );
}
