//! The shapes of the products, as SVG in a box of 100 × 100 and aligned to its bottom.
//!
//! Each has three layers: what is behind its body, the body (which has the product's colour and
//! pattern), and what is in front of it. Placeholders for colours: `@c` is the product's colour,
//! `@d` a darker and `@l` a lighter tone of it; `@m` is metal, `@k` wood, `@w` paper white.

use crate::demo::catalogue::ProductKind;

/// The layers of a product's drawing, as SVG.
pub struct ProductShape {
    /// The layer behind the body.
    pub back_layer: &'static str,
    /// The body, without colours.
    pub body_layer: &'static str,
    /// The layer in front of the body.
    pub front_layer: &'static str,
}

/// Returns the drawing of a kind of product.
pub fn product_shape(kind: ProductKind) -> ProductShape {
    let (back, body, front) = match kind {
        ProductKind::Mug => (
            r#"<path d="M66 40h10a15 15 0 0 1 0 34h-10" fill="none" stroke="@c" stroke-width="8"/>"#,
            r#"<path d="M20 24h50v58a10 10 0 0 1-10 10h-30a10 10 0 0 1-10-10z"/>"#,
            r#"<ellipse cx="45" cy="24" rx="25" ry="5.5" fill="@d"/>"#,
        ),
        ProductKind::Shoe => (
            "",
            r#"<path d="M6 80V46q10 8 22-2l9-13q15 24 42 28q18 4 16 21z"/>"#,
            r#"<path d="M4 79h92q2 11-7 11h-78q-8 0-7-11z" fill="@w" stroke="@m" stroke-width="1"/>
               <path d="M38 43l10-6M45 51l10-6M53 57l9-6" stroke="@w" stroke-width="3.5" stroke-linecap="round"/>
               <path d="M6 46q10 8 22-2" fill="none" stroke="@d" stroke-width="4"/>"#,
        ),
        ProductKind::Lamp => (
            r#"<rect x="47" y="50" width="6" height="40" fill="@m"/><ellipse cx="50" cy="91" rx="21" ry="5" fill="@m"/>"#,
            r#"<path d="M33 8h34l18 46h-70z"/>"#,
            r##"<ellipse cx="50" cy="54" rx="35" ry="4" fill="#fff1bd"/><path d="M70 57v12" stroke="@m" stroke-width="1.2"/><circle cx="70" cy="70" r="2" fill="@m"/>"##,
        ),
        ProductKind::Chair => (
            r#"<path d="M26 62l-5 34M74 62l5 34M37 62v26M63 62v26" stroke="@k" stroke-width="5.5" stroke-linecap="round"/>"#,
            r#"<path d="M29 8q21-7 42 0l-2 46h-38zM21 54h58l5 13h-68z"/>"#,
            r#"<path d="M16 67h68v4h-68zM31 54h38" fill="@d" stroke="@d" stroke-width="1.5"/>"#,
        ),
        ProductKind::Bag => (
            r#"<path d="M33 42v-12a17 17 0 0 1 34 0v12" fill="none" stroke="@d" stroke-width="5.5"/>"#,
            r#"<path d="M17 38h66l8 55h-82z"/>"#,
            r##"<path d="M17 38h66l1 8h-68z" fill="@d"/><rect x="44" y="40" width="12" height="10" rx="2" fill="#d9b45a"/>"##,
        ),
        ProductKind::Bottle => (
            "",
            r#"<path d="M42 12h16v18q0 8 7 14q7 6 7 15v29a7 7 0 0 1-7 7h-30a7 7 0 0 1-7-7v-29q0-9 7-15q7-6 7-14z"/>"#,
            r#"<rect x="40" y="3" width="20" height="11" rx="2.5" fill="@m"/><rect x="42" y="16" width="16" height="3" fill="@d"/>"#,
        ),
        ProductKind::Clock => (
            r#"<path d="M26 84l-7 11M74 84l7 11" stroke="@m" stroke-width="6" stroke-linecap="round"/>
               <circle cx="26" cy="14" r="10" fill="@d"/><circle cx="74" cy="14" r="10" fill="@d"/>"#,
            r#"<circle cx="50" cy="52" r="41"/>"#,
            r##"<circle cx="50" cy="52" r="26" fill="#fcfbf6" stroke="@m" stroke-width="1.5"/>
               <path d="M50 30v4M50 70v4M28 52h4M68 52h4" stroke="#333" stroke-width="2.5"/>
               <path d="M50 52v-17M50 52l12 7" stroke="#222" stroke-width="3" stroke-linecap="round"/>"##,
        ),
        ProductKind::Hat => (
            "",
            r#"<path d="M3 72q47-20 94 0q-10 17-47 17q-37 0-47-17z"/><path d="M27 70q-3-46 23-46q26 0 23 46q-23 8-46 0z"/>"#,
            r#"<path d="M26 62q24 9 48 0l.3 9q-24 9-48.6 0z" fill="@d"/>"#,
        ),
        ProductKind::Umbrella => (
            r#"<path d="M50 44v41a8 8 0 0 0 16 0" fill="none" stroke="@k" stroke-width="4.5" stroke-linecap="round"/><path d="M50 3v8" stroke="@m" stroke-width="3"/>"#,
            r#"<path d="M4 54a46 46 0 0 1 92 0q-8-9-15.3 0q-8-9-15.4 0q-8-9-15.3 0q-8-9-15.3 0q-8-9-15.4 0q-8-9-15.3 0z"/>"#,
            r#"<path d="M50 8q-14 16-15.3 46M50 8q14 16 15.3 46M50 8q-28 14-30.7 46M50 8q28 14 30.7 46" fill="none" stroke="@d" stroke-width="1.2"/>"#,
        ),
        ProductKind::Teapot => (
            r#"<path d="M25 48q-20-2-19 15q1 16 21 15" fill="none" stroke="@c" stroke-width="6.5"/>
               <path d="M72 64q11-3 13-22l12-3q-3 38-25 42z" fill="@c"/>"#,
            r#"<path d="M24 44q26-9 52 0q12 48-15 49h-22q-27-1-15-49z"/>"#,
            r#"<path d="M31 42q19-17 38 0q-19 7-38 0z" fill="@d"/><circle cx="50" cy="29" r="4.5" fill="@d"/>"#,
        ),
        ProductKind::Vase => (
            r##"<path d="M47 10q-8-2-12-9M53 10q8-3 9-10M50 10v-10" stroke="#5c8a4a" stroke-width="2.5" fill="none"/>"##,
            r#"<path d="M36 10h28q2 10-5 18q24 16 19 42q-4 17-15 24h-26q-11-7-15-24q-5-26 19-42q-7-8-5-18z"/>"#,
            r#"<ellipse cx="50" cy="10" rx="14" ry="3.5" fill="@d"/>"#,
        ),
        ProductKind::Book => (
            r##"<path d="M22 84h60v9h-58q-6-3-2-9z" fill="#f4edda" stroke="#cbbf9f" stroke-width="1"/>"##,
            r#"<path d="M18 12a6 6 0 0 1 6-6h58v80h-58a6 6 0 0 0-6 6z"/>"#,
            r#"<path d="M18 12a6 6 0 0 1 6-6h5v80h-5a6 6 0 0 0-6 6z" fill="@d"/><rect x="40" y="20" width="30" height="15" rx="1" fill="@w"/>
               <path d="M44 25h22M48 30h14" stroke="@m" stroke-width="2"/>"#,
        ),
        ProductKind::Guitar => (
            r##"<rect x="46.5" y="10" width="7" height="44" fill="#4a3323"/><path d="M44 0h12l-1 13h-10z" fill="#2f2018"/>"##,
            r#"<path d="M50 42q19-3 19 12q0 7 5 12q8 8 3 18q-6 13-27 13q-21 0-27-13q-5-10 3-18q5-5 5-12q0-15 19-12z"/>"#,
            r##"<circle cx="50" cy="65" r="7" fill="#2b2019"/><rect x="41" y="82" width="18" height="4" fill="#2b2019"/>
               <path d="M48 4v79M50 4v79M52 4v79" stroke="#e9e2d0" stroke-width=".6"/>"##,
        ),
        ProductKind::Cushion => (
            "",
            r#"<path d="M8 20q-2-8 6-8q36 9 72 0q8 0 6 8q-8 32 0 64q2 8-6 8q-36-8-72 0q-8 0-6-8q8-32 0-64z"/>"#,
            r#"<circle cx="50" cy="52" r="3" fill="@d"/><path d="M47 52q-12-2-18-10M53 52q12 3 17 11" fill="none" stroke="@d" stroke-width="1.3"/>"#,
        ),
        ProductKind::Watch => (
            "",
            r#"<path d="M35 0h30l4 34h-38zM31 66h38l-4 34h-30z"/>"#,
            r##"<rect x="76" y="46" width="6" height="8" rx="1.5" fill="@m"/><circle cx="50" cy="50" r="27" fill="@m"/><circle cx="50" cy="50" r="21.5" fill="#fcfbf6"/>
               <path d="M50 50v-14M50 50l9 6" stroke="#222" stroke-width="2.6" stroke-linecap="round"/><path d="M50 31v3M50 66v3M31 50h3M66 50h3" stroke="#555" stroke-width="2"/>"##,
        ),
        ProductKind::Sofa => (
            r#"<path d="M14 84v10M86 84v10" stroke="@k" stroke-width="6"/>"#,
            r#"<path d="M13 60v-26a9 9 0 0 1 9-9h56a9 9 0 0 1 9 9v26zM2 52a8 8 0 0 1 16 0v12h64v-12a8 8 0 0 1 16 0v30a4 4 0 0 1-4 4h-88a4 4 0 0 1-4-4z"/>"#,
            r#"<path d="M50 27v37M18 64h64M18 74h64M50 64v10" fill="none" stroke="@d" stroke-width="2"/>"#,
        ),
        ProductKind::Table => (
            r#"<path d="M12 54v42M88 54v42M26 52v30M74 52v30" stroke="@k" stroke-width="6"/>"#,
            r#"<path d="M17 28h66l16 24h-98zM1 52h98v10h-98z"/>"#,
            r#"<path d="M1 52h98" stroke="@d" stroke-width="2"/>"#,
        ),
        ProductKind::Candle => (
            r#"<ellipse cx="50" cy="91" rx="34" ry="6" fill="@m"/>"#,
            r#"<path d="M32 34h36v56q-18 6-36 0z"/>"#,
            r##"<ellipse cx="50" cy="34" rx="18" ry="4" fill="@l"/><path d="M50 34v-9" stroke="#333" stroke-width="1.8"/>
               <path d="M50 3q11 13 0 24q-11-11 0-24z" fill="#f7b12f"/><path d="M50 13q5 7 0 13q-5-6 0-13z" fill="#fff2b8"/>"##,
        ),
        ProductKind::Helmet => (
            "",
            r#"<path d="M9 74q-4-60 43-60q41 0 40 42l-2 18z"/>"#,
            r##"<path d="M54 46h37q1 15-4 22h-31q-8-11-2-22z" fill="#25323e"/><path d="M60 50h26" stroke="#8fb2c8" stroke-width="2.5"/>
               <rect x="8" y="72" width="82" height="9" rx="4" fill="@d"/>"##,
        ),
        ProductKind::Backpack => (
            r#"<path d="M40 14a10 10 0 0 1 20 0" fill="none" stroke="@d" stroke-width="5"/><path d="M20 46q-10 4-9 38M80 46q10 4 9 38" fill="none" stroke="@d" stroke-width="6"/>"#,
            r#"<path d="M20 42q0-30 30-30q30 0 30 30v44a8 8 0 0 1-8 8h-44a8 8 0 0 1-8-8z"/>"#,
            r##"<path d="M28 60h44v24a5 5 0 0 1-5 5h-34a5 5 0 0 1-5-5z" fill="@d" opacity=".75"/><path d="M28 44q22-7 44 0" fill="none" stroke="@d" stroke-width="3"/>
               <rect x="47" y="58" width="6" height="8" rx="1.5" fill="#d9c27a"/>"##,
        ),
        ProductKind::TShirt => (
            "",
            r#"<path d="M34 10q16 13 32 0l29 15l-11 27l-13-6v50h-42v-50l-13 6l-11-27z"/>"#,
            r#"<path d="M34 10q16 13 32 0" fill="none" stroke="@d" stroke-width="4"/><path d="M29 46v-12M71 46v-12" stroke="@d" stroke-width="1.5"/>"#,
        ),
        ProductKind::Kite => (
            r#"<path d="M50 70q10 7 1 13q-10 6 0 16" fill="none" stroke="@m" stroke-width="2"/>"#,
            r#"<path d="M50 1l35 33l-35 42l-35-42z"/>"#,
            r#"<path d="M50 1v75M15 34h70" stroke="@d" stroke-width="2"/><path d="M44 80l12 5v-7l-12 6zM42 93l12 5v-7l-12 6z" fill="@d"/>"#,
        ),
        ProductKind::Bicycle => (
            r##"<g fill="none" stroke="#2c2f36" stroke-width="4"><circle cx="22" cy="70" r="20"/><circle cx="78" cy="70" r="20"/></g>
               <path d="M22 50v40M2 70h40M8 56l28 28M8 84l28-28M78 50v40M58 70h40M64 56l28 28M64 84l28-28" stroke="#9aa0a8" stroke-width=".7"/>
               <path d="M30 30h16" stroke="#2c2f36" stroke-width="6" stroke-linecap="round"/><path d="M62 24h14q5 4 0 8" fill="none" stroke="#2c2f36" stroke-width="4"/>"##,
            r#"<path d="M22 70l18-30h28l-20 30zM40 40l-3-10M78 70l-12-42M48 70l-8-30" fill="none" stroke-width="8" stroke-linejoin="round"/>"#,
            r#"<circle cx="48" cy="70" r="5" fill="@m"/>"#,
        ),
        ProductKind::Drum => (
            r#"<path d="M18 4l44 26M82 4l-44 26" stroke="@k" stroke-width="4" stroke-linecap="round"/>"#,
            r#"<path d="M12 36v44q38 19 76 0v-44z"/>"#,
            r##"<ellipse cx="50" cy="36" rx="38" ry="12" fill="#f7f1e3" stroke="@m" stroke-width="3.5"/><path d="M12 78q38 19 76 0" fill="none" stroke="@m" stroke-width="4"/>"##,
        ),
    };
    ProductShape { back_layer: back, body_layer: body, front_layer: front }
}

/// Small things in cluttered pictures, as SVG. None of them is a product.
pub const CLUTTER_SHAPES: [&str; 8] = [
    r##"<path d="M8 92q4-70 84-84q0 78-84 84z" fill="#7c9a63"/><path d="M8 92l60-62" stroke="#56733f" stroke-width="3"/>"##,
    r##"<path d="M8 80l66-66l12 12l-66 66z" fill="#c9a24b"/><path d="M8 80l-4 16l16-4z" fill="#e8d3ac"/><path d="M74 14l8-8q8 0 12 12l-8 8z" fill="#b98a84"/>"##,
    r##"<path d="M10 36l40-14l40 14v44l-40 14l-40-14z" fill="#b99c74"/><path d="M10 36l40 12l40-12M50 48v46" stroke="#8c7350" stroke-width="2.5" fill="none"/>"##,
    r##"<circle cx="50" cy="50" r="44" fill="#dfe3e2"/><circle cx="50" cy="50" r="30" fill="#eef1f0" stroke="#c4cac8" stroke-width="2"/>"##,
    r##"<path d="M4 60c20-60 40 50 56-6s40-10 36 36" fill="none" stroke="#4b4f57" stroke-width="5"/><rect x="90" y="84" width="10" height="14" fill="#4b4f57"/>"##,
    r##"<path d="M14 8h60l14 14v70h-74z" fill="#f1efe8" stroke="#cfcabb" stroke-width="2"/><path d="M26 34h48M26 48h48M26 62h34" stroke="#aeb4bd" stroke-width="4"/>"##,
    r##"<path d="M20 96q-10-40 30-60q30-18 44 12q10 40-30 48z" fill="#9c968c"/><path d="M34 76q4-22 26-28" stroke="#b9b3a8" stroke-width="5" fill="none"/>"##,
    r##"<ellipse cx="26" cy="26" rx="18" ry="24" fill="#b7bcc2" transform="rotate(-40 26 26)"/><path d="M36 38l54 54" stroke="#a3a9b0" stroke-width="8" stroke-linecap="round"/>"##,
];
