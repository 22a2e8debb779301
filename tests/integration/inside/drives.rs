//! The disk of a Linux guest: what it reads, from where, and that its page cache is merged.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use guest::content::{PageKey, fill_page};
use guest::protocol::Class;
use tests::lab::image_dir;
use tests::sandbox::Sandbox;
use tests::vm::field;

use super::Linux;

/// Pages of the image.
const PAGES: u64 = 2048;

/// Writes an image whose pages follow from `seed`, in place of what is there.
fn write_image(path: &Path, seed: u64) {
    let mut bytes = Vec::new();
    let mut page = [0; 512];
    for index in 0..PAGES {
        fill_page(&mut page, PageKey { seed, class: Class::Unique, index, generation: 0 });
        bytes.extend(page.iter().flat_map(|word| word.to_le_bytes()));
    }
    // The file stays the same for every process that has it open.
    let mut file = fs::File::options().create(true).truncate(false).write(true).open(path).expect("a file");
    file.write_all(&bytes).expect("an image");
}

#[test]
fn a_disk_is_read_through_the_page_cache() {
    let sandbox = Sandbox::new();
    let (image, scratch) = (sandbox.file("image"), sandbox.file("scratch"));
    write_image(&image, 7);
    fs::write(&scratch, vec![0; 1 << 20]).expect("a file");
    // The maximum: each has an interrupt of its own, and Linux probes each.
    let read_only = format!("{},ro", image.display());
    let scratch = scratch.to_str().expect("UTF-8");
    let drives = ["--drive", &read_only, "--drive", scratch, "--drive", &read_only, "--drive", &read_only];
    let mut linux = Linux::boot(&sandbox, "vm", &drives);
    let read = |linux: &mut Linux, first: u64, pages: u64, seed: u64| {
        let answer = linux.agent.command(&format!("disk read first={first} pages={pages} seed={seed}"));
        assert!(answer.starts_with("ok command=disk action=read "), "{answer}");
        assert_eq!(field(&answer, "pages"), pages, "{answer}");
        field(&answer, "wrong")
    };
    assert_eq!(read(&mut linux, 0, PAGES, 7), 0);
    assert_eq!(read(&mut linux, 0, PAGES, 8), PAGES, "nothing was compared");

    // What it has read it has: the host's file may hold what it likes.
    write_image(&image, 9);
    assert_eq!(read(&mut linux, 0, PAGES, 7), 0);
    assert_eq!(linux.agent.command("disk drop"), "ok command=disk action=drop");
    assert_eq!(read(&mut linux, PAGES - 10, 10, 9), 0);
    assert_eq!(read(&mut linux, 0, PAGES, 9), 0);

    let beyond = linux.agent.command(&format!("disk read first={} pages=2", PAGES - 1));
    assert!(beyond.starts_with("err code=failed") && beyond.contains("ends before that"), "{beyond}");
    // A truncated file is a read error in the guest, and ends no VM.
    linux.agent.command("disk drop");
    fs::File::options()
        .write(true)
        .open(&image)
        .and_then(|file| file.set_len(1 << 20))
        .expect("a shorter file");
    let cut = linux.agent.command("disk read first=300 pages=1");
    assert!(cut.starts_with("err code=failed"), "{cut}");
    assert_eq!(read(&mut linux, 0, 100, 9), 0);
    linux.end(&sandbox);
}

#[test]
fn the_page_caches_of_two_guests_are_merged() {
    let sandbox = Sandbox::new();
    let plan = tests::workspace().join("resources/experiments/page-cache.toml");
    let plan = fs::read_to_string(plan).expect("a plan");
    let (head, _) = plan.split_once("[[variant]]").expect("a variant");
    let plan = head.replace("\"64M\"", "\"8M\"").replace("rounds = 3", "rounds = 2");
    let plan = plan.replace("merge_seconds = 60", "merge_seconds = 15");
    let file = sandbox.file("short.toml");
    fs::write(&file, plan).expect("a file");
    let path = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    let image = image_dir();
    let mut args = ["experiment", "run"].map(ToOwned::to_owned).to_vec();
    args.extend([path(&file), "--engine".into(), "slab".into(), "--json".into(), "--kernel".into()]);
    args.extend([path(&image.join("vmlinux")), "--initrd".into(), path(&image.join("initrd.cpio"))]);
    let outcome = sandbox.samepage(args).timeout(Duration::from_secs(240)).output().success();
    let trial = &outcome.json()["trials"][0];
    let figure = |name: &str| {
        let figure = trial["figures"][name].as_f64();
        figure.unwrap_or_else(|| panic!("no {name} in {trial:#}"))
    };
    assert_eq!(figure("file_pages"), PAGES as f64);
    // All of it was found in both guests, and nearly all of it is merged.
    assert_eq!(trial["notes"].as_array().map_or(0, Vec::len), 0, "{trial:#}");
    assert!(figure("peak_percent") > 95.0, "{trial:#}");
    assert!(figure("to_50_percent_seconds") <= figure("to_90_percent_seconds"), "{trial:#}");
    // Dropped pages are no longer shared, as far as the guests have reported them.
    assert!(figure("after_evict_shared_pages") < 0.95 * PAGES as f64, "{trial:#}");
    for round in ["round_1_shared_percent", "round_2_shared_percent"] {
        assert!(trial["series"][round].as_array().is_some_and(|all| all.len() > 1), "{trial:#}");
    }
    sandbox.assert_clean_within(Duration::from_secs(10));
}
