//! Search results as a table: plain CLIP and the balanced ranking side by side.

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{Attribute, Cell, Color, ContentArrangement, Table};

use crate::serve::http::{SearchHit, SearchResponse};

/// Renders plain CLIP on the left and the balanced ranking on the right, with the change of rank.
pub fn render_side_by_side(answer: &SearchResponse) -> String {
    let balanced = format!("balanced ({}, weight {})", answer.normaliser.name(), answer.weight);
    let bold = |text: &str| Cell::new(text).add_attribute(Attribute::Bold);
    let mut table = Table::new();
    table
        .load_style(UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["", "plain CLIP", "score", &balanced, "score", "moved"].map(bold));
    for (index, raw) in answer.raw_hits.iter().enumerate() {
        let mut row = vec![
            Cell::new(index + 1),
            Cell::new(image_label(raw)),
            Cell::new(format!("{:.4}", raw.raw_score)),
        ];
        // With a minimum score there may be fewer balanced hits.
        if let Some(hit) = answer.hits.get(index) {
            row.extend([
                Cell::new(image_label(hit)),
                Cell::new(format!("{:.4}", hit.score)),
                rank_change_cell(hit),
            ]);
        }
        table.add_row(row);
    }
    let timings = answer.timings;
    let no_match = answer.no_match.as_ref().filter(|no_match| no_match.nothing_matches);
    let no_match = no_match.map(|no_match| format!("nothing matches: {}", no_match.reason));
    let warnings = answer.warning.iter().chain(&no_match);
    let warning_lines: String = warnings.map(|w| format!("WARNING: {w}\n")).collect();
    format!(
        "{warning_lines}{table}\n{} of {} images ranked in {:.2} ms, query embedded in {:.2} ms; table version {}, prompt set {}",
        answer.matched,
        answer.scanned,
        timings.scan_ms + timings.rank_ms,
        timings.embed_ms,
        answer.table_version,
        answer.prompt_set
    )
}

/// Returns id and title, after a mark if the server knows whether the hit is right.
fn image_label(hit: &SearchHit) -> String {
    let mark = match hit.right {
        Some(true) => "✓ ",
        Some(false) => "✗ ",
        None => "",
    };
    let id = &hit.image.image_id;
    match hit.image.attributes.get("title") {
        Some(title) => format!("{mark}{id}  {title}"),
        None => format!("{mark}{id}"),
    }
}

fn rank_change_cell(hit: &SearchHit) -> Cell {
    let rank_change = hit.raw_rank as i64 - hit.rank as i64;
    match rank_change {
        0 => Cell::new("="),
        up if up > 0 => Cell::new(format!("▲{up}")).fg(Color::Green),
        down => Cell::new(format!("▼{}", -down)).fg(Color::Red),
    }
}
