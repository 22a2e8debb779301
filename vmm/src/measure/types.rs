//! Pages by what their guests' kernels use them for.

use guest::page_type::PageType;
use serde::{Deserialize, Serialize};

use super::subjects::Subjects;
use measure::MeasureError;
use measure::page_types::{TYPES, TypeCounts};
use measure::scan::Scan;

/// One type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TypeRow {
    /// Its name.
    #[serde(rename = "type")]
    pub(super) name: String,
    /// Its pages.
    #[serde(flatten)]
    pub(super) counts: TypeCounts,
}

/// One guest's pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GuestTypes {
    /// Its name.
    pub(super) guest: String,
    /// By type.
    pub(super) types: Vec<TypeRow>,
}

/// Pages by type, of those guests of which it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ByType {
    /// All guests' together.
    pub(super) types: Vec<TypeRow>,
    /// Each guest's.
    pub(super) guests: Vec<GuestTypes>,
}

fn rows(counts: &[TypeCounts; TYPES]) -> Vec<TypeRow> {
    let row = |(kind, counts): (PageType, &TypeCounts)| TypeRow { name: kind.name().into(), counts: *counts };
    PageType::ALL.into_iter().zip(counts).filter(|(_, counts)| counts.pages > 0).map(row).collect()
}

impl ByType {
    /// None: of no guest it is known, or the memory was read more than once.
    pub(super) fn of(subjects: &Subjects, scan: &Scan) -> Result<Option<Self>, MeasureError> {
        let Some(by_type) = &scan.by_type else { return Ok(None) };
        let (mut all, mut guests) = ([TypeCounts::default(); TYPES], Vec::new());
        for (n, (subject, counts)) in subjects.subjects.iter().zip(by_type).enumerate() {
            let Some(types) = &subjects.page_types[n] else { continue };
            let mut counts = *counts;
            if let Some(space) = subjects.spaces.get(n) {
                let shared = types.shared(space)?;
                counts.iter_mut().zip(shared).for_each(|(counts, shared)| counts.shared_now = shared);
            }
            all.iter_mut().zip(&counts).for_each(|(all, counts)| all.add(counts));
            guests.push(GuestTypes { guest: subject.name.clone(), types: rows(&counts) });
        }
        Ok((!guests.is_empty()).then(|| Self { types: rows(&all), guests }))
    }
}
