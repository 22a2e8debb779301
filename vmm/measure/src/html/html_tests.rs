use super::svg::{shortened, ticks, ticks_within};
use super::*;

fn page() -> Page {
    let strings = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let items = vec![
        Item::KeyValues(vec![("saved".into(), "12 MiB".into())]),
        Item::Notes(strings(&["a < b", "c"])),
        Item::Table(Table { header: strings(&["a", "b"]), rows: vec![strings(&["<x>", "3"])] }),
        Item::Bars(Bars {
            title: "bars".into(),
            unit: "MiB".into(),
            series: strings(&["zero", "rest"]),
            bars: vec![("one & only".into(), vec![1.0, 2.0]), ("nothing".into(), vec![0.0, 0.0])],
        }),
        Item::Lines(Lines {
            title: "lines".into(),
            x: "seconds".into(),
            y: "MiB".into(),
            series: vec![("a".into(), vec![(0.0, 1.0), (1.0, 4.0)]), ("none".into(), vec![])],
        }),
        Item::Histogram(Histogram {
            bins: vec![("1".into(), 5.0), ("2".into(), 0.0)],
            ..Histogram::default()
        }),
        Item::Matrix(Matrix {
            title: "pairs".into(),
            unit: "pages".into(),
            labels: strings(&["a", "b"]),
            values: vec![vec![4.0, 1.0], vec![1.0, 0.0]],
        }),
    ];
    let section = Section { heading: "1 < 2".into(), text: "all".into(), items };
    Page { title: "t<script>".into(), lead: String::new(), sections: vec![section] }
}

/// Every element that is opened is closed, in order.
fn is_well_formed(html: &str) -> bool {
    let mut open = Vec::new();
    for tag in html.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').unwrap_or((tag, ""));
        let name = tag.split([' ', '\n']).next().unwrap_or("");
        match name.strip_prefix('/') {
            Some(closed) if open.pop() != Some(closed) => return false,
            Some(_) => {}
            None if tag.ends_with('/') || ["!doctype", "meta"].contains(&name) => {}
            None => open.push(name),
        }
    }
    open.is_empty()
}

#[test]
fn a_page_stands_alone_and_means_what_it_says() {
    let html = page().to_string();
    assert!(is_well_formed(&html), "{html}");
    assert!(!html.contains("http") && !html.contains("<script") && !html.contains("url("), "{html}");
    assert!(html.contains("&lt;x&gt;") && html.contains("one &amp; only") && html.contains("1 &lt; 2"));
    assert!(html.contains("<li>a &lt; b</li>\n<li>c</li>"), "{html}");
    assert!(html.contains("prefers-color-scheme:dark") && !html.contains("NaN") && !html.contains("inf\""));
    assert_eq!(html.matches("<svg").count(), 4);
}

#[test]
fn marks_are_as_long_as_their_values() {
    let widths: Vec<f64> = page()
        .to_string()
        .lines()
        .filter(|line| line.contains("one &amp; only") && line.starts_with("<rect"))
        .filter_map(|line| line.split("width=\"").nth(1)?.split('"').next()?.parse().ok())
        .collect();
    assert!(widths.len() == 2 && (widths[1] / widths[0] - 2.0).abs() < 0.01, "{widths:?}");
}

#[test]
fn empty_plots_are_drawn_too() {
    let items = vec![
        Item::Bars(Bars::default()),
        Item::Lines(Lines::default()),
        Item::Histogram(Histogram::default()),
        Item::Matrix(Matrix::default()),
        Item::Table(Table::default()),
    ];
    let page = Page { sections: vec![Section { items, ..Section::default() }], ..Page::default() };
    let html = page.to_string();
    assert!(is_well_formed(&html) && !html.contains("NaN") && !html.contains("inf"), "{html}");
}

#[test]
fn axes_have_round_numbers_and_reach_the_top() {
    assert_eq!(ticks(100.0), [0.0, 25.0, 50.0, 75.0, 100.0]);
    assert_eq!(ticks(0.0), [0.0, 1.0]);
    for most in [0.003, 1.0, 7.0, 1234.5, 8e9] {
        let ticks = ticks(most);
        assert!(
            *ticks.last().unwrap() >= most * 0.999 && (2..=6).contains(&ticks.len()),
            "{most}: {ticks:?}"
        );
    }
}

#[test]
fn an_axis_between_two_values_has_round_numbers_within_them() {
    assert_eq!(ticks_within(1.1, 13.5), [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]);
    assert_eq!(ticks_within(3.0, 3.0), [3.0]);
    for (first, last) in [(0.0, 1.0), (0.31, 0.37), (-4.0, 9.0), (1e6, 3e6), (0.0, 1e-9)] {
        let ticks = ticks_within(first, last);
        assert!((3..=9).contains(&ticks.len()), "{first} to {last}: {ticks:?}");
        assert!(ticks[0] >= first && *ticks.last().unwrap() <= last * (1.0 + 1e-9), "{ticks:?}");
    }
}

#[test]
fn a_long_legend_takes_several_lines_and_the_plot_makes_room() {
    let series = |count: usize| {
        let series = (0..count).map(|n| (format!("a contender, round {n}"), vec![(0.0, 1.0), (1.0, 2.0)]));
        let lines = Lines { series: series.collect(), ..Lines::default() };
        let section = Section { items: vec![Item::Lines(lines)], ..Section::default() };
        Page { sections: vec![section], ..Page::default() }.to_string()
    };
    let number_after = |text: &str, name: &str| -> Vec<f64> {
        text.split(name).skip(1).filter_map(|rest| rest.split(['"', ' ']).next()?.parse().ok()).collect()
    };
    let (short, long) = (series(2), series(9));
    let height = |html: &str| number_after(html, "viewBox=\"0 0 760 ")[0];
    assert!(height(&long) > height(&short));
    for html in [short, long] {
        assert!(number_after(&html, " x=\"").iter().all(|x| *x < 740.0), "{html}");
        let names = html.lines().filter(|line| line.starts_with("<rect"));
        let lowest = names.flat_map(|line| number_after(line, " y=\"")).fold(0.0, f64::max);
        let dots = number_after(&html, "cy=\"");
        assert!(dots.iter().all(|y| *y > lowest + 10.0), "{lowest} {dots:?}");
    }
}

#[test]
fn a_column_is_of_numbers_if_all_of_it_is() {
    let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
    let rows = vec![row(["at once", "1.5", ""]), row(["5 s later", "-2", "7"])];
    let table = Table { header: row(["when", "s", "pages"]), rows };
    let html = Item::Table(table).to_string();
    assert!(html.contains("<td>5 s later</td><td class=\"n\">-2</td><td class=\"n\">7</td>"), "{html}");
    assert!(html.contains("<th>when</th><th class=\"n\">s</th>"), "{html}");
}

#[test]
fn numbers_and_labels_are_for_people() {
    let texts = [0.0, 0.25, 12.34, 999.0, 1234.0, 1_234_567.8, -1000.0].map(number);
    assert_eq!(texts, ["0", "0.250", "12.3", "999", "1\u{a0}234", "1\u{a0}234\u{a0}568", "-1\u{a0}000"]);
    assert_eq!(shortened("/a/long/path/to/an/image.mem", 12), "/a/l\u{2026}age.mem");
    assert_eq!(shortened("short", 12), "short");
}
