//! Pictures of `samepage top`, drawn on a terminal that is only a buffer.

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::*;
use crate::top::state::{Key, Sort};
use fleet::action_log::ActionLog;
use overcommit::action::Action;
use overcommit::ledger::{Account, Classes, Cover, Debt};
use overcommit::view::{BalloonView, GuestView, HostView};

/// `guests` guests of 256 MiB; the first is throttled, the second dead.
fn management(guests: usize) -> Management {
    let name = |n| format!("guest-{n:02}");
    let classes =
        Classes { private: 16_384, shared: 16_384, ballooned: 8192, absent: 24_576, ..Classes::default() };
    let views = (0..guests).map(|n| GuestView {
        name: name(n),
        promised_pages: 65_536,
        frames: 20_000.0,
        balloon: (n != 1).then_some(BalloonView { target_pages: 10_240, actual_pages: 8192 }),
        throttle_pages_per_second: (n == 0).then_some(512),
        state: if n == 1 { GuestState::Dead } else { GuestState::Running },
        ..GuestView::default()
    });
    let accounts =
        (0..guests).map(|n| Account { name: name(n), promised: 65_536, classes, ..Account::default() });
    let ledger = Ledger {
        guests: accounts.collect(),
        promised: 65_536 * guests as u64,
        debt: Debt { sharing: 51_200, demand: 76_800 },
        cover: Cover { free: 64_000, ..Cover::default() },
        cover_ratio: Some(0.5),
        ..Ledger::default()
    };
    let mut action_log = ActionLog::default();
    let action = Action::Balloon { guest: 0, target_pages: 10_240 };
    action_log.add(Entry::new(&action, Some("guest-00".into()), Some("it disconnected".into()), 12.5));
    let host = HostView {
        now_seconds: 13.0,
        capacity_pages: 262_144,
        used_pages: 65_536,
        free_pages: 196_608,
        ..HostView::default()
    };
    Management {
        memory_state: MemoryState::Hard,
        host: Some(host),
        guests: views.collect(),
        ledger: Some(ledger),
        ledger_seconds: (0.01, 1.0),
        acting: true,
        action_log,
        ..Management::default()
    }
}

fn top(guests: usize) -> Top {
    let mut top = Top::new("web".into(), Sort::Name);
    top.saw(management(guests));
    top
}

/// The lines of a terminal of this size, and the colour of the cell where `find` is.
fn picture(top: &Top, width: u16, height: u16, find: &str) -> (Vec<String>, Option<Color>) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, top, 20.0)).unwrap();
    let buffer = terminal.backend().buffer();
    let row = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<Vec<_>>();
    let lines: Vec<String> = (0..height).map(|y| row(y).concat()).collect();
    let color = lines.iter().enumerate().find_map(|(y, line)| {
        let x = line[..line.find(find)?].chars().count() as u16;
        Some(buffer[(x, y as u16)].fg)
    });
    (lines, color)
}

#[track_caller]
fn assert_shows(lines: &[String], expected: &[&str]) {
    for text in expected {
        assert!(lines.iter().any(|line| line.contains(text)), "{text:?} is not in\n{}", lines.join("\n"));
    }
}

#[test]
fn the_smallest_terminal_shows_everything() {
    let (lines, color) = picture(&top(3), 80, 24, "hard");
    assert_shows(
        &lines,
        &[
            "samepage top  fleet web  memory state: hard  3 guests, 1 dead",
            "capacity 1.0G  used 256.0M (25 %)  free 768.0M  promised 768.0M (3.00 x used)",
            "debt 500.0M (sharing 200.0M, demand 300.0M)  cover 250.0M, 0.50 x debt",
            "saved 0/s  balloons 0/s  free ",
            "█ private  ▓ shared  0 zero  o ballooned  s swapped  i image  · absent",
            "guest↓",
            "██▓▓o···",
            "guest-00 run ",
            "32.0M/40.0M",
            "  2.0M ",
            "guest-01 dead",
            " actions: 1, 1 failed ",
            "12.5 s  guest-00: balloon to 40.0 MiB  failed: it disconnected",
            "q quit  s sort: name  r reverse  p hold  ? help",
        ],
    );
    assert_eq!(color, Some(Color::LightRed));
    assert!(lines.iter().all(|line| !line.contains("wset")));
    let (wide, _) = picture(&top(3), 120, 40, "");
    assert_shows(&wide, &["wset", "resid", "guest-02 run"]);
}

#[test]
fn a_silent_guest_is_shown_with_its_time() {
    let mut management = management(3);
    management.guests[2].state = GuestState::Silent;
    management.guests[2].silent_seconds = Some(12.3);
    management.guests[2].age_seconds = Some(13.4);
    let mut top = Top::new("web".into(), Sort::Name);
    top.saw(management);
    let (lines, _) = picture(&top, 140, 24, "");
    assert_shows(&lines, &["3 guests, 1 dead, 1 silent for 12 s", "guest-02 mute", " 13s"]);
}

#[test]
fn a_small_terminal_shows_the_size_needed() {
    for (width, height) in [(79, 24), (80, 23), (40, 10)] {
        let (lines, _) = picture(&top(3), width, height, "");
        let text = lines.join(" ").split_whitespace().collect::<Vec<_>>().join(" ");
        let expected = format!("This terminal is {width}x{height}; samepage top needs 80x24.");
        assert!(text.contains(&expected), "{text}");
    }
}

#[test]
fn no_size_is_too_strange() {
    let mut top = top(300);
    top.press(Key::Help);
    for width in [1, 2, 79, 80, 81, 95, 300] {
        for height in [1, 2, 23, 24, 25, 36, 100] {
            let _ = picture(&top, width, height, "");
        }
    }
}

#[test]
fn the_last_page_of_the_list_is_full() {
    let mut top = top(40);
    let (lines, _) = picture(&top, 80, 24, "");
    assert_shows(&lines, &["guest-00"]);
    top.press(Key::End);
    let (lines, _) = picture(&top, 80, 24, "");
    let shown: Vec<_> = lines.iter().filter(|line| line.starts_with("guest-")).collect();
    assert!(shown.len() == 11 && shown[10].starts_with("guest-39"), "{}", lines.join("\n"));
}

#[test]
fn a_missing_daemon_is_shown() {
    let mut gone = top(3);
    gone.missed("the daemon is gone".into(), 8.0);
    let (lines, color) = picture(&gone, 80, 24, "the daemon is gone (for 12 s;");
    assert_shows(
        &lines,
        &["the daemon is gone (for 12 s; these are its last numbers; trying again)", "guest-02"],
    );
    assert_eq!(color, Some(Color::Red));
    let mut never = Top::new("web".into(), Sort::Name);
    assert_shows(&picture(&never, 80, 24, "").0, &["waiting for the daemon", "q quit"]);
    never.missed("the daemon is gone".into(), 8.0);
    assert_shows(&picture(&never, 80, 24, "").0, &["the daemon is gone; trying again"]);
}

#[test]
fn holding_and_keys_are_shown() {
    let mut top = top(3);
    top.press(Key::Pause);
    top.press(Key::Reverse);
    assert_shows(&picture(&top, 80, 24, "").0, &["display held", "p go on", "guest↑"]);
    top.press(Key::Help);
    assert_shows(
        &picture(&top, 80, 24, "").0,
        &["sort the other way round", "touch, limit: first touches each second."],
    );
}

#[test]
fn what_is_not_known_yet_is_left_out() {
    let mut top = Top::new("web".into(), Sort::Name);
    top.saw(Management::default());
    assert_shows(
        &picture(&top, 80, 24, "").0,
        &["memory state: high  0 guests  watched only", "asks for no policy"],
    );
}
