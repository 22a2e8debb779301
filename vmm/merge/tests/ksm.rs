//! KSM driven with a guard and with other owners, on the real kernel where we may drive it, on a
//! directory that looks like its knobs elsewhere. Whatever changes the host's KSM runs one at a
//! time.

#![expect(unsafe_code, reason = "madvise")]
#![expect(clippy::unwrap_used, reason = "what tests share fails as they do")]

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use measure::{Extent, Space, content, frames};
use memory::{Gpa, Hva, PAGE_BYTES};
use merge::ksm::{Availability, Knobs, Ksm, KsmSettings, available, left_behind_in};
use merge::{Engine, EngineError};
use rustix::fs::{FlockOperation, flock};
use rustix::mm::{Advice, madvise};
use rustix::process::{Pid, Signal, kill_process};

/// The other processes: `ksm_role.rs`.
const ROLE: &str = env!("CARGO_BIN_EXE_ksm-role");
const PAGE: usize = PAGE_BYTES as usize;

/// One at a time, over all test programs of this user: only root's change the host's KSM.
fn serial() -> fs::File {
    use std::os::unix::fs::MetadataExt;
    let user = fs::metadata("/proc/self").unwrap().uid();
    let path = std::env::temp_dir().join(format!("samepage-ksm-tests-{user}.lock"));
    let file = fs::File::options().create(true).truncate(false).write(true).open(path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    file
}

fn skipped(why: &str) {
    testing::skipped("merge::ksm", why);
}

fn guard_command() -> Vec<OsString> {
    [ROLE, "guard"].map(OsString::from).into()
}

fn knobs_of(directory: &Path) -> Knobs {
    Knobs(directory.to_owned())
}

fn lock_of(directory: &Path) -> PathBuf {
    directory.join("lock")
}

/// An engine on a directory that looks like KSM's knobs.
fn engine(directory: &Path) -> Ksm {
    Ksm::new(KsmSettings::fast())
        .with_guard_command(guard_command())
        .with_host(knobs_of(directory), lock_of(directory))
}

fn fake_knobs() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, value) in [
        ("run", "0"),
        ("pages_to_scan", "100"),
        ("sleep_millisecs", "20"),
        ("use_zero_pages", "0"),
        ("smart_scan", "1"),
        ("advisor_mode", "[none] scan-time"),
    ] {
        fs::write(directory.path().join(name), value).unwrap();
    }
    directory
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "no {what} within 30 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Another process that has started KSM, and its guard.
fn owner(role: &str) -> (Child, u32) {
    let mut owner = Command::new(ROLE).args(["owner", role]).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(owner.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let guard = line.strip_prefix("started ").and_then(|pid| pid.trim().parse().ok());
    (owner, guard.unwrap_or_else(|| panic!("it says {line:?}")))
}

/// As the out-of-memory killer may. The process is one that was started here, or its child, and is
/// not waited for yet.
fn kill(pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL).unwrap();
    let stat = format!("/proc/{pid}/stat");
    until("dead process", || fs::read_to_string(&stat).is_ok_and(|stat| stat.contains(") Z ")));
}

fn killed_owner_leaves_nothing(role: &str, knobs: &Knobs, engine: impl Fn() -> Ksm) {
    let before = knobs.save().unwrap();
    let (mut owner, _) = owner(role);
    assert!(knobs.running().unwrap());
    assert_ne!(knobs.save().unwrap(), before);

    match engine().start(&[]) {
        Err(error @ EngineError::Busy { .. }) => {
            assert!(error.to_string().contains(&owner.id().to_string()), "{error}");
        }
        other => panic!("two fleets drive KSM: {other:?}"),
    }
    assert!(knobs.running().unwrap(), "the one refused has stopped the other's");

    owner.kill().unwrap();
    owner.wait().unwrap();
    until("restored setting", || knobs.save().unwrap() == before);
    // And the lock is free again.
    until("free lock", || engine().start(&[]).is_ok());
    until("restored setting", || knobs.save().unwrap() == before);
}

#[test]
fn settings_survive_the_owners_sigkill() {
    let _serial = serial();
    let fake = fake_knobs();
    let directory = fake.path();
    killed_owner_leaves_nothing(directory.to_str().unwrap(), &knobs_of(directory), || engine(directory));
    match available() {
        Availability::Full => killed_owner_leaves_nothing("real", &Knobs::default(), || {
            Ksm::new(KsmSettings::fast()).with_guard_command(guard_command())
        }),
        other => skipped(&format!("the host's own KSM: {other:?}")),
    }
}

#[test]
fn settings_survive_the_guards_sigkill() {
    let fake = fake_knobs();
    let directory = fake.path();
    let (mut ksm, knobs, lock) = (engine(directory), knobs_of(directory), lock_of(directory));
    let before = knobs.save().unwrap();
    ksm.start(&[]).unwrap();
    assert_eq!(left_behind_in(&knobs, &lock), None, "it has a guard");
    assert_eq!(ksm.notes().iter().filter(|note| note.contains("was killed")).count(), 0, "{:?}", ksm.notes());
    kill(ksm.guard_pid().unwrap());
    assert!(ksm.notes().iter().any(|note| note.contains("was killed")), "{:?}", ksm.notes());
    ksm.stop();
    assert_eq!(knobs.save().unwrap(), before, "the owner has put them back");

    // Both are killed: doctor says so, and the next start puts back what was before.
    let (mut owner, guard) = owner(directory.to_str().unwrap());
    kill(guard);
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert_ne!(knobs.save().unwrap(), before);
    let left = left_behind_in(&knobs, &lock).unwrap();
    assert_eq!(left.owner, owner.id());
    let run = format!("echo 0 > {}", knobs.path("run").display());
    assert!(left.settings.contains(&"run=1 (was 0)".to_owned()) && left.mend.ends_with(&run), "{left:?}");
    let mut next = engine(directory);
    next.start(&[]).unwrap();
    assert!(next.notes().iter().any(|note| note.contains("put back before")), "{:?}", next.notes());
    assert_eq!(left_behind_in(&knobs, &lock), None);
    next.stop();
    assert_eq!(knobs.save().unwrap(), before);
    assert_eq!(left_behind_in(&knobs, &lock), None);
}

#[test]
fn one_that_an_operator_has_stopped_stays_stopped() {
    let fake = fake_knobs();
    fs::write(fake.path().join("run"), "1").unwrap();
    let (mut ksm, knobs) = (engine(fake.path()), knobs_of(fake.path()));
    ksm.start(&[]).unwrap();
    assert_eq!(ksm.stalled(), None);
    fs::write(knobs.path("run"), "0").unwrap();
    assert!(ksm.stalled().is_some_and(|why| why.contains("nothing merges any more")));
    assert!(ksm.notes().iter().any(|note| note.contains("nothing merges any more")), "{:?}", ksm.notes());
    ksm.stop();
    assert!(!knobs.running().unwrap(), "it was turned on again");
    let notes = ksm.notes();
    assert!(notes.len() == 1 && notes[0].contains("run was changed to 0"), "{notes:?}");
}

#[test]
fn it_merges_two_guests_to_the_ideal() {
    const PAGES: usize = 3072;
    let _serial = serial();
    if available() != Availability::Full {
        return skipped("KSM cannot be driven by this user");
    }
    // A third zeros, a third twice in each guest, a third in both; all of it in one process, twice.
    let fill = || {
        let mut memory = vec![0u8; (PAGES + 1) * PAGE];
        let skip = memory.as_ptr().align_offset(PAGE);
        for (page, bytes) in memory[skip..][..PAGES * PAGE].chunks_mut(PAGE).enumerate() {
            let content = match page % 3 {
                0 => 0,
                1 => page as u64 % 500 + 1,
                _ => page as u64 + 10_000,
            };
            bytes.chunks_mut(8).for_each(|word| word.copy_from_slice(&content.to_ne_bytes()));
        }
        // SAFETY: advice on memory that `memory` owns; merging does not change what it reads as.
        unsafe { madvise(memory[skip..].as_mut_ptr().cast(), PAGES * PAGE, Advice::LinuxMergeable) }.unwrap();
        (memory, skip)
    };
    let rams = [fill(), fill()];
    let spaces = rams.each_ref().map(|(memory, skip)| Space {
        name: "g".to_owned(),
        pid: std::process::id(),
        extents: vec![Extent {
            gpa: Gpa(0),
            hva: Hva::of(memory[*skip..].as_ptr()),
            bytes: (PAGES * PAGE) as u64,
        }],
    });
    let ideal = content::measure(&spaces, &mut |_, _| {}).unwrap();
    assert_eq!(ideal.zero, 2 * PAGES as u64 / 3);
    assert_eq!(frames::measure(&spaces).unwrap().saved_pages, 0);

    let knobs = Knobs::default();
    let before = knobs.save().unwrap();
    let mut ksm = Ksm::new(KsmSettings::fast()).with_guard_command(guard_command());
    ksm.start(&spaces).unwrap();
    until("merged page", || frames::measure(&spaces).unwrap().freed_pages() >= ideal.ideal_saved_pages);
    let progress = ksm.progress().unwrap();
    ksm.stop();
    assert_eq!(knobs.save().unwrap(), before);

    let frames = frames::measure(&spaces).unwrap();
    assert_eq!(frames.freed_pages(), ideal.ideal_saved_pages);
    assert_eq!(frames.saved_pages, ideal.ideal_saved_pages - ideal.zero);
    assert_eq!(frames.pages.zero, ideal.zero);
    assert_eq!(frames.pages.shared, 4 * PAGES as u64 / 3);
    assert_eq!(frames.frames, ideal.distinct);
    assert!(!frames.estimated);
    // Both guests are this one process, so each page is counted twice.
    assert!(progress.merged_pages >= 2 * ideal.ideal_saved_pages, "{progress:?}");
    assert!(
        progress.full_passes >= 1 && progress.cpu_seconds.is_some_and(|seconds| seconds > 0.0),
        "{progress:?}"
    );
    // Content is what it was.
    assert_eq!(content::measure(&spaces, &mut |_, _| {}).unwrap().distinct, ideal.distinct);
}
