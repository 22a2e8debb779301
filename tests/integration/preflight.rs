//! What a fleet needs is looked at before any VM starts, by the dry run and by `fleet up` alike.

use std::fs;
use std::path::PathBuf;

use serde_json::Value;
use tests::require_kvm;
use tests::run::Outcome;
use tests::sandbox::Sandbox;
use tests::vm::SOON;

struct File {
    sandbox: Sandbox,
    path: PathBuf,
}

impl File {
    fn new(text: &str) -> Self {
        let sandbox = Sandbox::new();
        let path = sandbox.file("fleet.toml");
        fs::write(&path, format!("name = \"f\"\nengine = \"off\"\n{text}")).expect("a fleet file");
        Self { sandbox, path }
    }

    fn up(&self, more: &[&str]) -> Outcome {
        let args = ["fleet", "up", self.path.to_str().expect("UTF-8")];
        self.sandbox.samepage([&args[..], more].concat()).output()
    }

    /// Both refuse it and say all of this, and nothing is started.
    fn refused(&self, expected: &[&str]) {
        for outcome in [self.up(&[]), self.up(&["--dry-run"]), self.up(&["--json"])] {
            assert_eq!(outcome.code, Some(1), "{outcome}");
            for text in expected {
                assert!(outcome.stderr.contains(text), "{text:?} is not said: {outcome}");
            }
            assert!(self.sandbox.leaks().is_empty(), "{:?}", self.sandbox.leaks());
        }
    }
}

#[test]
fn all_that_is_missing_is_said_at_once_with_guest_and_key() {
    require_kvm!();
    let file = File::new(
        "[[guest]]\nname = \"a\"\ndrives = [{ path = \"disk.img\" }]\n\
         [[guest]]\nname = \"b\"\ndrives = [{ path = \"link.img\" }, { path = \"none.img\" }]\n\
         [[guest]]\nname = \"c\"\nkernel = \"none\"\ninitrd = \"fifo\"\n",
    );
    let at = |name: &str| file.sandbox.file(name);
    fs::write(at("disk.img"), [0; 4096]).expect("a disk");
    std::os::unix::fs::symlink(at("disk.img"), at("link.img")).expect("a link");
    assert!(std::process::Command::new("mkfifo").arg(at("fifo")).status().expect("mkfifo").success());
    file.refused(&[
        "guest b: drives: ",
        "is the same file as",
        "none.img cannot be opened",
        "guest c: kernel: ",
        "guest c: initrd: ",
        "is a FIFO",
    ]);
    let dry: Value = file.up(&["--dry-run", "--json"]).json();
    let problems = dry["problems"].as_array().expect("problems");
    assert_eq!(problems.len(), 4, "{problems:#?}");
    assert_eq!(
        (&problems[0]["guest"], &problems[0]["key"]),
        (&"b".into(), &"drives".into()),
        "{problems:#?}"
    );
    assert!(dry["capacity"]["pages"].as_u64().is_some_and(|pages| pages > 0), "{dry:#}");
}

#[test]
fn names_that_are_too_long_for_a_socket_start_nothing() {
    require_kvm!();
    let name = "n".repeat(32);
    let file = File::new(&format!("[[guest]]\nname = \"a\"\ncount = 10\n[[guest]]\nname = \"{name}\"\n"));
    let deep = file.sandbox.file(&"d".repeat(60));
    let run = |more: &[&str]| {
        let args = ["fleet", "up", file.path.to_str().expect("UTF-8")];
        file.sandbox.samepage([&args[..], more].concat()).env("SAMEPAGE_RUNTIME_DIR", &deep).output()
    };
    for outcome in [run(&[]), run(&["--dry-run"])] {
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.stderr.contains(&format!("guest {name}: name: the socket path")), "{outcome}");
        assert!(outcome.stderr.contains("at most 107 bytes"), "{outcome}");
        assert!(!deep.exists());
    }
}

#[test]
fn a_right_file_passes_and_comes_up() {
    require_kvm!();
    let file = File::new("[[guest]]\nname = \"a\"\nmemory = \"16M\"\ndrives = [{ path = \"disk.img\" }]\n");
    fs::write(file.sandbox.file("disk.img"), [0; 4096]).expect("a disk");
    let dry: Value = file.up(&["--dry-run", "--json"]).success().json();
    assert_eq!(dry["problems"], serde_json::json!([]));
    let _ = file.up(&[]).success();
    let _ = file.sandbox.samepage(["fleet", "down"]).output().success();
    file.sandbox.assert_clean_within(SOON);
}

#[test]
fn too_few_descriptors_are_told_as_such_and_a_low_soft_limit_is_raised() {
    require_kvm!();
    let file = File::new("[[guest]]\nname = \"a\"\nmemory = \"16M\"\ncount = 12\n");
    let up = |limits: &str| {
        let script = format!("{limits}; $SAMEPAGE fleet up {}", file.path.display());
        file.sandbox.shell(&script).output()
    };
    let few = up("ulimit -n 40");
    assert_eq!(few.code, Some(1), "{few}");
    assert!(few.stderr.contains("descriptors") && few.stderr.contains("ulimit -Hn"), "{few}");
    assert!(!few.stderr.contains("agent"), "{few}");
    // What the preflight check cannot know, the error itself reports.
    let few = up("ulimit -n 72");
    if few.code != Some(0) {
        assert!(few.stderr.contains("ulimit -Hn") && !few.stderr.contains("agent"), "{few}");
        assert!(few.took < SOON / 3, "{few}");
    }
    let _ = file.sandbox.samepage(["fleet", "down", "--name", "f"]).output();
    let _ = up("ulimit -Sn 24").success();
    let _ = file.sandbox.samepage(["fleet", "down"]).output().success();
    file.sandbox.assert_clean_within(SOON);
}
