//! XMP packets (ISO 16684-1): RDF in XML, of which a few properties are read.
//!
//! The packet is read as a stream of events: memory and time grow with its length alone, whatever is in
//! it. Prefixes are taken as they are declared anywhere in the packet, because every known program
//! declares each once.

use quick_xml::Reader;
use quick_xml::escape::{resolve_predefined_entity, unescape};
use quick_xml::events::{BytesStart, Event};

use super::charset::{MetadataCharset, decode_unicode};

/// Maximum length of a packet that is read. Packets of photographs have some kilobytes; those of layered
/// pictures may list thousands of ancestors.
const MAX_PACKET_BYTES: usize = 4 << 20;
/// Maximum number of values of a property.
const MAX_VALUES: usize = 1024;
/// Maximum number of declared prefixes that are remembered.
const MAX_PREFIXES: usize = 32;
/// Maximum nesting: that of the properties that are read is 6.
const MAX_DEPTH: usize = 256;

/// Values of the properties that are read; of a text in several languages, the default one.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct XmpFields {
    /// `dc:title`.
    pub title: Vec<String>,
    /// `photoshop:Headline`.
    pub headline: Vec<String>,
    /// `dc:description`.
    pub description: Vec<String>,
    /// `dc:subject`.
    pub subject: Vec<String>,
    /// `dc:creator`.
    pub creator: Vec<String>,
    /// `dc:rights`.
    pub rights: Vec<String>,
    /// `photoshop:DateCreated`.
    pub date_created: Vec<String>,
    /// `exif:DateTimeOriginal`.
    pub date_time_original: Vec<String>,
}

impl XmpFields {
    fn values_mut(&mut self, property: Property) -> &mut Vec<String> {
        match property {
            Property::Title => &mut self.title,
            Property::Headline => &mut self.headline,
            Property::Description => &mut self.description,
            Property::Subject => &mut self.subject,
            Property::Creator => &mut self.creator,
            Property::Rights => &mut self.rights,
            Property::DateCreated => &mut self.date_created,
            Property::DateTimeOriginal => &mut self.date_time_original,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Property {
    Title,
    Headline,
    Description,
    Subject,
    Creator,
    Rights,
    DateCreated,
    DateTimeOriginal,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Namespace {
    DublinCore,
    Photoshop,
    Exif,
    Rdf,
}

impl Namespace {
    fn from_uri(uri: &[u8]) -> Option<Self> {
        match uri {
            b"http://purl.org/dc/elements/1.1/" => Some(Self::DublinCore),
            b"http://ns.adobe.com/photoshop/1.0/" => Some(Self::Photoshop),
            b"http://ns.adobe.com/exif/1.0/" => Some(Self::Exif),
            b"http://www.w3.org/1999/02/22-rdf-syntax-ns#" => Some(Self::Rdf),
            _ => None,
        }
    }
}

/// What an element is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    RdfDescription,
    /// `rdf:Alt`: the same text in several languages.
    RdfAlternatives,
    RdfItem,
    Property(Property),
    Other,
}

/// Reads a packet; what follows damage is left out.
pub fn read_xmp(packet: &[u8], charset: MetadataCharset) -> XmpFields {
    let packet = &packet[..packet.len().min(MAX_PACKET_BYTES)];
    let text = decode_unicode(packet).unwrap_or_else(|| charset.decode(packet));
    let mut reader = Reader::from_str(&text);
    let mut state = XmpReader::default();
    while let Ok(event) = reader.read_event() {
        match event {
            Event::Start(element) => {
                if state.open_elements.len() >= MAX_DEPTH {
                    break;
                }
                state.start(&element);
            }
            Event::Empty(element) => {
                state.start(&element);
                state.end();
            }
            Event::End(_) => state.end(),
            Event::Text(text) => state.text.push_str(&text.decode().unwrap_or_default()),
            Event::CData(text) => state.text.push_str(&text.decode().unwrap_or_default()),
            Event::GeneralRef(reference) => {
                let character = reference.resolve_char_ref().ok().flatten();
                let entity = reference.decode().unwrap_or_default();
                match character {
                    Some(character) => state.text.push(character),
                    None => {
                        state.text.push_str(resolve_predefined_entity(&entity).unwrap_or_default());
                    }
                }
            }
            Event::Eof => break,
            Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_) => {}
        }
    }
    state.fields
}

#[derive(Default)]
struct XmpReader {
    fields: XmpFields,
    /// Declared prefixes of the namespaces that are read.
    prefixes: Vec<(Vec<u8>, Namespace)>,
    open_elements: Vec<Element>,
    /// The property that is open, and its values so far.
    property: Option<(Property, Vec<String>)>,
    /// Whether the open property is one text in several languages.
    has_alternatives: bool,
    /// Whether the open item is the text in the default language.
    is_default_language: bool,
    /// Text since the last start of a property or an item.
    text: String,
}

impl XmpReader {
    fn start(&mut self, tag: &BytesStart<'_>) {
        self.declare_prefixes(tag);
        let element = self.classify(tag.name().as_ref());
        match element {
            Element::RdfDescription => self.read_attributes(tag),
            Element::Property(property) => {
                self.property = Some((property, Vec::new()));
                self.has_alternatives = false;
                self.text.clear();
            }
            Element::RdfAlternatives => self.has_alternatives = true,
            Element::RdfItem => {
                self.text.clear();
                self.is_default_language = tag
                    .attributes()
                    .with_checks(false)
                    .flatten()
                    .any(|one| one.key.as_ref() == b"xml:lang" && *one.value == *b"x-default");
            }
            Element::Other => {}
        }
        self.open_elements.push(element);
    }

    fn end(&mut self) {
        match self.open_elements.pop() {
            Some(Element::RdfItem) => {
                let text = std::mem::take(&mut self.text);
                let is_preferred = self.has_alternatives && self.is_default_language;
                if let Some((_, values)) = &mut self.property {
                    if is_preferred {
                        *values = vec![text];
                    } else if values.len() < MAX_VALUES {
                        values.push(text);
                    }
                }
            }
            Some(Element::Property(_)) => {
                let Some((property, mut values)) = self.property.take() else { return };
                if values.is_empty() {
                    values.push(std::mem::take(&mut self.text));
                } else if self.has_alternatives {
                    values.truncate(1);
                }
                self.store(property, values);
            }
            _ => {}
        }
    }

    fn store(&mut self, property: Property, values: Vec<String>) {
        let stored = self.fields.values_mut(property);
        let trimmed = values.into_iter().map(|value| value.trim().to_owned());
        stored.extend(trimmed.filter(|value| !value.is_empty()));
        stored.truncate(MAX_VALUES);
    }

    fn declare_prefixes(&mut self, tag: &BytesStart<'_>) {
        for attribute in tag.attributes().with_checks(false).flatten() {
            let Some(prefix) = attribute.key.as_ref().strip_prefix(b"xmlns:") else { continue };
            let Some(namespace) = Namespace::from_uri(&attribute.value) else { continue };
            self.prefixes.retain(|(declared, _)| declared != prefix);
            if self.prefixes.len() < MAX_PREFIXES {
                self.prefixes.push((prefix.to_owned(), namespace));
            }
        }
    }

    /// Returns the namespace and the local part of a name with a known prefix.
    fn resolve<'n>(&self, name: &'n [u8]) -> Option<(Namespace, &'n [u8])> {
        let colon = name.iter().position(|byte| *byte == b':')?;
        let (prefix, local) = (&name[..colon], &name[colon + 1..]);
        let (_, namespace) = self.prefixes.iter().find(|(declared, _)| declared == prefix)?;
        Some((*namespace, local))
    }

    /// Returns what an element is where it is: properties are children of descriptions.
    fn classify(&self, name: &[u8]) -> Element {
        let is_inside_property = self.property.is_some();
        let is_child_of_description =
            self.open_elements.last() == Some(&Element::RdfDescription) && !is_inside_property;
        match self.resolve(name) {
            Some((Namespace::Rdf, b"Description")) if !is_inside_property => {
                Element::RdfDescription
            }
            Some((Namespace::Rdf, b"Alt")) if is_inside_property => Element::RdfAlternatives,
            Some((Namespace::Rdf, b"li")) if is_inside_property => Element::RdfItem,
            Some((namespace, local)) if is_child_of_description => {
                property(namespace, local).map_or(Element::Other, Element::Property)
            }
            _ => Element::Other,
        }
    }

    /// Reads simple properties in their short form, as attributes of a description.
    fn read_attributes(&mut self, tag: &BytesStart<'_>) {
        // Structures have descriptions too; what is in them belongs to them.
        if self.open_elements.contains(&Element::RdfDescription) {
            return;
        }
        for attribute in tag.attributes().with_checks(false).flatten() {
            let Some((namespace, local)) = self.resolve(attribute.key.as_ref()) else { continue };
            let Some(property) = property(namespace, local) else { continue };
            let raw = String::from_utf8_lossy(&attribute.value);
            let value = unescape(&raw).map_or_else(|_| raw.clone().into_owned(), Into::into);
            self.store(property, vec![value]);
        }
    }
}

fn property(namespace: Namespace, local: &[u8]) -> Option<Property> {
    match (namespace, local) {
        (Namespace::DublinCore, b"title") => Some(Property::Title),
        (Namespace::DublinCore, b"description") => Some(Property::Description),
        (Namespace::DublinCore, b"subject") => Some(Property::Subject),
        (Namespace::DublinCore, b"creator") => Some(Property::Creator),
        (Namespace::DublinCore, b"rights") => Some(Property::Rights),
        (Namespace::Photoshop, b"Headline") => Some(Property::Headline),
        (Namespace::Photoshop, b"DateCreated") => Some(Property::DateCreated),
        (Namespace::Exif, b"DateTimeOriginal") => Some(Property::DateTimeOriginal),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> XmpFields {
        let packet = format!(
            "<?xpacket begin=\"\u{feff}\" id=\"W5M0MpCehiHzreSzNTczkc9d\"?>\n\
             <x:xmpmeta xmlns:x=\"adobe:ns:meta/\"><rdf:RDF xmlns:rdf=\"http://www.w3.org/1999/02/22-rdf-syntax-ns#\">\
             {body}</rdf:RDF></x:xmpmeta>\n   \n<?xpacket end=\"w\"?>\0"
        );
        let fields = read_xmp(packet.as_bytes(), MetadataCharset::Detect);
        for encode in [u16::to_be_bytes, u16::to_le_bytes] {
            let utf_16: Vec<u8> = packet.encode_utf16().flat_map(encode).collect();
            assert_eq!(read_xmp(&utf_16, MetadataCharset::Detect), fields);
        }
        fields
    }

    const DC: &str = "xmlns:dc=\"http://purl.org/dc/elements/1.1/\"";

    #[test]
    fn all_forms_of_a_property_are_read() {
        let fields = read(&format!(
            "<rdf:Description rdf:about=\"\" {DC} xmlns:ps=\"http://ns.adobe.com/photoshop/1.0/\" \
               ps:DateCreated=\"1998-07\" ps:Headline=\"Fish &amp; chips\">\
             <dc:title><rdf:Alt><rdf:li xml:lang=\"de\">Stadt</rdf:li><rdf:li xml:lang=\"x-default\">City</rdf:li></rdf:Alt></dc:title>\
             <dc:subject><rdf:Bag><rdf:li>a &lt;b&gt; &#233;</rdf:li><rdf:li><![CDATA[c & d]]></rdf:li><rdf:li> </rdf:li></rdf:Bag></dc:subject>\
             <dc:rights>plain</dc:rights><dc:format>image/jpeg</dc:format></rdf:Description>\
             <rdf:Description {DC}><dc:creator><rdf:Seq><rdf:li>Ann</rdf:li><rdf:li>Ben</rdf:li></rdf:Seq></dc:creator>\
             <dc:description/></rdf:Description>"
        ));
        assert_eq!(fields.title, ["City"]);
        assert_eq!(fields.headline, ["Fish & chips"]);
        assert_eq!(fields.subject, ["a <b> é", "c & d"]);
        assert_eq!(fields.rights, ["plain"]);
        assert_eq!(fields.creator, ["Ann", "Ben"]);
        assert_eq!(fields.date_created, ["1998-07"]);
        assert_eq!(fields.description, Vec::<String>::new());
    }

    #[test]
    fn names_in_structures_and_of_other_namespaces_are_not_taken() {
        let fields = read(&format!(
            "<rdf:Description {DC} xmlns:o=\"http://other/\" xmlns:mm=\"http://ns.adobe.com/xap/1.0/mm/\" o:title=\"no\">\
             <o:title>no</o:title>\
             <mm:Ingredients><rdf:Bag><rdf:li><rdf:Description dc:title=\"of another file\"><dc:rights>no</dc:rights></rdf:Description></rdf:li></rdf:Bag></mm:Ingredients>\
             </rdf:Description><dc:title>outside</dc:title>"
        ));
        assert_eq!(fields, XmpFields { rights: fields.rights.clone(), ..XmpFields::default() });
    }

    #[test]
    fn hostile_packets_are_read_within_the_bounds() {
        let repeated = |part: &str| part.repeat(10_000);
        let attributes: String = (0..10_000).map(|i| format!(" a{i}=''")).collect();
        let prefixes: String = (0..10_000)
            .map(|i| format!(" xmlns:p{i}='http://purl.org/dc/elements/1.1/'"))
            .collect();
        let item = "<rdf:li xml:lang=\"x-default\">a</rdf:li>";
        for (body, titles, subjects) in [
            (format!("<rdf:Description {DC}{attributes} dc:title=\"a\"/>"), 1, 0),
            (
                format!("<rdf:Description{prefixes} p9:title=\"a\"/>{}", repeated("<p9999:x/>")),
                1,
                0,
            ),
            (
                format!(
                    "<rdf:Description {DC}><dc:subject><rdf:Bag>{}</rdf:Bag></dc:subject>",
                    repeated(item)
                ),
                0,
                MAX_VALUES,
            ),
            (
                format!(
                    "<rdf:Description {DC}><dc:title><rdf:Alt>{}</rdf:Alt></dc:title>",
                    repeated(item)
                ),
                1,
                0,
            ),
            (format!("{}<rdf:Description {DC} dc:title=\"too deep\"/>", repeated("<a>")), 0, 0),
            (
                format!(
                    "<!DOCTYPE x [<!ENTITY e \"e\">]><rdf:Description {DC}><dc:title>a&e;</dc:title>"
                ),
                1,
                0,
            ),
        ] {
            let fields = read(&body);
            assert_eq!(
                (fields.title.len(), fields.subject.len()),
                (titles, subjects),
                "{body:.200}"
            );
            assert!(fields.title.iter().all(|title| title == "a"), "{:?}", fields.title);
        }
    }
}
