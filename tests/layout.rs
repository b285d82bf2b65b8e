//! The house stays in order: imports run one way, files stay small.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use syn::visit::{self, Visit};
use syn::{Attribute, ItemMod, ItemUse, UseTree};

/// Most lines of a file before its tests.
const MAX_LINES_PER_FILE: usize = 600;

/// Every source file with the path of its module: `src/http/routes.rs` is `["http", "routes"]`.
fn source_modules() -> Vec<(PathBuf, Vec<String>)> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::from("src")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix("src").unwrap().with_extension("");
                let mut module: Vec<String> =
                    relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
                if matches!(module.last().map(String::as_str), Some("mod" | "lib" | "main")) {
                    module.pop();
                }
                files.push((path, module));
            }
        }
    }
    files
}

/// Modules by name with the number of their layer, from the block `layers` in ARCHITECTURE.md.
fn declared_layers() -> BTreeMap<String, usize> {
    let page = std::fs::read_to_string("ARCHITECTURE.md").unwrap();
    let block = page.split("```layers\n").nth(1).and_then(|rest| rest.split("```").next());
    let block = block.expect("ARCHITECTURE.md has a block that begins with ```layers");
    let mut layers = BTreeMap::new();
    for (layer, line) in block.lines().enumerate() {
        let (_, names) = line.split_once(':').expect("a layer is `name: modules`");
        for name in names.split_whitespace() {
            assert!(layers.insert(name.to_owned(), layer).is_none(), "{name} is listed twice");
        }
    }
    layers
}

/// Collects the top-level modules that a file names, outside of its tests.
struct ImportCollector<'a> {
    module: &'a [String],
    imported_modules: BTreeSet<String>,
}

impl ImportCollector<'_> {
    fn add_path(&mut self, segments: &[String]) {
        let mut base = match segments.first().map(String::as_str) {
            Some("crate" | "bsap") => Vec::new(),
            Some("super" | "self") => self.module.to_vec(),
            _ => return,
        };
        for segment in segments.iter().skip(usize::from(segments[0] != "super")) {
            if segment == "super" {
                base.pop();
            } else {
                base.push(segment.clone());
            }
        }
        self.imported_modules.extend(base.into_iter().next());
    }

    fn add_use_tree(&mut self, prefix: &[String], tree: &UseTree) {
        let with = |name: &syn::Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.add_use_tree(&with(&path.ident), &path.tree),
            UseTree::Name(name) => self.add_path(&with(&name.ident)),
            UseTree::Rename(name) => self.add_path(&with(&name.ident)),
            UseTree::Glob(_) => self.add_path(prefix),
            UseTree::Group(group) => {
                group.items.iter().for_each(|item| self.add_use_tree(prefix, item))
            }
        }
    }
}

fn is_cfg_test(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|a| {
        a.path().is_ident("cfg")
            && a.parse_args::<syn::Path>().is_ok_and(|path| path.is_ident("test"))
    })
}

impl<'ast> Visit<'ast> for ImportCollector<'_> {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !is_cfg_test(&item.attrs) {
            visit::visit_item_mod(self, item);
        }
    }
    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        self.add_use_tree(&[], &item.tree);
    }
    fn visit_path(&mut self, path: &'ast syn::Path) {
        let segments: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        self.add_path(&segments);
        visit::visit_path(self, path);
    }
}

/// Top-level module to the top-level modules that it imports.
fn collect_imports() -> BTreeMap<String, BTreeSet<String>> {
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, module) in source_modules() {
        if module.is_empty() || module.last().is_some_and(|name| name == "tests") {
            continue; // lib.rs and main.rs name everything
        }
        let text = std::fs::read_to_string(&file).unwrap();
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let mut imports = ImportCollector { module: &module, imported_modules: BTreeSet::new() };
        imports.visit_file(&parsed);
        imports.imported_modules.remove(&module[0]);
        graph.entry(module[0].clone()).or_default().extend(imports.imported_modules);
    }
    graph
}

#[test]
fn imports_run_downwards_only() {
    let layers = declared_layers();
    let graph = collect_imports();
    let listed: BTreeSet<&String> = layers.keys().collect();
    assert_eq!(
        graph.keys().collect::<BTreeSet<_>>(),
        listed,
        "ARCHITECTURE.md lists other modules than src/ has"
    );
    for (module, imported) in &graph {
        for name in imported {
            let down = layers
                .get(name)
                .unwrap_or_else(|| panic!("{module} imports {name}, which is no module"));
            assert!(
                *down <= layers[module],
                "{module} imports {name}, which lies in a higher layer"
            );
        }
    }
}

#[test]
fn imports_close_no_cycle() {
    let mut graph = collect_imports();
    // Take out what imports nothing that is left, until nothing is left.
    while !graph.is_empty() {
        let free: Vec<String> = graph
            .iter()
            .filter(|(_, imported)| imported.iter().all(|name| !graph.contains_key(name)))
            .map(|(name, _)| name.clone())
            .collect();
        assert!(!free.is_empty(), "these modules import each other in a circle: {graph:#?}");
        for name in free {
            graph.remove(&name);
        }
    }
}

#[test]
fn files_stay_small() {
    for (file, _) in source_modules() {
        let text = std::fs::read_to_string(&file).unwrap();
        let lines = text.lines().take_while(|line| *line != "#[cfg(test)]").count();
        assert!(
            lines <= MAX_LINES_PER_FILE,
            "{} has {lines} lines, more than {MAX_LINES_PER_FILE}",
            file.display()
        );
    }
}
