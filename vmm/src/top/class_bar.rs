//! A guest's memory as a bar of cells, one letter-like sign and one colour a class.

use ratatui::style::{Color, Style};
use ratatui::text::Span;

use overcommit::ledger::Classes;

/// A class's sign, colour and name. Without colours the sign alone tells classes apart.
const COUNT: usize = 7;
const CLASSES: [(&str, Color, &str); COUNT] = [
    ("█", Color::Blue, "private"),
    ("▓", Color::Green, "shared"),
    ("0", Color::Cyan, "zero"),
    ("o", Color::Magenta, "ballooned"),
    ("s", Color::Red, "swapped"),
    ("i", Color::Yellow, "image"),
    ("·", Color::DarkGray, "absent"),
];

fn pages(classes: &Classes) -> [u64; COUNT] {
    let Classes { private, shared, zero, ballooned, swapped, image, absent } = *classes;
    [private, shared, zero, ballooned, swapped, image, absent]
}

/// The cells of each class, together `width`: in proportion, but a class with any page gets a cell
/// where there is room.
fn cells(pages: [u64; COUNT], width: usize) -> [usize; COUNT] {
    let total: u128 = pages.iter().map(|p| u128::from(*p)).sum();
    let mut cells = [0; COUNT];
    if total == 0 {
        return cells;
    }
    let present = pages.iter().filter(|p| **p > 0).count();
    let least = usize::from(present <= width);
    for (cell, pages) in cells.iter_mut().zip(pages) {
        let exact = (u128::from(pages) * width as u128 / total) as usize;
        *cell = if pages > 0 { exact.max(least) } else { 0 };
    }
    // Cells lost by rounding go to the class furthest below its part, excess ones come from the
    // class furthest above.
    let off = |cells: &[usize; COUNT], n: usize| {
        u128::from(pages[n]) as i128 * width as i128 - cells[n] as i128 * total as i128
    };
    while cells.iter().sum::<usize>() < width {
        let most = (0..COUNT).max_by_key(|n| off(&cells, *n)).unwrap_or(0);
        cells[most] += 1;
    }
    while cells.iter().sum::<usize>() > width {
        let least = (0..COUNT).filter(|n| cells[*n] > least).min_by_key(|n| off(&cells, *n)).unwrap_or(0);
        cells[least] = cells[least].saturating_sub(1);
    }
    cells
}

pub(super) fn bar(classes: &Classes, width: usize) -> Vec<Span<'static>> {
    cells(pages(classes), width)
        .iter()
        .zip(CLASSES)
        .filter(|(cells, _)| **cells > 0)
        .map(|(cells, (sign, color, _))| Span::styled(sign.repeat(*cells), Style::new().fg(color)))
        .collect()
}

/// The legend.
pub(super) fn legend() -> Vec<Span<'static>> {
    CLASSES
        .iter()
        .flat_map(|(sign, color, name)| {
            [Span::styled(*sign, Style::new().fg(*color)), Span::raw(format!(" {name}  "))]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_are_in_proportion_and_none_is_lost() {
        assert_eq!(cells([50, 25, 0, 0, 0, 0, 25], 8), [4, 2, 0, 0, 0, 0, 2]);
        assert_eq!(cells([1, 0, 0, 0, 0, 0, 1_000_000], 8), [1, 0, 0, 0, 0, 0, 7]);
        assert_eq!(cells([1, 1, 1, 1, 1, 1, 1_000_000], 8), [1, 1, 1, 1, 1, 1, 2]);
        assert_eq!(cells([1, 1, 1, 0, 0, 0, 0], 2).iter().sum::<usize>(), 2);
        assert_eq!(cells([0; COUNT], 8), [0; COUNT]);
    }

    proptest! {
        #[test]
        fn a_bar_is_as_long_as_it_is_to_be(pages in proptest::array::uniform7(0u64..1 << 50), width in 0usize..200) {
            let cells = cells(pages, width);
            let present = pages.iter().filter(|p| **p > 0).count();
            prop_assert_eq!(cells.iter().sum::<usize>(), if present == 0 { 0 } else { width });
            for (cells, pages) in cells.iter().zip(pages) {
                prop_assert!(pages > 0 || *cells == 0);
                prop_assert!(pages == 0 || *cells > 0 || present > width);
            }
        }
    }
}
