use std::fs;
use std::process::Command;

use super::*;
use crate::progress::Quiet;

/// What `debugfs` answers to one command.
fn ask(image: &Path, command: &str) -> String {
    let asked = Command::new("/usr/sbin/debugfs").args(["-R", command]).arg(image).output().unwrap();
    String::from_utf8_lossy(&asked.stdout).into_owned()
}

fn has_tools() -> bool {
    let there = ["mke2fs", "debugfs"].iter().all(|tool| Path::new("/usr/sbin").join(tool).exists());
    if !there {
        eprintln!("SKIPPED: no e2fsprogs here");
    }
    there
}

fn options(source: Source, to: PathBuf) -> Options {
    Options { source, bytes: Some(16 << 20), to }
}

fn member(tar: &mut tar::Builder<fs::File>, path: &str, kind: tar::EntryType, mode: u32, owners: (u64, u64)) {
    let mut header = tar::Header::new_gnu();
    let content = if kind == tar::EntryType::Regular { &b"content"[..] } else { b"" };
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owners.0);
    header.set_gid(owners.1);
    header.set_size(content.len() as u64);
    if kind == tar::EntryType::Symlink || kind == tar::EntryType::Link {
        header.set_link_name("usr/bin").unwrap();
    }
    // As an archive that means harm has them.
    header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_cksum();
    tar.append(&header, content).unwrap();
}

#[test]
fn an_archive_keeps_owners_and_modes_that_its_maker_could_not_have() {
    use tar::EntryType::{Char, Directory, Regular, Symlink};
    if !has_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (path, to) = (dir.path().join("tree.tar"), dir.path().join("root.img"));
    let mut tar = tar::Builder::new(fs::File::create(&path).unwrap());
    member(&mut tar, "./", Directory, 0o755, (0, 0));
    member(&mut tar, "./usr/bin/", Directory, 0o755, (0, 0));
    member(&mut tar, "./usr/sbin/", Directory, 0o755, (0, 0));
    member(&mut tar, "./bin", Symlink, 0o777, (0, 0));
    member(&mut tar, "./sbin", Symlink, 0o777, (0, 0));
    member(&mut tar, "./usr/bin/su \"x\"", Regular, 0o4755, (0, 12));
    member(&mut tar, "./etc/", Directory, 0o700, (7, 8));
    member(&mut tar, "./etc/secret", Regular, 0o000, (1000, 1001));
    member(&mut tar, "./dev/", Directory, 0o755, (0, 0));
    member(&mut tar, "./dev/null", Char, 0o666, (0, 0));
    tar.finish().unwrap();
    let made = make(&options(Source::Tar(path), to.clone()), &mut Quiet).unwrap();
    assert!(made.has_small_init && made.bytes == 16 << 20, "{made:?}");
    for (file, said) in [
        ("/usr/bin/su \"\"x\"\"", ["Mode:  04755", "User:     0   Group:    12"]),
        ("/etc", ["Mode:  0700", "User:     7   Group:     8"]),
        ("/etc/secret", ["Mode:  0000", "User:  1000   Group:  1001"]),
        ("/bin", ["Mode:  0777", "User:     0   Group:     0"]),
        ("/usr/sbin/init", ["Mode:  0755", "User:     0   Group:     0"]),
        ("/proc", ["Mode:  0755", "User:     0   Group:     0"]),
    ] {
        let answer = ask(&to, &format!("stat \"{file}\""));
        assert!(said.iter().all(|words| answer.contains(words)), "{file}: {answer}");
    }
    assert_eq!(ask(&to, "cat /etc/secret"), "content");
    assert!(!ask(&to, "ls /dev").contains("null"));
    let checked = Command::new("/usr/sbin/e2fsck").args(["-f", "-n"]).arg(&to).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    // Nothing else is left.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

#[test]
fn what_leads_out_of_the_tree_is_refused_and_leaves_nothing() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let dir = tempfile::tempdir().unwrap();
    let (path, to) = (dir.path().join("tree.tar"), dir.path().join("root.img"));
    fs::write(&to, "before").unwrap();
    let archives: [&[(&str, tar::EntryType)]; 3] = [
        &[("../escaped", Regular)],
        &[("usr/", Directory), ("usr/../../escaped", Regular)],
        // A hard link to what is not there, or lies outside.
        &[("up", Symlink), ("hard", Link)],
    ];
    for members in archives {
        let mut tar = tar::Builder::new(fs::File::create(&path).unwrap());
        for (name, kind) in members {
            member(&mut tar, name, *kind, 0o755, (0, 0));
        }
        tar.finish().unwrap();
        let refused = make(&options(Source::Tar(path.clone()), to.clone()), &mut Quiet);
        assert!(refused.is_err(), "{members:?}: {refused:?}");
        assert_eq!(fs::read(&to).unwrap(), b"before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "{members:?}");
        assert!(!dir.path().parent().unwrap().join("escaped").exists());
    }
    fs::write(&path, [1; 2000]).unwrap();
    let refused = make(&options(Source::Tar(path), to.clone()), &mut Quiet);
    assert!(matches!(refused, Err(ImageError::Archive { .. })), "{refused:?}");
}

#[test]
fn a_directory_becomes_an_image_and_one_that_is_too_large_for_it_does_not() {
    if !has_tools() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (tree, to) = (dir.path().join("tree"), dir.path().join("root.img"));
    let not_yet = make(&options(Source::Dir(tree.clone()), to.clone()), &mut Quiet);
    assert!(matches!(not_yet, Err(ImageError::NoTree(_))), "{not_yet:?}");
    fs::create_dir_all(tree.join("bin")).unwrap();
    fs::create_dir_all(tree.join("sbin")).unwrap();
    fs::write(tree.join("sbin/init"), "#!/bin/sh\n").unwrap();
    let made = make(&options(Source::Dir(tree.clone()), to.clone()), &mut Quiet).unwrap();
    assert!(!made.has_small_init && made.files == 3, "{made:?}");
    assert_eq!(ask(&to, "cat /sbin/init"), "#!/bin/sh\n");
    let large = fs::File::create(tree.join("large")).unwrap();
    std::io::copy(&mut std::io::Read::take(std::io::repeat(7), 20 << 20), &mut &large).unwrap();
    let before = fs::metadata(&to).unwrap().len();
    let refused = make(&options(Source::Dir(tree), to.clone()), &mut Quiet);
    assert!(matches!(refused, Err(ImageError::Failed { tool: "mke2fs", .. })), "{refused:?}");
    assert_eq!(fs::metadata(&to).unwrap().len(), before);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}
