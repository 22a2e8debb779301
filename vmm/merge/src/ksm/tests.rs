//! The engine on the real kernel where we may drive it, on a directory that looks like its knobs elsewhere.
//! Whatever changes the host's KSM is named `ksm_` and runs one at a time.

#![expect(unsafe_code, reason = "madvise")]

use std::fs;
use std::io::BufRead;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;
use measure::{Extent, content, frames};
use memory::{Gpa, Hva, PAGE_BYTES};

/// Set for the children that the tests make of this same test program: `real`, or the directory of a fake.
const ROLE: &str = "SAMEPAGE_KSM_TEST";
const PAGE: usize = PAGE_BYTES as usize;

/// One at a time, over all test programs of this user: only root's change the host's KSM.
fn serial() -> fs::File {
    use std::os::unix::fs::MetadataExt;
    let user = fs::metadata("/proc/self").unwrap().uid();
    let path = std::env::temp_dir().join(format!("samepage-ksm-tests-{user}.lock"));
    loop {
        match guard::take_lock(&path, std::process::id()) {
            Ok(file) => return file,
            Err(EngineError::Busy { .. }) => std::thread::sleep(Duration::from_millis(50)),
            Err(error) => panic!("{error}"),
        }
    }
}

fn skipped(why: &str) {
    testing::skipped(module_path!(), why);
}

/// An engine whose guard is this test program.
fn engine(role: &str) -> Ksm {
    let program = std::env::current_exe().unwrap().into_os_string();
    let mut command = vec![OsString::from("env"), OsString::from(format!("{ROLE}={role}")), program];
    command.extend(["--exact", "ksm::tests::ksm_role_guard", "--nocapture"].map(OsString::from));
    let mut ksm = Ksm::new(KsmSettings::fast()).with_guard_command(command);
    if role != "real" {
        ksm.knobs = Knobs(PathBuf::from(role));
        ksm.lock = Path::new(role).join("lock");
    }
    ksm
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

#[test]
fn ksm_role_guard() {
    if std::env::var_os(ROLE).is_some() {
        guard::run_on_stdin().unwrap();
    }
}

#[test]
fn ksm_role_owner() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut ksm = engine(&role);
    ksm.start(&[]).unwrap();
    println!("\nstarted");
    std::thread::sleep(Duration::from_secs(60));
}

fn killed_owner_leaves_nothing(role: &str) {
    let knobs = engine(role).knobs.clone();
    let before = knobs.save().unwrap();
    let mut owner = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "ksm::tests::ksm_role_owner", "--nocapture"])
        .env(ROLE, role)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(owner.stdout.take().unwrap());
    let started = output.lines().map_while(Result::ok).any(|line| line == "started");
    assert!(started);
    assert!(knobs.running().unwrap());
    assert_ne!(knobs.save().unwrap(), before);

    match engine(role).start(&[]) {
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
    until("free lock", || engine(role).start(&[]).is_ok());
    until("restored setting", || knobs.save().unwrap() == before);
}

#[test]
fn ksm_settings_survive_the_owners_sigkill() {
    let _serial = serial();
    let fake = fake_knobs();
    killed_owner_leaves_nothing(fake.path().to_str().unwrap());
    match available() {
        Availability::Full => killed_owner_leaves_nothing("real"),
        other => skipped(&format!("the host's own KSM: {other:?}")),
    }
}

/// Kills the guard of `ksm`, as the out-of-memory killer may.
fn kill_guard(ksm: &mut Ksm) {
    let guard = ksm.guard.as_mut().unwrap();
    guard.process.kill().unwrap();
    guard.process.wait().unwrap();
}

#[test]
fn ksm_settings_survive_the_guards_sigkill() {
    let fake = fake_knobs();
    let role = fake.path().to_str().unwrap();
    let mut ksm = engine(role);
    let (knobs, lock) = (ksm.knobs.clone(), ksm.lock.clone());
    let before = knobs.save().unwrap();
    ksm.start(&[]).unwrap();
    assert_eq!(left_behind_in(&knobs, &lock), None, "it has a guard");
    assert_eq!(ksm.notes().iter().filter(|note| note.contains("was killed")).count(), 0, "{:?}", ksm.notes());
    kill_guard(&mut ksm);
    assert!(ksm.notes().iter().any(|note| note.contains("was killed")), "{:?}", ksm.notes());
    ksm.stop();
    assert_eq!(knobs.save().unwrap(), before, "the owner has put them back");

    // Both are killed: doctor says so, and the next start puts back what was before.
    ksm.start(&[]).unwrap();
    kill_guard(&mut ksm);
    ksm.guard = None;
    ksm.run = None;
    assert_ne!(knobs.save().unwrap(), before);
    let left = left_behind_in(&knobs, &lock).unwrap();
    assert_eq!(left.owner, std::process::id());
    let run = format!("echo 0 > {}", knobs.path("run").display());
    assert!(left.settings.contains(&"run=1 (was 0)".to_owned()) && left.mend.ends_with(&run), "{left:?}");
    let mut next = engine(role);
    next.start(&[]).unwrap();
    assert!(next.notes().iter().any(|note| note.contains("put back before")), "{:?}", next.notes());
    assert_eq!(left_behind_in(&knobs, &lock), None);
    next.stop();
    assert_eq!(knobs.save().unwrap(), before);
    assert_eq!(left_behind_in(&knobs, &lock), None);
}

#[test]
fn ksm_that_an_operator_has_stopped_stays_stopped() {
    let fake = fake_knobs();
    fs::write(fake.path().join("run"), "1").unwrap();
    let mut ksm = engine(fake.path().to_str().unwrap());
    let knobs = ksm.knobs.clone();
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
fn ksm_merges_two_guests_to_the_ideal() {
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
        let advised =
            unsafe { libc::madvise(memory[skip..].as_mut_ptr().cast(), PAGES * PAGE, libc::MADV_MERGEABLE) };
        assert_eq!(advised, 0);
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
    let mut ksm = engine("real");
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

#[test]
fn an_exited_guest_is_named() {
    let fake = fake_knobs();
    let mut ksm = Ksm::new(KsmSettings::fast());
    ksm.knobs = Knobs(fake.path().to_owned());
    ksm.run = Some(Run {
        guests: vec![Space { name: "mail".to_owned(), pid: i32::MAX as u32, extents: Vec::new() }],
        ksmd: None,
        cpu_seconds: None,
        full_scans: 0,
    });
    let error = ksm.progress().unwrap_err().to_string();
    assert!(error.contains("mail") && error.contains("2147483647"), "{error}");
}

#[test]
fn a_kernel_without_ksm_is_told_apart() {
    let nothing = tempfile::tempdir().unwrap();
    let mut ksm = Ksm::new(KsmSettings::fast());
    ksm.knobs = Knobs(nothing.path().join("ksm"));
    let error = ksm.start(&[]).unwrap_err();
    assert!(
        matches!(error, EngineError::NoKsm { .. }) && error.to_string().contains("--engine off"),
        "{error}"
    );
}
