//! Pages by their use in the guests' kernels.

use guest::page_type::PageType;
use serde::{Deserialize, Serialize};

use super::subjects::Subjects;
use measure::MeasureError;
use measure::page_types::{TYPES, TypeCounts};
use measure::scan::Scan;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct TypeRow {
    #[serde(rename = "type")]
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) counts: TypeCounts,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct GuestTypes {
    pub(super) guest: String,
    /// By type.
    pub(super) types: Vec<TypeRow>,
}

/// Pages by type, of the guests for which it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ByType {
    pub(super) types: Vec<TypeRow>,
    pub(super) guests: Vec<GuestTypes>,
}

fn rows(counts: &[TypeCounts; TYPES]) -> Vec<TypeRow> {
    let row = |(kind, counts): (PageType, &TypeCounts)| TypeRow { name: kind.name().into(), counts: *counts };
    PageType::ALL.into_iter().zip(counts).filter(|(_, counts)| counts.pages > 0).map(row).collect()
}

impl ByType {
    /// None if it is known for no guest, or the memory was read more than once.
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
