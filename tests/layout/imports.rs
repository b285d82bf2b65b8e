//! Collects which file imports what from which other file.
//!
//! An import of an item that a façade re-exports (`pub use writer::Writer;` in `table/mod.rs`) is an
//! import from the file that defines the item (`table/writer.rs`). An import of anything else that is
//! named below a module is an import from that module's file.

use std::collections::{BTreeMap, BTreeSet};

use syn::buffer::{Cursor, TokenBuffer};
use syn::visit::{self, Visit};
use syn::{Ident, ItemMod, ItemUse, Macro, MetaList, UseTree, Visibility};

use crate::source_tree::{ModulePath, SourceTree, is_test_module};

/// One file names an item of another one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Import {
    /// The file that imports, relative to `src`.
    pub importer: String,
    /// The file that defines the item, relative to `src`.
    pub imported: String,
    /// The item as seen from the crate: `crate::table::writer::Writer`.
    pub item: String,
}

/// Returns every import between two files outside of tests. `lib.rs` and `main.rs` name everything
/// and are left out.
pub fn collect_imports(tree: &SourceTree) -> BTreeSet<Import> {
    let names = Names::collect(tree);
    let mut imports = BTreeSet::new();
    for (importer, mentions) in &names.mentions {
        for mention in mentions {
            let Some(path) = names.absolute(&mention.module, &mention.segments, 0) else {
                continue;
            };
            let (imported, path) = names.definition(path);
            let is_facade = mention.is_re_export && names.is_below(imported, &mention.module);
            if imported != *importer && !is_facade {
                let item = format!("crate::{}", path.join("::"));
                let (importer, imported) = ((*importer).to_owned(), imported.to_owned());
                imports.insert(Import { importer, imported, item });
            }
        }
    }
    imports
}

/// A path that a file names, in a `use` or elsewhere.
struct Mention {
    /// The module around it, inline modules included.
    module: ModulePath,
    /// As written: `["super", "log", "DeltaLog"]`.
    segments: Vec<String>,
    /// It is in a `pub use`.
    is_re_export: bool,
}

/// What paths of all files refer to.
struct Names<'a> {
    /// The file of each module.
    files: BTreeMap<&'a [String], &'a str>,
    /// Mentions by file.
    mentions: BTreeMap<&'a str, Vec<Mention>>,
    /// What a `use` makes of a name in a module, as written, and whether it is a `pub use`.
    uses: BTreeMap<(ModulePath, String), (Vec<String>, bool)>,
}

/// Aliases may refer to aliases; a longer chain is a circle of names.
const MAX_ALIAS_DEPTH: usize = 20;

impl<'a> Names<'a> {
    fn collect(tree: &'a SourceTree) -> Self {
        let main = "main.rs";
        let files = tree.files.iter().filter(|file| file.path != main);
        let files = files.map(|file| (file.module.as_slice(), file.path.as_str())).collect();
        let mut names = Self { files, mentions: BTreeMap::new(), uses: BTreeMap::new() };
        for file in &tree.files {
            if file.module.is_empty() || tree.is_test(file) {
                continue;
            }
            let mut collector = Collector {
                module: file.module.clone(),
                mentions: Vec::new(),
                uses: &mut names.uses,
            };
            collector.visit_file(&file.syntax);
            let mentions = collector.mentions;
            names.mentions.insert(&file.path, mentions);
        }
        names
    }

    /// Returns the path from the crate's root, or `None` if it is a path of another crate.
    fn absolute(&self, module: &[String], path: &[String], depth: usize) -> Option<Vec<String>> {
        let first = path.first()?;
        match first.as_str() {
            "crate" | "bsap" => return Some(path[1..].to_vec()),
            "self" => return Some([module, &path[1..]].concat()),
            "super" => {
                let supers = path.iter().take_while(|segment| *segment == "super").count();
                let parent = &module[..module.len().checked_sub(supers)?];
                return Some([parent, &path[supers..]].concat());
            }
            _ => {}
        }
        let child = [module, std::slice::from_ref(first)].concat();
        if self.files.contains_key(child.as_slice()) {
            return Some([child.as_slice(), &path[1..]].concat());
        }
        let (target, _) = self.uses.get(&(module.to_vec(), first.clone()))?;
        if depth == MAX_ALIAS_DEPTH || target.first() == Some(first) {
            return None;
        }
        let target = self.absolute(module, target, depth + 1)?;
        Some([target.as_slice(), &path[1..]].concat())
    }

    /// Follows re-exports to the definition. Returns its file and its path from the crate's root.
    fn definition(&self, mut path: Vec<String>) -> (&'a str, Vec<String>) {
        for _ in 0..MAX_ALIAS_DEPTH {
            let Some(target) = self.re_exported(&path) else { break };
            path = target;
        }
        let mut depth = path.len();
        while depth > 0 && !self.files.contains_key(&path[..depth]) {
            depth -= 1;
        }
        (self.files.get(&path[..depth]).copied().unwrap_or("lib.rs"), path)
    }

    /// Returns where the path leads if one of its modules re-exports the next segment.
    fn re_exported(&self, path: &[String]) -> Option<Vec<String>> {
        (0..path.len()).rev().find_map(|depth| {
            let (module, rest) = path.split_at(depth);
            // A function may be re-exported under the name of a module: the path means the module.
            if self.files.contains_key(&path[..=depth]) {
                return None;
            }
            match self.uses.get(&(module.to_vec(), rest[0].clone()))? {
                (target, true) => {
                    let target = self.absolute(module, target, 0)?;
                    Some([target.as_slice(), &rest[1..]].concat())
                }
                _ => None,
            }
        })
    }

    fn is_below(&self, file: &str, module: &[String]) -> bool {
        let below =
            |(candidate, path): (&&[String], &&str)| *path == file && candidate.starts_with(module);
        self.files.iter().any(below)
    }
}

/// Collects a file's mentions and uses, without its test modules.
struct Collector<'a> {
    module: ModulePath,
    mentions: Vec<Mention>,
    uses: &'a mut BTreeMap<(ModulePath, String), (Vec<String>, bool)>,
}

impl Collector<'_> {
    fn add_mention(&mut self, segments: Vec<String>, is_re_export: bool) {
        self.mentions.push(Mention { module: self.module.clone(), segments, is_re_export });
    }

    fn add_use(&mut self, prefix: &[String], tree: &UseTree, is_public: bool) {
        let with = |name: &Ident| [prefix, &[name.to_string()]].concat();
        match tree {
            UseTree::Path(path) => self.add_use(&with(&path.ident), &path.tree, is_public),
            UseTree::Name(name) if name.ident == "self" => self.add_name(prefix, None, is_public),
            UseTree::Name(name) => self.add_name(&with(&name.ident), None, is_public),
            UseTree::Rename(rename) if rename.ident == "self" => {
                self.add_name(prefix, Some(&rename.rename), is_public);
            }
            UseTree::Rename(rename) => {
                self.add_name(&with(&rename.ident), Some(&rename.rename), is_public);
            }
            // What a glob brings is not followed: it imports from the module itself.
            UseTree::Glob(_) => self.add_mention(prefix.to_vec(), false),
            UseTree::Group(group) => {
                group.items.iter().for_each(|item| self.add_use(prefix, item, is_public));
            }
        }
    }

    fn add_name(&mut self, path: &[String], alias: Option<&Ident>, is_public: bool) {
        let Some(last) = path.last() else { return };
        let name = alias.map_or_else(|| last.clone(), Ident::to_string);
        self.uses.insert((self.module.clone(), name), (path.to_vec(), is_public));
        self.add_mention(path.to_vec(), is_public);
    }

    /// Collects the paths in the tokens of a macro or an attribute, whose syntax is not known.
    fn add_tokens(&mut self, mut cursor: Cursor) {
        let mut follows_colons = false;
        while !cursor.eof() {
            if let Some((inside, _, _, after)) = cursor.any_group() {
                self.add_tokens(inside);
                (cursor, follows_colons) = (after, false);
            } else if let Some((segments, after)) = path_in_tokens(cursor) {
                if segments.len() > 1 && !follows_colons {
                    self.add_mention(segments, false);
                }
                (cursor, follows_colons) = (after, false);
            } else if let Some(after) = skip_colons(cursor) {
                (cursor, follows_colons) = (after, true);
            } else if let Some((_, after)) = cursor.token_tree() {
                (cursor, follows_colons) = (after, false);
            }
        }
    }
}

/// Returns the segments of a path `a::b::c` at the cursor, and the cursor after it.
fn path_in_tokens(cursor: Cursor) -> Option<(Vec<String>, Cursor)> {
    let (first, mut after) = cursor.ident()?;
    let mut segments = vec![first.to_string()];
    while let Some((segment, next)) = skip_colons(after).and_then(Cursor::ident) {
        segments.push(segment.to_string());
        after = next;
    }
    Some((segments, after))
}

fn skip_colons(cursor: Cursor) -> Option<Cursor> {
    let (first, cursor) = cursor.punct()?;
    let (second, cursor) = cursor.punct()?;
    (first.as_char() == ':' && second.as_char() == ':').then_some(cursor)
}

impl<'ast> Visit<'ast> for Collector<'_> {
    fn visit_item_mod(&mut self, item: &'ast ItemMod) {
        if !is_test_module(item) {
            self.module.push(item.ident.to_string());
            visit::visit_item_mod(self, item);
            self.module.pop();
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        if item.leading_colon.is_none() {
            self.add_use(&[], &item.tree, !matches!(item.vis, Visibility::Inherited));
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() && path.segments.len() > 1 {
            self.add_mention(path.segments.iter().map(|s| s.ident.to_string()).collect(), false);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast Macro) {
        self.add_tokens(TokenBuffer::new2(item.tokens.clone()).begin());
        visit::visit_macro(self, item);
    }

    fn visit_meta_list(&mut self, list: &'ast MetaList) {
        self.add_tokens(TokenBuffer::new2(list.tokens.clone()).begin());
        visit::visit_meta_list(self, list);
    }
}
