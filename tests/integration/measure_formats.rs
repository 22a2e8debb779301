//! Files of other formats than raw are known by name, where memory (`measure --file`) or a disk
//! (`run --drive`) is expected; and are left as they are.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use tests::host::skipped;
use tests::require_kvm;
use tests::sandbox::Sandbox;

use super::measure::{LIMIT, counts, image, pages, text};

/// What `samepage` says to this file as memory, and as a drive that is written, which must both be
/// refused.
#[track_caller]
fn refused(sandbox: &Sandbox, file: &Path, expected: &[&str]) {
    let before = fs::read(file).expect("the file");
    let drive = ["run", "--console", "none", "--drive", text(file)];
    for args in [&["measure", "--file", text(file)][..], &drive] {
        let outcome = sandbox.samepage(args).timeout(LIMIT).output();
        assert_eq!(outcome.code, Some(1), "{outcome}");
        for words in expected {
            assert!(outcome.stderr.contains(words), "the error does not say {words:?}: {outcome}");
        }
        assert!(!outcome.stderr.contains("truncate -s"), "{outcome}");
    }
    assert!(fs::read(file).expect("the file") == before, "{} was changed", file.display());
}

#[test]
fn disk_images_are_no_memory_and_no_raw_disk() {
    require_kvm!();
    let sandbox = Sandbox::new();
    for (format, name) in [
        ("qcow2", "a qcow2 disk image"),
        ("qcow", "a qcow disk image"),
        ("vmdk", "a VMDK disk image"),
        ("vhdx", "a VHDX disk image"),
        ("vpc", "a VHD disk image"),
        ("vdi", "a VDI disk image"),
        ("qed", "a QED disk image"),
        ("parallels", "a Parallels disk image"),
    ] {
        let file = sandbox.file(&format!("disk.{format}"));
        let made = Command::new("qemu-img").args(["create", "-q", "-f", format, text(&file), "64M"]).output();
        let Ok(made) = made.map_err(|e| skipped(module_path!(), &format!("qemu-img: {e}"))) else { return };
        assert!(made.status.success(), "{made:?}");
        refused(&sandbox, &file, &[name]);
        // Not even to be read: its sectors are elsewhere.
        let read_only = format!("{},ro", text(&file));
        let outcome =
            sandbox.samepage(["run", "--console", "none", "--drive", &read_only]).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains("-O raw"), "{outcome}");
    }
}

#[test]
fn packed_files_and_archives_are_known_by_name() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let raw = image(&sandbox, "raw", &pages(1..100));
    for (program, args, name) in [
        ("gzip", &["-c"][..], "compressed by gzip"),
        ("xz", &["-c"], "compressed by xz"),
        ("zstd", &["-c", "-q"], "compressed by zstd"),
        ("lz4", &["-c", "-q"], "compressed by lz4"),
        ("bzip2", &["-c"], "compressed by bzip2"),
        ("tar", &["-cf", "-", "-C", "/"], "a tar archive"),
    ] {
        let raw = if program == "tar" { raw.trim_start_matches('/') } else { &raw };
        let made = Command::new(program).args(args).arg(raw).stderr(Stdio::null()).output();
        let Ok(made) = made.map_err(|e| skipped(module_path!(), &format!("{program}: {e}"))) else {
            continue;
        };
        let file = sandbox.file(program);
        fs::write(&file, made.stdout).expect("a file");
        refused(&sandbox, &file, &[name]);
    }
    // Written by nothing that is at hand: by their first bytes.
    for (bytes, name) in [
        (&b"KDUMP   \x06"[..], "compressed by kdump"),
        (b"makedumpfile\0\0\0\0", "makedumpfile -R"),
        (b"LibvirtQemudSave\x02", "virsh dump --memory-only"),
        (b"EMiL\x01\0\0\0", "LiME"),
        (b"\0\0\x64\x86\x84\x19\x10\x07", "Firecracker snapshot"),
    ] {
        let file = sandbox.file("first-bytes");
        let mut whole = bytes.to_vec();
        whole.resize(8192, 0);
        fs::write(&file, whole).expect("a file");
        let outcome = sandbox.samepage(["measure", "--file", text(&file)]).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains(name), "{outcome}");
    }
}

/// Runs commands of QEMU's monitor on a stopped machine of 64 MiB.
fn monitor(commands: &str) -> bool {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg", "-m", "64", "-S", "-display", "none", "-nodefaults", "-monitor", "stdio"]);
    let spawned = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(mut qemu) = spawned.map_err(|e| skipped(module_path!(), &format!("QEMU: {e}"))) else {
        return false;
    };
    let mut input = qemu.stdin.take().expect("its monitor");
    input.write_all(commands.as_bytes()).expect("its monitor");
    drop(input);
    qemu.wait().expect("QEMU").success()
}

#[test]
fn what_qemu_writes_is_read_or_named() {
    let sandbox = Sandbox::new();
    let [core, kdump, raw, stream] = ["core", "kdump", "raw", "stream"].map(|name| sandbox.file(name));
    let commands = format!(
        "dump-guest-memory {}\ndump-guest-memory -z {}\npmemsave 0 0x4000000 \"{}\"\nmigrate \"exec:cat > {}\"\nquit\n",
        text(&core),
        text(&kdump),
        text(&raw),
        text(&stream)
    );
    if !monitor(&commands) {
        return;
    }
    let found = |file: &Path| {
        sandbox.samepage(["measure", "--json", "--file", text(file)]).timeout(LIMIT).output().success().json()
    };
    let (by_core, by_raw) = (found(&core), found(&raw));
    // The same RAM; the core has the firmware and other memory of devices besides.
    let total = |found: &serde_json::Value| found["guests"][0]["total"].as_u64().unwrap_or(0);
    assert!(total(&by_raw) == 64 << 8 && total(&by_core) >= total(&by_raw), "{by_core:#}");
    assert!(counts(&by_core)[0] > 60 << 8, "RAM that was never touched is zeros: {by_core:#}");
    assert!(by_core["notes"].to_string().contains("core of a machine"), "{by_core:#}");
    for (file, name) in [(&kdump, "makedumpfile"), (&stream, "migration stream of QEMU")] {
        let outcome = sandbox.samepage(["measure", "--file", text(file)]).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains(name), "{outcome}");
    }
}

#[test]
fn an_odd_file_is_not_to_be_cut() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let file = sandbox.file("odd");
    fs::write(&file, [1; 5000]).expect("a file");
    for args in
        [&["measure", "--file", text(&file)][..], &["run", "--console", "none", "--drive", text(&file)]]
    {
        let outcome = sandbox.samepage(args).timeout(LIMIT).output();
        assert!(outcome.code == Some(1) && outcome.stderr.contains("5000 bytes"), "{outcome}");
        assert!(outcome.stderr.contains("COPY"), "a copy is proposed: {outcome}");
    }
}
