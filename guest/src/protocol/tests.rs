//! Round trips, limits, and rubbish.

use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

use proptest::prelude::*;

use super::*;
use crate::page_type::PageType;

/// More pages than 64 bits can address; a report of such counts still fits in a line.
const COUNT_MAX: u64 = 1 << 52;

/// A balloon's size is a number of 32 bits; what it counts stays below this, and so do its
/// features.
const BALLOON_MAX: u64 = 1 << 39;

fn mix() -> impl Strategy<Value = Mix> {
    (0_u8..=100, 0_u8..=100, 0_u8..=100).prop_map(|(a, b, c)| {
        let mut cuts = [a, b, c];
        cuts.sort_unstable();
        let [a, b, c] = cuts;
        Mix::new(a, b - a, c - b, 100 - c).unwrap()
    })
}

fn target() -> impl Strategy<Value = Target> {
    (0_u8..5).prop_map(|code| Class::from_code(code).map_or(Target::All, Target::Only))
}

fn class() -> impl Strategy<Value = Class> {
    prop::sample::select(&Class::ALL[..])
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        (any::<u64>(), any::<u64>(), mix(), any::<Option<u64>>())
            .prop_map(|(seed, common, mix, pages)| { Command::Fill(Fill { seed, common, mix, pages }) }),
        (target(), any::<u64>(), any::<Option<u64>>()).prop_map(|(target, rate, seconds)| Command::Churn {
            target,
            rate,
            seconds
        }),
        (target(), any::<u64>(), any::<Option<u64>>()).prop_map(|(target, rate, seconds)| Command::Latency {
            target,
            rate,
            seconds
        }),
        (0_u8..=100).prop_map(|percent| Command::Free { percent }),
        balloon().prop_map(Command::Balloon),
        any::<u64>().prop_map(|from| Command::Frames { from }),
        disk().prop_map(Command::Disk),
        (class(), 0_u32..64, any::<bool>()).prop_map(|(class, power, packed)| {
            Command::Chase(Chase { class, nodes: 1 << power, packed })
        }),
        (class(), any::<u64>()).prop_map(|(class, cpus)| Command::Touch(Touch { class, cpus })),
        (0..=MAX_SLEEP_MILLIS).prop_map(|millis| Command::Clock { millis }),
        any::<[[u8; 6]; 2]>().prop_map(|[was, is]| Command::Mac { was: Mac(was), is: Mac(is) }),
        prop::sample::select(std::vec![
            Command::Verify,
            Command::Idle,
            Command::Report,
            Command::Random,
            Command::Poweroff,
            Command::Reboot
        ]),
    ]
}

fn disk() -> impl Strategy<Value = Disk> {
    prop_oneof![
        (any::<u64>(), 1..=MAX_DISK_PAGES, any::<Option<u64>>())
            .prop_map(|(first, pages, seed)| Disk::Read { first, pages, seed }),
        Just(Disk::Drop),
    ]
}

fn balloon() -> impl Strategy<Value = Balloon> {
    prop_oneof![
        any::<u64>().prop_map(|pages| Balloon::Touch { pages }),
        prop::sample::select(&Hostile::ALL[..]).prop_map(Balloon::Hostile),
        prop::sample::select(std::vec![Balloon::Report, Balloon::Check, Balloon::Off, Balloon::On]),
    ]
}

fn balloon_done() -> impl Strategy<Value = BalloonDone> {
    let drives = std::vec![Drive::Off, Drive::On, Drive::Leaving, Drive::Broken];
    let stands = std::vec![Hinting::Idle, Hinting::Running, Hinting::Finished];
    let states = (prop::sample::select(drives), prop::sample::select(stands), any::<u32>());
    let report = (states, 0..BALLOON_MAX, proptest::array::uniform7(0..=BALLOON_MAX)).prop_map(
        |(
            (drive, hinting, hint_cmd),
            features,
            [target, actual, given, free, reported, hinted, statistics],
        )| {
            BalloonDone::Report(BalloonReport {
                drive,
                features,
                target,
                actual,
                given,
                free,
                reported,
                hinted,
                hinting,
                hint_cmd,
                statistics,
            })
        },
    );
    prop_oneof![
        report,
        any::<[u64; 2]>().prop_map(|[checked, nonzero]| BalloonDone::Check { checked, nonzero }),
        any::<u64>().prop_map(|touched| BalloonDone::Touch { touched }),
        any::<u64>().prop_map(|features| BalloonDone::On { features }),
        (prop::sample::select(&Hostile::ALL[..]), any::<bool>(), any::<u32>())
            .prop_map(|(kind, completed, status)| BalloonDone::Hostile { kind, completed, status }),
        Just(BalloonDone::Off),
    ]
}

fn frames() -> impl Strategy<Value = Frames> {
    let types = prop::collection::vec(prop::sample::select(&PageType::ALL[..]), 0..MAX_RUNS);
    (any::<u64>(), types).prop_map(|(next, types)| {
        let mut runs = FrameRuns::new();
        assert!(types.into_iter().all(|kind| runs.push(kind)));
        Frames { next, runs }
    })
}

fn done() -> impl Strategy<Value = Done> {
    let report = proptest::array::uniform9(0..=COUNT_MAX).prop_map(
        |[filled, zero, common, dup, unique, generations, churned, verified, mismatched]| {
            let classes = [zero, common, dup, unique];
            Done::Report(Report { filled, classes, generations, churned, verified, mismatched })
        },
    );
    prop_oneof![
        any::<u64>().prop_map(|pages| Done::Fill { pages }),
        any::<u64>().prop_map(|rate| Done::Churn { rate }),
        any::<[u64; 7]>().prop_map(|[writes, p50_ns, p99_ns, p999_ns, max_ns, late_p99_us, late_max_us]| {
            Done::Latency(Latency { writes, p50_ns, p99_ns, p999_ns, max_ns, late_p99_us, late_max_us })
        }),
        (any::<u64>(), any::<u64>(), any::<Option<u64>>())
            .prop_map(|(checked, mismatched, first)| { Done::Verify { checked, mismatched, first } }),
        (any::<u64>(), any::<u64>()).prop_map(|(freed, filled)| Done::Free { freed, filled }),
        prop::sample::select(std::vec![Done::Idle, Done::Poweroff, Done::Reboot]),
        report,
        balloon_done().prop_map(Done::Balloon),
        frames().prop_map(Done::Frames),
        any::<[u64; 3]>().prop_map(|[pages, wrong, ns]| Done::Disk(DiskDone::Read { pages, wrong, ns })),
        Just(Done::Disk(DiskDone::Drop)),
        any::<u64>().prop_map(|number| Done::Random { number }),
        any::<u64>().prop_map(|interfaces| Done::Mac { interfaces }),
        any::<[u64; 4]>().prop_map(|[accesses, batches, best_ticks, median_ticks]| {
            Done::Chase(Chased { accesses, batches, best_ticks, median_ticks })
        }),
        any::<[u64; 5]>().prop_map(|[cpus, reads, late, late_us, away]| {
            Done::Touch(Touched { cpus, reads, late, late_us, away })
        }),
        any::<[u64; 4]>().prop_map(|[slept_us, cpus, readings, backward]| {
            Done::Clock(Clock { slept_us, cpus, readings, backward })
        }),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    let message = || "[!-~]([ -~]{0,158}[!-~])?".prop_map(Text::of);
    let codes = std::vec![
        ErrorCode::Parse,
        ErrorCode::Busy,
        ErrorCode::Cancelled,
        ErrorCode::Memory,
        ErrorCode::Empty,
        ErrorCode::Failed,
        ErrorCode::Unsupported
    ];
    prop_oneof![
        (any::<bool>(), any::<[u64; 3]>()).prop_map(|(linux, [pages, base, mem_pages])| {
            let kind = if linux { Kind::Linux } else { Kind::Builtin };
            Reply::Ready(Ready { kind, pages, base, mem_pages })
        }),
        any::<[u64; 2]>().prop_map(|[done, total]| Reply::Progress { done, total }),
        done().prop_map(Reply::Ok),
        (prop::sample::select(codes), message()).prop_map(|(code, message)| Reply::Err { code, message }),
        any::<u64>().prop_map(|number| Reply::Generation { number }),
        message().prop_map(|message| Reply::Panic { message }),
    ]
}

/// Feeds a line to a reader and returns what it hands out.
fn through_reader(reader: &mut LineReader, bytes: &[u8]) -> Option<Result<String, ParseError>> {
    let mut out = None;
    for byte in bytes {
        assert!(out.is_none(), "a line ended early");
        out = reader.push(*byte).map(|line| line.map(str::to_string));
    }
    out
}

proptest! {
    #[test]
    fn commands_round_trip(command in command(), before in any::<Vec<u8>>()) {
        let line = std::format!("{command}\r\n");
        prop_assert!(line.len() <= MAX_LINE);
        prop_assert_eq!(Command::parse(&line), Ok(command));
        let mut reader = LineReader::new();
        for byte in before {
            let _ = reader.push(byte);
        }
        reader.clear();
        let read = through_reader(&mut reader, line.as_bytes()).unwrap().unwrap();
        prop_assert_eq!(Command::parse(&read), Ok(command));
    }

    #[test]
    fn replies_round_trip(reply in reply()) {
        let line = std::format!("{reply}\n");
        prop_assert!(line.len() <= MAX_LINE, "{} bytes", line.len());
        prop_assert_eq!(Reply::parse(&line), Ok(reply));
    }

    #[test]
    fn mixes_round_trip(mix in mix()) {
        prop_assert_eq!(mix.to_string().parse(), Ok(mix));
    }

    #[test]
    fn rubbish_is_an_error_that_fits_in_a_reply(line in "\\PC*", bytes in any::<Vec<u8>>()) {
        for error in [Command::parse(&line).err(), Reply::parse(&line).err()].into_iter().flatten() {
            let reply = Reply::not_understood(error).to_string();
            prop_assert!(reply.len() < MAX_LINE);
        }
        let mut reader = LineReader::new();
        for byte in bytes {
            if let Some(Ok(line)) = reader.push(byte) {
                let _ = (Command::parse(line), Reply::parse(line));
            }
        }
    }

    #[test]
    fn a_damaged_line_never_panics(command in command(), reply in reply(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        for line in [command.to_string(), reply.to_string()] {
            let mut bytes = line.into_bytes();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            let line = String::from_utf8_lossy(&bytes);
            let _ = (Command::parse(&line), Reply::parse(&line));
        }
    }
}

#[test]
fn errors_say_what_was_expected() {
    for (line, message) in [
        ("", "empty line, expected a command"),
        (
            "fly",
            "\"fly\" is unknown, expected fill, churn, latency, verify, free, idle, report, balloon, frames, disk, chase, touch, random, clock, mac, poweroff or reboot",
        ),
        ("mac was=02:00:00:00:00:01", "is= is missing"),
        (
            "mac was=02:00:00:00:00:0 is=1",
            "was=02:00:00:00:00:0, expected an address such as 02:00:00:00:00:01",
        ),
        ("balloon", "\"\" is unknown, expected report, check, touch, off, on or hostile"),
        ("balloon pop", "\"pop\" is unknown, expected report, check, touch, off, on or hostile"),
        ("balloon touch", "pages= is missing"),
        ("disk", "\"\" is unknown, expected read or drop"),
        ("disk write", "\"write\" is unknown, expected read or drop"),
        ("disk read pages=1", "first= is missing"),
        ("disk read first=0 pages=0", "pages=0, expected a number from 1 to 65536"),
        ("disk read first=0 pages=65537", "pages=65537, expected a number from 1 to 65536"),
        ("disk drop now=1", "unknown key \"now\", expected no key"),
        ("free", "percent= is missing"),
        ("free percent=101", "percent=101, expected a percentage from 0 to 100"),
        ("free percent=+1", "percent=+1, expected a percentage from 0 to 100"),
        ("free percent=1 percent=2", "percent= stands twice"),
        ("free percent", "\"percent\" is no key=value"),
        ("verify now=1", "unknown key \"now\", expected no key"),
        ("churn class=some rate=1", "class=some, expected zero, common, dup, unique or all"),
        (
            "churn class=all rate=18446744073709551616",
            "rate=18446744073709551616, expected a number below 2^64",
        ),
        (
            "fill seed=1 common=2 zero=1 common_pct=2 dup=3 unique=4",
            "zero + common_pct + dup + unique is 10, expected 100",
        ),
        ("idle \u{7}", "byte 0x07 in a line, expected printable ASCII"),
    ] {
        assert_eq!(
            Command::parse(line).map_err(|error| error.to_string()),
            Err(message.to_string()),
            "{line}"
        );
    }
}

#[test]
fn an_overlong_line_is_reported_once_and_the_next_is_read() {
    let mut reader = LineReader::new();
    let mut line = [b'x'; 1000];
    line[999] = b'\n';
    assert_eq!(through_reader(&mut reader, &line), Some(Err(ParseError::TooLong)));
    assert_eq!(through_reader(&mut reader, b"idle\n"), Some(Ok("idle".to_string())));
}

#[test]
fn backspace_takes_back() {
    let mut reader = LineReader::new();
    assert!(through_reader(&mut reader, b"idlx").is_none());
    assert!(reader.pop());
    assert_eq!(through_reader(&mut reader, b"e\n"), Some(Ok("idle".to_string())));
    assert!(!reader.pop());
}

#[test]
fn the_longest_lines_fit() {
    let report = Report {
        filled: COUNT_MAX,
        classes: [COUNT_MAX; 4],
        generations: COUNT_MAX,
        churned: COUNT_MAX,
        verified: COUNT_MAX,
        mismatched: COUNT_MAX,
    };
    let balloon = BalloonReport {
        drive: Drive::Leaving,
        features: BALLOON_MAX,
        target: BALLOON_MAX,
        actual: BALLOON_MAX,
        given: BALLOON_MAX,
        free: BALLOON_MAX,
        reported: BALLOON_MAX,
        hinted: BALLOON_MAX,
        hinting: Hinting::Finished,
        hint_cmd: u32::MAX,
        statistics: BALLOON_MAX,
    };
    assert!(Reply::Ok(Done::Balloon(BalloonDone::Report(balloon))).to_string().len() < MAX_LINE);
    let latency = Latency {
        writes: u64::MAX,
        p50_ns: u64::MAX,
        p99_ns: u64::MAX,
        p999_ns: u64::MAX,
        max_ns: u64::MAX,
        late_p99_us: u64::MAX,
        late_max_us: u64::MAX,
    };
    assert!(Reply::Ok(Done::Latency(latency)).to_string().len() < MAX_LINE);
    assert!(Reply::Ok(Done::Report(report)).to_string().len() < MAX_LINE);
    // 32 runs of 99999 frames each.
    let mut runs = FrameRuns::new();
    let types = [PageType::Free, PageType::Slab].into_iter().cycle();
    assert!(types.take(MAX_RUNS).all(|kind| (0..99_999).all(|_| runs.push(kind))));
    let frames = Reply::Ok(Done::Frames(Frames { next: u64::MAX, runs })).to_string();
    assert!(frames.len() > 230 && frames.len() < MAX_LINE, "{frames}");
}
