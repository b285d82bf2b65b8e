//! The rules of the layout. Each returns one message per breach.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use crate::circles::find_circles;
use crate::imports::{Import, collect_imports};
use crate::layers::{self, Layers, layer_of};
use crate::source_tree::{Entries, SourceTree, count_lines_outside_tests};

/// Comments included, test modules not.
pub const MAX_LINES_PER_FILE: usize = 600;
/// More need folders of their own.
pub const MAX_FILES_PER_FOLDER: usize = 15;
/// Files and folders directly in `src`, so that its listing stays a map.
pub const MAX_ENTRIES_IN_SRC: usize = 26;

/// A crate whose layout is checked.
pub struct Layout {
    tree: SourceTree,
    imports: BTreeSet<Import>,
    /// From ARCHITECTURE.md.
    layers: Layers,
    /// From `src/lib.rs`.
    layers_in_lib: Layers,
}

impl Layout {
    /// Reads the crate in the folder `root`: `ARCHITECTURE.md` and `src/`.
    pub fn read(root: &Path) -> Self {
        let tree = SourceTree::read(&root.join("src"));
        Self {
            imports: collect_imports(&tree),
            tree,
            layers: layers::read_architecture(root),
            layers_in_lib: layers::read_lib(root),
        }
    }

    /// ARCHITECTURE.md and `src/lib.rs` list the same layers in the same order, and every module of
    /// `src/` is in exactly one of them.
    pub fn differing_lists(&self) -> Vec<String> {
        let mut messages = Vec::new();
        if self.layers != self.layers_in_lib {
            let (page, lib) = (&self.layers, &self.layers_in_lib);
            messages
                .push(format!("ARCHITECTURE.md lists {page:#?}\nbut src/lib.rs lists {lib:#?}"));
        }
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for module in self.layers.iter().flat_map(|layer| &layer.modules) {
            *counts.entry(module).or_default() += 1;
        }
        let existing = self.tree.top_modules();
        for (module, count) in &counts {
            if *count > 1 {
                messages.push(format!("ARCHITECTURE.md lists `{module}` {count} times"));
            }
            if !existing.contains(*module) {
                messages
                    .push(format!("ARCHITECTURE.md lists `{module}`, which src/ does not have"));
            }
        }
        for module in existing.iter().filter(|module| !counts.contains_key(module.as_str())) {
            messages.push(format!("ARCHITECTURE.md does not list `{module}`, which src/ has"));
        }
        messages
    }

    /// No module imports from a later layer.
    pub fn upward_imports(&self) -> Vec<String> {
        let mut messages = Vec::new();
        for import in &self.imports {
            let (importer, imported) = (top_module(&import.importer), top_module(&import.imported));
            let layer = |module| layer_of(&self.layers, module);
            let (Some(from), Some(to)) = (layer(importer), layer(imported)) else { continue };
            if to > from {
                let (from, to) = (&self.layers[from].name, &self.layers[to].name);
                messages.push(format!(
                    "{}: `{imported}` ({to}) is in a later layer than `{importer}` ({from})",
                    describe(import)
                ));
            }
        }
        messages
    }

    /// The files and folders of a folder do not import each other in a circle, in `src` and at any
    /// depth. A `mod.rs` is a file like any other, but for its re-exports.
    ///
    /// This covers circles of files in different folders: they are circles of the entries of the
    /// folder that contains them all.
    pub fn circles(&self) -> Vec<String> {
        self.tree.folders.keys().flat_map(|folder| self.circles_in(folder)).collect()
    }

    fn circles_in(&self, folder: &str) -> Vec<String> {
        let between: Vec<(&str, &str, &Import)> = self
            .imports
            .iter()
            .filter_map(|import| {
                let importer = entry_in(folder, &import.importer)?;
                let imported = entry_in(folder, &import.imported)?;
                (importer != imported).then_some((importer, imported, import))
            })
            .collect();
        let edges = between.iter().map(|(importer, imported, _)| (*importer, *imported)).collect();
        let message = |circle: BTreeSet<&str>| {
            let names: Vec<&str> = circle.iter().copied().collect();
            let folder = if folder.is_empty() { "src" } else { &format!("src/{folder}") };
            let mut lines =
                vec![format!("{folder}: {} import each other in a circle", names.join(", "))];
            for (importer, imported, import) in &between {
                if circle.contains(importer) && circle.contains(imported) {
                    lines.push(format!("    {}", describe(import)));
                }
            }
            lines.join("\n")
        };
        find_circles(&edges).into_iter().map(message).collect()
    }

    pub fn long_files(&self) -> Vec<String> {
        let mut messages = Vec::new();
        for file in &self.tree.files {
            let lines = count_lines_outside_tests(file);
            if lines > MAX_LINES_PER_FILE {
                messages.push(format!(
                    "src/{} has {lines} lines outside its test modules, more than \
                     {MAX_LINES_PER_FILE}",
                    file.path
                ));
            }
        }
        messages
    }

    pub fn crowded_folders(&self) -> Vec<String> {
        let mut messages = Vec::new();
        for (folder, Entries { files, folders }) in &self.tree.folders {
            if files.len() > MAX_FILES_PER_FOLDER {
                messages.push(format!(
                    "src/{folder} has {} files, more than {MAX_FILES_PER_FOLDER}",
                    files.len()
                ));
            }
            let entries = files.len() + folders.len();
            if folder.is_empty() && entries > MAX_ENTRIES_IN_SRC {
                messages.push(format!("src has {entries} entries, more than {MAX_ENTRIES_IN_SRC}"));
            }
        }
        messages
    }
}

fn describe(import: &Import) -> String {
    format!("src/{} imports `{}` from src/{}", import.importer, import.item, import.imported)
}

/// Returns `table` for `table/writer.rs` and `record` for `record.rs`.
fn top_module(file: &str) -> &str {
    entry_in("", file).unwrap_or(file).trim_end_matches(".rs")
}

/// Returns the name of the folder's file or folder that is or contains the file.
fn entry_in<'a>(folder: &str, file: &'a str) -> Option<&'a str> {
    let below = match folder {
        "" => file,
        _ => file.strip_prefix(folder)?.strip_prefix('/')?,
    };
    below.split('/').next()
}
