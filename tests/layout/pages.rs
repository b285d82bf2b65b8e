//! Pages that name files and functions of the source must not become outdated.

use std::path::Path;

/// Returns one message per file or function that a page names and the source does not have.
///
/// A code span that ends in `.rs` is a file, relative to `src` or to the root; one that ends in `()` is
/// a function of the file that was named last. A link to `../src/…` leads to a file or folder.
pub fn outdated_references(root: &Path) -> Vec<String> {
    let mut messages = Vec::new();
    for page in ["ARCHITECTURE.md", "docs/glossary.md"] {
        let text = std::fs::read_to_string(root.join(page)).unwrap();
        let mut source: Option<(&str, String)> = None;
        for span in code_spans(&text) {
            if Path::new(span).extension().is_some_and(|extension| extension == "rs") {
                let below_src = std::fs::read_to_string(root.join("src").join(span));
                let found = below_src.or_else(|_| std::fs::read_to_string(root.join(span)));
                if found.is_err() {
                    messages.push(format!("{page} names the file `{span}`, which does not exist"));
                }
                source = found.ok().map(|text| (span, text));
            } else if let (Some(path), Some((file, text))) = (span.strip_suffix("()"), &source) {
                let function = path.rsplit("::").next().unwrap_or(path);
                let declaration = format!("fn {function}");
                let is_declared = text
                    .match_indices(&declaration)
                    .any(|(at, _)| text[at + declaration.len()..].starts_with(['(', '<']));
                if !is_declared {
                    messages.push(format!("{page} names `{span}`, which {file} does not declare"));
                }
            }
        }
        let folder = root.join(page);
        let folder = folder.parent().unwrap_or(root);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("../src/") && !folder.join(link).exists() {
                messages.push(format!("{page} links to {link}, which does not exist"));
            }
        }
    }
    messages
}

/// Returns the texts between single backticks, code blocks left out.
fn code_spans(page: &str) -> impl Iterator<Item = &str> {
    let outside_blocks = page.split("```").step_by(2);
    outside_blocks.flat_map(|text| text.split('`').skip(1).step_by(2))
}
