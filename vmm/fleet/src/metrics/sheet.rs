//! What metrics are written to: each with its fleet, its unit in its name, and its help.

use super::text::{Family, Kind};

/// What all names begin with.
const PREFIX: &str = "samepage";

/// Labels and a value.
pub(super) type Sample<'s> = (Vec<(&'s str, &'s str)>, f64);

/// What metrics are written to.
pub(super) struct Sheet<'f> {
    fleet: &'f str,
    families: Vec<Family>,
}

/// What a number is of.
#[derive(Clone, Copy)]
pub(super) enum Of {
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// Parts of one.
    Ratio,
    /// A count, or yes (1) and no (0).
    Nothing,
}

impl Of {
    fn unit(self) -> Option<&'static str> {
        match self {
            Self::Bytes => Some("bytes"),
            Self::BytesPerSecond => Some("bytes_per_second"),
            Self::Seconds => Some("seconds"),
            Self::Ratio => Some("ratio"),
            Self::Nothing => None,
        }
    }
}

impl<'f> Sheet<'f> {
    /// An empty one, of the fleet called `fleet`.
    pub(super) fn new(fleet: &'f str) -> Self {
        Self { fleet, families: Vec::new() }
    }

    pub(super) fn into_families(self) -> Vec<Family> {
        self.families
    }

    /// What can go up and down. The unit is added to the name.
    pub(super) fn gauge<'s>(
        &mut self,
        name: &str,
        of: Of,
        help: &'static str,
        samples: impl IntoIterator<Item = Sample<'s>>,
    ) {
        self.add(name, Kind::Gauge, of, help, samples);
    }

    /// What only goes up while the daemon lives. The unit and `_total` are added to the name.
    pub(super) fn counter<'s>(
        &mut self,
        name: &str,
        of: Of,
        help: &'static str,
        samples: impl IntoIterator<Item = Sample<'s>>,
    ) {
        self.add(name, Kind::Counter, of, help, samples);
    }

    pub(super) fn add<'s>(
        &mut self,
        name: &str,
        kind: Kind,
        of: Of,
        help: &'static str,
        samples: impl IntoIterator<Item = Sample<'s>>,
    ) {
        let unit = of.unit();
        let name = match unit {
            Some(unit) => format!("{PREFIX}_{name}_{unit}"),
            None => format!("{PREFIX}_{name}"),
        };
        let samples = samples.into_iter().map(|(labels, value)| {
            let labels = [("fleet", self.fleet)].into_iter().chain(labels);
            (labels.map(|(label, value)| (label.to_owned(), value.to_owned())).collect(), value)
        });
        let samples = samples.collect();
        self.families.push(Family { name, kind, unit, help, samples });
    }
}
