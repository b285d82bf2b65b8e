//! The layers of modules, as ARCHITECTURE.md and `src/lib.rs` list them.

use std::path::Path;

/// The rule that both lists state, so that neither can be read in the other direction.
pub const RULE: &str = "A module imports only from its own layer or from earlier ones";

/// A layer and its modules, in the order in which they are listed.
#[derive(Debug, PartialEq, Eq)]
pub struct Layer {
    pub name: String,
    pub modules: Vec<String>,
}

/// Layers from the leaves to the commands.
pub type Layers = Vec<Layer>;

/// Reads the block `layers` of ARCHITECTURE.md, whose lines are `name: module module`.
pub fn read_architecture(root: &Path) -> Layers {
    let page = std::fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    assert!(states_rule(&page), "ARCHITECTURE.md does not say: {RULE}");
    let block = page.split("```layers\n").nth(1).and_then(|rest| rest.split("```").next());
    let block = block.expect("ARCHITECTURE.md has a block that begins with ```layers");
    let layer = |line: &str| {
        let (name, modules) = line.split_once(':').expect("a layer is `name: modules`");
        let modules = modules.split_whitespace().map(str::to_owned).collect();
        Layer { name: name.to_owned(), modules }
    };
    block.lines().map(layer).collect()
}

/// Reads `src/lib.rs`: a layer begins with the comment `// # Name: …`, and each module has a comment
/// of its own.
pub fn read_lib(root: &Path) -> Layers {
    let text = std::fs::read_to_string(root.join("src/lib.rs")).unwrap();
    assert!(states_rule(&text), "src/lib.rs does not say: {RULE}");
    let mut layers = Layers::new();
    let mut previous = "";
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("// # ") {
            let (name, _) = heading.split_once(':').expect("a heading is `// # Name: …`");
            layers.push(Layer { name: name.to_lowercase(), modules: Vec::new() });
        } else if let Some(module) = line.strip_prefix("pub mod ") {
            let layer = layers.last_mut().expect("a module follows the heading of its layer");
            assert!(previous.starts_with("// "), "src/lib.rs: no comment above `{line}`");
            assert!(!previous.starts_with("// # "), "src/lib.rs: no comment above `{line}`");
            layer.modules.push(module.trim_end_matches(';').to_owned());
        } else {
            assert!(!line.trim_start().starts_with("mod "), "src/lib.rs: `{line}` is in no layer");
        }
        previous = line;
    }
    layers
}

/// The sentence may be broken over lines, of comments too.
fn states_rule(text: &str) -> bool {
    let words = text.split_whitespace().filter(|word| *word != "//!");
    words.collect::<Vec<_>>().join(" ").contains(RULE)
}

/// Returns the number of the module's layer, 0 being the leaves.
pub fn layer_of(layers: &[Layer], module: &str) -> Option<usize> {
    layers.iter().position(|layer| layer.modules.iter().any(|name| name == module))
}
