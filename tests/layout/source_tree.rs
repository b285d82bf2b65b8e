//! Reads a folder `src`: its files, their modules, and which of them are tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::{Attribute, Item, ItemMod, Meta, Token};

/// A module's path below the crate, e.g. `["table", "writer"]`; empty for `lib.rs` and `main.rs`.
pub type ModulePath = Vec<String>;

/// A Rust file below `src`.
pub struct SourceFile {
    /// Relative to `src`, e.g. `table/writer.rs`.
    pub path: String,
    pub module: ModulePath,
    pub text: String,
    pub syntax: syn::File,
}

/// What a folder `src` contains.
pub struct SourceTree {
    /// In the order of their paths.
    pub files: Vec<SourceFile>,
    /// Names of the files and folders in each folder, which is relative to `src` (`src` itself: "").
    pub folders: BTreeMap<String, Entries>,
    /// Modules that are declared under `#[cfg(test)]`, inline or as a file.
    test_modules: BTreeSet<ModulePath>,
}

/// What lies directly in a folder.
#[derive(Default)]
pub struct Entries {
    pub files: BTreeSet<String>,
    pub folders: BTreeSet<String>,
}

impl SourceTree {
    /// Reads every file below `src`.
    pub fn read(src: &Path) -> Self {
        let mut tree =
            Self { files: Vec::new(), folders: BTreeMap::new(), test_modules: BTreeSet::new() };
        tree.read_folder(src, "");
        tree.files.sort_by(|a, b| a.path.cmp(&b.path));
        for file in &tree.files {
            collect_test_modules(&file.syntax.items, &file.module, &mut tree.test_modules);
        }
        tree
    }

    fn read_folder(&mut self, src: &Path, folder: &str) {
        let mut entries = Entries::default();
        for entry in std::fs::read_dir(src.join(folder)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = if folder.is_empty() { name.clone() } else { format!("{folder}/{name}") };
            if entry.path().is_dir() {
                entries.folders.insert(name);
                self.read_folder(src, &path);
                continue;
            }
            entries.files.insert(name);
            if entry.path().extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(entry.path()).unwrap();
                let syntax = syn::parse_file(&text).unwrap_or_else(|e| panic!("{path}: {e}"));
                self.files.push(SourceFile { module: module_path(&path), path, text, syntax });
            }
        }
        self.folders.insert(folder.to_owned(), entries);
    }

    /// Returns whether the file belongs to a module that only tests compile.
    pub fn is_test(&self, file: &SourceFile) -> bool {
        (1..=file.module.len()).any(|depth| self.test_modules.contains(&file.module[..depth]))
    }

    /// Returns the names of the modules directly in `src`.
    pub fn top_modules(&self) -> BTreeSet<String> {
        self.files.iter().filter_map(|file| file.module.first().cloned()).collect()
    }
}

/// Returns the module of a file: `["table"]` for `table/mod.rs` and for `table.rs`.
fn module_path(path: &str) -> ModulePath {
    let mut module: ModulePath =
        path.trim_end_matches(".rs").split('/').map(str::to_owned).collect();
    let is_root = module.len() == 1 && matches!(module[0].as_str(), "lib" | "main");
    if is_root || module.last().is_some_and(|name| name == "mod") {
        module.pop();
    }
    module
}

fn collect_test_modules(items: &[Item], parent: &[String], found: &mut BTreeSet<ModulePath>) {
    for item in items {
        let Item::Mod(declared) = item else { continue };
        let module = [parent, &[declared.ident.to_string()]].concat();
        if is_test_module(declared) {
            found.insert(module);
        } else if let Some((_, items)) = &declared.content {
            collect_test_modules(items, &module, found);
        }
    }
}

/// Returns whether the module is under `#[cfg(test)]` or `#[cfg(all(test, …))]`.
pub fn is_test_module(item: &ItemMod) -> bool {
    item.attrs.iter().any(is_test_attribute)
}

fn is_test_attribute(attribute: &Attribute) -> bool {
    attribute.path().is_ident("cfg")
        && attribute.parse_args::<Meta>().is_ok_and(|condition| requires_test(&condition))
}

fn requires_test(condition: &Meta) -> bool {
    match condition {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("all") => list
            .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
            .is_ok_and(|all| all.iter().any(requires_test)),
        _ => false,
    }
}

/// Counts a file's lines, comments included, without its inline test modules, wherever these are.
///
/// The end of a module is the closing brace with the same indentation, since `cargo fmt` is checked.
pub fn count_lines_outside_tests(file: &SourceFile) -> usize {
    let lines: Vec<&str> = file.text.lines().collect();
    let mut count = 0;
    let mut at = 0;
    while at < lines.len() {
        match end_of_test_module(&lines, at) {
            Some(end) => at = end,
            None => (count, at) = (count + 1, at + 1),
        }
    }
    count
}

/// Returns the line after the inline test module whose `#[cfg(test)]` is at `start`.
fn end_of_test_module(lines: &[&str], start: usize) -> Option<usize> {
    let indent = &lines[start][..lines[start].len() - lines[start].trim_start().len()];
    let attributes = lines[start..].iter().take_while(|line| line.trim_start().starts_with("#["));
    let header = start + attributes.count();
    let is_test = lines[start..header].iter().any(|line| {
        let attributes = Attribute::parse_outer.parse_str(line).unwrap_or_default();
        attributes.iter().any(is_test_attribute)
    });
    let opens_module = lines.get(header).is_some_and(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.contains(&"mod") && words.last() == Some(&"{")
    });
    if !is_test || !opens_module {
        return None;
    }
    let closing = format!("{indent}}}");
    let length = lines[header..].iter().position(|line| **line == closing)?;
    Some(header + length + 1)
}
