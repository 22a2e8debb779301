//! Which format a client is sent: what its Accept header (RFC 9110, 12.5.1) prefers, Prometheus'
//! own text by default.

use super::text::Format;

/// The ranges of an Accept header that are looked at.
const MAX_RANGES: usize = 64;
/// The media types and versions we can send. The version of a range that has none is not asked for.
const OFFERS: [(Format, &str, &str, &[&str]); 2] = [
    (Format::Text, "text", "plain", &["0.0.4"]),
    // 0.0.1 is what it was called before it was finished; it is read by the same rules.
    (Format::OpenMetrics, "application", "openmetrics-text", &["1.0.0", "0.0.1"]),
];

/// The format for a request with these Accept headers: OpenMetrics if it is asked for by name and
/// is preferred, or as good as the other. A client that accepts neither is sent text, as other
/// exporters do.
pub(super) fn format<'h>(headers: impl Iterator<Item = &'h [u8]>) -> Format {
    let ranges: Vec<Range> = headers
        .filter_map(|header| std::str::from_utf8(header).ok())
        .flat_map(|header| header.split(','))
        .filter_map(Range::parse)
        .take(MAX_RANGES)
        .collect();
    // By name: a client that accepts everything may be a browser, or curl.
    let named = ranges.iter().any(|range| range.names(Format::OpenMetrics));
    match named && quality(&ranges, Format::OpenMetrics) >= quality(&ranges, Format::Text).max(1) {
        true => Format::OpenMetrics,
        false => Format::Text,
    }
}

/// How much a format is wanted, in thousandths: by the range that says most about it.
fn quality(ranges: &[Range], format: Format) -> u16 {
    let matching = ranges.iter().filter_map(|range| Some((range.precision(format)?, range.quality)));
    matching.max().map_or(0, |(_, quality)| quality)
}

/// One thing that a client accepts.
struct Range<'h> {
    kind: &'h str,
    subtype: &'h str,
    version: Option<&'h str>,
    /// 0 for never, 1000 for gladly.
    quality: u16,
}

impl<'h> Range<'h> {
    /// None for what is no range.
    fn parse(text: &'h str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (kind, subtype) = parts.next()?.split_once('/')?;
        let mut range = Self { kind, subtype, version: None, quality: 1000 };
        for parameter in parts {
            let Some((name, value)) = parameter.split_once('=') else { continue };
            let (name, value) = (name.trim(), value.trim().trim_matches('"'));
            if name.eq_ignore_ascii_case("q") {
                range.quality = thousandths(value)?;
            } else if name.eq_ignore_ascii_case("version") {
                range.version = Some(value);
            }
        }
        Some(range)
    }

    fn names(&self, format: Format) -> bool {
        self.precision(format).is_some_and(|precision| precision >= 2)
    }

    /// How much it says about a format: its version 3, its type 2, half of its type 1, nothing in
    /// particular 0. None if it is about others.
    fn precision(&self, format: Format) -> Option<u8> {
        let (_, kind, subtype, versions) = OFFERS.iter().find(|(offer, ..)| *offer == format)?;
        let is = |asked: &str, ours: &str| asked.eq_ignore_ascii_case(ours);
        match (self.kind, self.subtype) {
            ("*", "*") => Some(0),
            (asked, "*") if is(asked, kind) => Some(1),
            (asked, sub) if is(asked, kind) && is(sub, subtype) => match self.version {
                None => Some(2),
                Some(version) => versions.contains(&version).then_some(3),
            },
            _ => None,
        }
    }
}

/// A quality: 0 to 1, with at most three digits after the point.
fn thousandths(text: &str) -> Option<u16> {
    let value: f64 = text.parse().ok()?;
    (0.0..=1.0).contains(&value).then(|| (value * 1000.0).round() as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chosen(accept: &str) -> Format {
        format([accept.as_bytes()].into_iter())
    }

    #[test]
    fn without_a_wish_it_is_text() {
        assert_eq!(format([].into_iter()), Format::Text);
        for accept in [
            "",
            "*/*",
            "text/plain",
            "text/*;q=0.1",
            "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8",
            "application/json",
            "application/*",
            "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited",
            "text/plain;version=1.0.0;escaping=allow-utf-8",
            "rubbish, /, ;q=, application/openmetrics-text;q=2",
        ] {
            assert_eq!(chosen(accept), Format::Text, "{accept}");
        }
    }

    #[test]
    fn open_metrics_is_sent_to_clients_that_ask_for_it() {
        for accept in [
            "application/openmetrics-text",
            "Application/OpenMetrics-Text; Version=\"1.0.0\"; charset=utf-8",
            // Prometheus 2.
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,\
             text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            // Prometheus 3.
            "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,\
             application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,\
             text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
            "text/plain, application/openmetrics-text",
            "application/openmetrics-text;q=0.001",
        ] {
            assert_eq!(chosen(accept), Format::OpenMetrics, "{accept}");
        }
        let several: [&[u8]; 2] = [b"text/plain;q=0.2", b"application/openmetrics-text;q=0.3"];
        assert_eq!(format(several.into_iter()), Format::OpenMetrics);
    }

    #[test]
    fn the_quality_decides_and_the_precise_range_is_what_counts() {
        for accept in [
            "application/openmetrics-text;q=0.5,text/plain;q=0.9",
            "application/openmetrics-text;q=0.5,text/plain;version=0.0.4",
            "application/openmetrics-text;q=0",
            "application/openmetrics-text;q=0,*/*;q=0",
            "application/openmetrics-text; q=0.4, */*; q=0.5",
            // A version that we do not have, and one that is never wanted.
            "application/openmetrics-text;version=2.0.0",
            "application/openmetrics-text;version=1.0.0;q=0,application/openmetrics-text;version=2.0.0,text/*;q=0.1",
        ] {
            assert_eq!(chosen(accept), Format::Text, "{accept}");
        }
        assert_eq!(
            chosen("text/plain;q=0.5,text/*,application/openmetrics-text;q=0.6,*/*"),
            Format::OpenMetrics
        );
    }

    proptest! {
        #[test]
        fn any_header_has_an_answer(header in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = format([header.as_slice()].into_iter());
        }
    }
}
