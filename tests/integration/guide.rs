//! The guide's commands, as a reader would type them.
//!
//! Blocks that are marked `sh run` are run here, those of one document in one shell; blocks marked
//! `sh lab` in the nested-paging lab, where Linux guests run. Of all others each `samepage` command
//! line is parsed, in `documents.rs`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use tests::documents::{self, Block, Document, commands};
use tests::lab::lab_script;
use tests::run::Run;
use tests::sandbox::Sandbox;
use tests::vm::SOON;
use tests::{require_slabs, require_tool};

use super::nested::need_image;

/// For all of one document.
const LIMIT: Duration = Duration::from_secs(240);
/// Held while Debian's root file system is made.
static DEBIAN: Mutex<()> = Mutex::new(());

/// The wait that a reader need not write: the next command is typed when the socket of the last one
/// exists.
const SHELL: &str = r#"
    set -euo pipefail
    until_there() {
        for n in {1..600}; do if [ -S "$1" ]; then return; fi; sleep 0.1; done
        echo "no socket $1" >&2; exit 1
    }
"#;

/// The blocks of this kind, one after the other.
fn script(document: &Document, kind: &str) -> String {
    let mut script = String::new();
    for block in blocks(document, kind) {
        script += &block.text;
        for words in block.text.lines().flat_map(commands) {
            let socket = words.iter().skip_while(|word| *word != "--control").nth(1);
            script.extend(socket.map(|socket| format!("until_there {socket}\n")));
        }
    }
    // A VM in the background has failed if its status says so.
    script + "for job in $(jobs -p); do wait \"$job\"; done\n"
}

fn blocks(document: &Document, kind: &str) -> Vec<Block> {
    document.blocks().into_iter().filter(|block| block.kind == kind).collect()
}

/// The documents that have blocks of this kind, by their names.
fn with(kind: &str) -> Vec<Document> {
    documents::all().into_iter().filter(|document| !blocks(document, kind).is_empty()).collect()
}

fn names(documents: &[Document]) -> Vec<&str> {
    documents.iter().filter_map(|document| document.path.file_name()?.to_str()).collect()
}

#[test]
fn its_commands_work() {
    let documents = with("sh run");
    assert_eq!(names(&documents), ["balloon.md", "first-guest.md", "fleets.md", "overcommit.md"]);
    require_slabs!();
    for document in documents {
        let sandbox = Sandbox::new();
        let program = sandbox.file("samepage");
        symlink(tests::samepage(), &program).expect("a link to the program");
        symlink(tests::workspace().join("resources"), sandbox.file("resources")).expect("a link");
        let body = script(&document, "sh run");
        let head = format!("{SHELL}\nexport PATH=\"$DIR:$PATH\"\ncd \"$DIR\"\n");
        let outcome = sandbox.shell(&format!("{head}{body}")).timeout(LIMIT).output();
        assert_eq!(outcome.code, Some(0), "{}:\n{body}\n{outcome}", document.path.display());
        sandbox.assert_clean_within(SOON);
    }
}

/// The documents with blocks for the lab: a block with another mark would never run.
#[test]
fn every_mark_is_known() {
    assert_eq!(names(&with("sh lab")), ["README.md", "debian.md"]);
    for document in documents::all() {
        for block in document.blocks() {
            let known = ["sh", "sh run", "sh lab", "toml", "yaml", "ini", "json", "text", ""];
            let place = format!("{}:{}", document.path.display(), block.line);
            assert!(known.contains(&block.kind.as_str()), "{place}: {:?} is no kind of block", block.kind);
        }
    }
}

/// What the lab's shell needs before the blocks of a document: the program, the image where a
/// user's is, a place for files.
pub(super) fn lab_head() -> String {
    format!(
        "{SHELL}
        set +x
        mkdir -p /var/tmp/guide ~/.cache/samepage/images
        [ -e ~/.cache/samepage/images/latest ] || ln -s {image} ~/.cache/samepage/images/latest
        ln -s {program} /var/tmp/guide/samepage
        export PATH=/var/tmp/guide:$PATH
        cd /var/tmp/guide
        ln -s {resources} .
        ",
        resources = tests::workspace().join("resources").display(),
        image = tests::lab::image_dir().display(),
        program = tests::samepage().display(),
    )
}

/// From the image to a merged fleet of Linux guests and its end: what a newcomer does first.
#[test]
fn lab_the_readme_leads_to_a_merged_linux_fleet() {
    need_image();
    let body = script(&documents::read(Path::new("README.md")), "sh lab");
    let outcome = lab_script(LIMIT * 2, &(lab_head() + &body)).success();
    assert!(outcome.stdout.contains("pages wrong") && outcome.stdout.contains("is down"), "{outcome}");
}

/// Debian's root file system, made once as the guide says.
pub(super) fn debian() -> PathBuf {
    let _alone = os::lock(&DEBIAN);
    let path = tests::lab::image_dir().with_file_name("debian.img");
    let modified = |path: &Path| path.metadata().and_then(|meta| meta.modified()).ok();
    if modified(&path) <= modified(&tests::samepage()) {
        let to = path.to_str().expect("UTF-8");
        let args = ["image", "rootfs", to, "--include", "iproute2,procps"];
        let _ = Run::program(tests::samepage(), args).timeout(Duration::from_secs(900)).output().success();
    }
    path
}

/// The second section: a guest with a shell on its terminal, whose writes end with it; and one
/// whose writes are kept.
#[test]
fn lab_a_debian_on_a_disk_has_a_shell() {
    let _ = require_tool!("mmdebstrap");
    need_image();
    let root = debian();
    let before = std::fs::metadata(&root).and_then(|meta| meta.modified()).expect("an image");
    let body = r#"
        guest() {
            # Typed again and again: what comes before the shell is there is lost.
            samepage run --memory 256M --kernel "$image/vmlinux" --initrd "$image/initrd.cpio" --drive "root.img,$1" \
                --com2 ./com2.sock --cmdline 'console=ttyS0 quiet panic=-1 root=/dev/vda rw' \
                < <(for n in {1..100}; do sleep 2; echo "$2"; done)
        }
        first='mkdir /run/once && . /etc/os-release && echo "id=$ID uid=$(id -u) kept=$(cat /kept) agent=$(pgrep -fc ^/init)" && echo yes >/kept && poweroff'
        guest overlay "$first"
        ls -A
        guest overlay=kept.disk "$first"
        guest overlay=kept.disk "$first"
    "#;
    let head = format!(
        "{}\nln -s {} root.img\nimage={}\n",
        lab_head(),
        root.display(),
        tests::lab::image_dir().display()
    );
    let outcome = lab_script(LIMIT * 2, &(head + body)).success();
    let said: Vec<_> =
        outcome.stdout.lines().filter_map(|line| line.split_once("id=debian uid=0 kept=")).collect();
    let kept: Vec<_> = said.iter().map(|(_, rest)| rest.starts_with("yes")).collect();
    assert_eq!(kept, [false, false, true], "{outcome}");
    assert!(said.iter().all(|(_, rest)| !rest.contains("agent=0")), "{outcome}");
    let after = std::fs::metadata(&root).and_then(|meta| meta.modified()).expect("an image");
    assert_eq!(before, after, "the image was written");
}

/// The third section and the fourth.
#[test]
fn lab_ten_debians_have_one_image() {
    let _ = require_tool!("mmdebstrap");
    need_image();
    let body = script(&documents::read(Path::new("resources/docs/guide/debian.md")), "sh lab");
    let root = debian();
    let head = format!("{}\nln -s {} ~/root.img\n", lab_head(), root.display());
    // The roots are up, and not only the agents, while the fleet is.
    let looked = "for n in {0..9}; do until grep -q '# ' /run/samepage/fleets/debians/debian-$n.log; do sleep 1; done; done; \
                  echo all ten have a shell; samepage fleet down";
    let body = body.replacen("samepage fleet down", looked, 1);
    let outcome = lab_script(Duration::from_secs(540), &(head + &body)).success();
    // And those of the fourth section, whose root is the image itself.
    let said = ["all ten have a shell", "is down", "ID=debian", "/dev/pmem0 / ext4 ro,relatime,dax=always"];
    assert!(said.iter().all(|words| outcome.stdout.contains(words)), "{outcome}");
}

/// The examples of fleet files are fleet files.
#[test]
fn its_fleet_files_are_understood() {
    let sandbox = Sandbox::new();
    let mut seen = 0;
    for document in documents::all() {
        for block in document.blocks().into_iter().filter(|b| b.kind == "toml") {
            let path = sandbox.file("fleet.toml");
            // Some show a part: what must be there is put before it.
            let top = block.text.split("\n[").next().unwrap_or_default();
            let named = top.lines().any(|line| line.starts_with("name = "));
            let name = if named { "" } else { "name = \"f\"\n" };
            let guest = if block.text.contains("[[guest]]") { "" } else { "\n[[guest]]\nname = \"g\"\n" };
            let text = format!("{name}{}{guest}", block.text);
            let text = text.replace("~/.cache/samepage/images/latest/", "");
            fs::write(&path, &text).expect("a file");
            let args = ["fleet".as_ref(), "up".as_ref(), path.as_os_str(), "--dry-run".as_ref()];
            let outcome = sandbox.samepage(args).output();
            let place = format!("{}:{}", document.path.display(), block.line);
            let unread = ["unknown field", "missing field", "invalid type", "TOML", "expected"];
            assert!(!unread.iter().any(|w| outcome.stderr.contains(w)), "{place}:\n{text}\n{outcome}");
            seen += 1;
        }
    }
    assert!(seen >= 4, "only {seen} fleet files were found");
}
