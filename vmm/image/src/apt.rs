//! Finds and fetches the newest kernel package that this machine's apt knows. No package name is
//! fixed here: each security update gives the package a new one, and the old ones vanish.

use std::cmp::Ordering;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::error::ImageError;
use super::progress::Progress;
use super::tool;

/// Which build of a release.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flavour {
    /// For virtual machines: fewer drivers, starts faster.
    #[default]
    Cloud,
    /// For any machine.
    Generic,
}

impl Flavour {
    /// The part before `-amd64` of the names of its packages.
    fn infix(self) -> &'static str {
        match self {
            Self::Cloud => "-cloud",
            Self::Generic => "",
        }
    }
}

/// How long to wait while another apt has the lists locked.
const LOCK_PATIENCE: Duration = Duration::from_secs(120);

/// Fetches the newest package of `release` (as in `6.12`) into `dir`; returns the path of the file.
pub fn fetch(
    release: &str,
    flavour: Flavour,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<PathBuf, ImageError> {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !release.split('.').all(number) {
        return Err(ImageError::Release(release.into()));
    }
    progress.stage("looking up the newest kernel package", None);
    let root = rustix::process::geteuid().is_root();
    let mut fresh = false;
    let mut name = newest(&search()?, release, flavour);
    loop {
        match &name {
            Some(name) => match download(name, dir, progress) {
                // The lists may be older than the package's removal.
                Err(ImageError::Apt { .. }) if root && !fresh => {}
                other => return other,
            },
            None if fresh || !root => {
                let (release, flavour) = (release.into(), flavour.infix());
                return Err(ImageError::NoPackage { release, flavour, known: releases(&search()?), fresh });
            }
            None => {}
        }
        update(progress)?;
        fresh = true;
        name = newest(&search()?, release, flavour);
    }
}

/// The names of all kernel packages that have a version to fetch.
fn search() -> Result<Vec<String>, ImageError> {
    let tool = "apt-cache";
    let arguments = ["search", "--names-only", "^linux-image-[0-9].*-amd64$"];
    let output = command(tool).args(arguments).output().map_err(|e| cannot_run(tool, e))?;
    if !output.status.success() {
        return Err(failed(tool, arguments[0], &output.stderr));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter_map(|l| l.split_whitespace().next()).map(Into::into).collect())
}

fn update(progress: &mut dyn Progress) -> Result<(), ImageError> {
    progress.stage("updating apt's lists", None);
    let began = Instant::now();
    loop {
        let result = run("apt-get", "update", command("apt-get").arg("update"), progress, |_| {});
        match result {
            Err(ImageError::Apt { detail, .. })
                if detail.contains("lock") && began.elapsed() < LOCK_PATIENCE =>
            {
                std::thread::sleep(Duration::from_secs(1));
            }
            other => return other,
        }
    }
}

fn download(name: &str, dir: &Path, progress: &mut dyn Progress) -> Result<PathBuf, ImageError> {
    let size = command("apt-cache").args(["show", "--no-all-versions", name]).output();
    let size = size.ok().and_then(|o| {
        String::from_utf8_lossy(&o.stdout).lines().find_map(|l| l.strip_prefix("Size: ")?.trim().parse().ok())
    });
    progress.stage(&format!("fetching {name}"), size);
    let files = || fs::read_dir(dir).into_iter().flatten().flatten();
    let fetched = |progress: &mut dyn Progress| {
        progress.at(files().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum());
    };
    run(
        "apt-get",
        &format!("download {name}"),
        command("apt-get").args(["download", name]).current_dir(dir),
        progress,
        fetched,
    )?;
    let deb = files().map(|f| f.path()).find(|p| p.extension().is_some_and(|e| e == "deb"));
    deb.ok_or_else(|| failed("apt-get", &format!("download {name}"), b"it left no .deb file"))
}

fn command(tool: &str) -> Command {
    let mut command = Command::new(tool);
    command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    command
}

/// Runs `command` to its end, or kills it when the work is to stop.
fn run(
    tool: &'static str,
    what: &str,
    command: &mut Command,
    progress: &mut dyn Progress,
    look: impl FnMut(&mut dyn Progress),
) -> Result<(), ImageError> {
    match tool::run(command, Stdio::null(), progress, look) {
        Err(error) => Err(cannot_run(tool, error)),
        Ok(None) => Err(ImageError::Stopped),
        Ok(Some(ended)) if ended.status.success() => Ok(()),
        Ok(Some(ended)) => Err(failed(tool, what, ended.words.as_bytes())),
    }
}

fn cannot_run(tool: &'static str, source: std::io::Error) -> ImageError {
    match source.kind() {
        ErrorKind::NotFound => ImageError::NoApt { tool },
        _ => ImageError::Run { tool, source },
    }
}

/// A failure in apt's own words: its lines that begin with `E:`, or else the last one.
fn failed(tool: &'static str, what: &str, stderr: &[u8]) -> ImageError {
    let text = String::from_utf8_lossy(stderr);
    let mut errors: Vec<_> = text.lines().filter_map(|l| l.strip_prefix("E: ")).collect();
    if errors.is_empty() {
        errors.extend(text.lines().last());
    }
    ImageError::Apt { tool, what: what.into(), detail: errors.join("; ") }
}

/// The newest of `names` that is a signed kernel of this release and flavour.
fn newest(names: &[String], release: &str, flavour: Flavour) -> Option<String> {
    let version = |name: &str| -> Option<String> {
        let version = version_of(name, flavour)?;
        let rest = version.strip_prefix(release)?;
        // `6.1` must not find 6.12, and `6.12` alone is a package without a kernel of its own.
        let follows = rest.starts_with(|c: char| !c.is_ascii_digit());
        follows.then(|| version.to_string())
    };
    let found = names.iter().filter_map(|n| Some((version(n)?, n)));
    found.max_by(|a, b| compare_versions(&a.0, &b.0)).map(|(_, name)| name.clone())
}

/// `6.12.9+deb12` of `linux-image-6.12.9+deb12-cloud-amd64`, if that is a kernel of this flavour.
fn version_of(name: &str, flavour: Flavour) -> Option<&str> {
    let version = name.strip_prefix("linux-image-")?.strip_suffix("-amd64")?;
    let version = version.strip_suffix(flavour.infix())?;
    // The last part of `6.1.0-48` is a number, that of `6.1.0-48-rt` another flavour's name.
    let number = |part: &str| part.starts_with(|c: char| c.is_ascii_digit());
    version.split('-').all(number).then_some(version)
}

/// The releases among `names`, as in `6.1`, in order.
fn releases(names: &[String]) -> Vec<String> {
    let release = |name: &String| {
        let version = version_of(name, Flavour::Cloud).or_else(|| version_of(name, Flavour::Generic))?;
        let mut parts = version.split('.');
        let (major, minor) = (parts.next()?, parts.next()?);
        let digits = minor.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(format!("{major}.{digits}"))
    };
    let mut found: Vec<_> = names.iter().filter_map(release).collect();
    found.sort_by(|a, b| compare_versions(a, b));
    found.dedup();
    found
}

/// Debian's order of upstream versions (Debian Policy 5.6.12): text and numbers in turn; `~` comes
/// before everything, even the end; letters come before other characters.
pub(super) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        while a.first().is_some_and(|c| !c.is_ascii_digit()) || b.first().is_some_and(|c| !c.is_ascii_digit())
        {
            match weight(a.first()).cmp(&weight(b.first())) {
                Ordering::Equal => (a, b) = (&a[1..], &b[1..]),
                other => return other,
            }
        }
        let (number_a, rest_a) = number(a);
        let (number_b, rest_b) = number(b);
        let order = number_a.len().cmp(&number_b.len()).then(number_a.cmp(number_b));
        if order.is_ne() || (rest_a.is_empty() && rest_b.is_empty()) {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

/// Order among what is no digit; a digit or the end counts as 0.
fn weight(c: Option<&u8>) -> i32 {
    match c {
        None | Some(b'0'..=b'9') => 0,
        Some(b'~') => -1,
        Some(c) if c.is_ascii_alphabetic() => i32::from(*c),
        Some(c) => i32::from(*c) + 256,
    }
}

/// The leading digits without leading zeros, and the rest.
fn number(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|c| !c.is_ascii_digit()).unwrap_or(text.len());
    let zeros = text[..end].iter().take_while(|&&c| c == b'0').count();
    (&text[zeros..end], &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|n| format!("linux-image-{n}")).collect()
    }

    #[test]
    fn the_newest_of_a_release_is_found() {
        let known = names(&[
            "6.1.0-9-cloud-amd64",
            "6.1.0-48-cloud-amd64",
            "6.1.0-48-rt-amd64",
            "6.1.0-47-amd64",
            "6.12-cloud-amd64",
            "6.12.9+deb12-cloud-amd64",
            "6.12.117+deb12-cloud-amd64",
            "6.12.118+deb12-cloud-amd64-unsigned",
            "6.12.118+deb12-cloud-amd64-dbg",
            "6.12.118+deb12-rt-amd64",
            "6.12.22+bpo-amd64",
            "cloud-amd64",
        ]);
        let find = |release, flavour| newest(&known, release, flavour);
        assert_eq!(find("6.12", Flavour::Cloud).as_deref(), Some("linux-image-6.12.117+deb12-cloud-amd64"));
        assert_eq!(find("6.12", Flavour::Generic).as_deref(), Some("linux-image-6.12.22+bpo-amd64"));
        assert_eq!(find("6.1", Flavour::Cloud).as_deref(), Some("linux-image-6.1.0-48-cloud-amd64"));
        assert_eq!(find("6.1", Flavour::Generic).as_deref(), Some("linux-image-6.1.0-47-amd64"));
        assert_eq!(find("6.13", Flavour::Cloud), None);
        assert_eq!(releases(&known), ["6.1", "6.12"]);
    }

    #[test]
    fn versions_are_in_debians_order() {
        let order = ["1.0~rc1", "1.0", "1.0+deb12", "1.0.1", "1.2", "1.10", "1.10a", "1.10+", "2"];
        for pair in order.windows(2) {
            assert_eq!(compare_versions(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare_versions(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(compare_versions("1.01", "1.1"), Ordering::Equal);
    }

    proptest! {
        #[test]
        fn the_order_is_total(a in "[0-9a-c.+~-]{0,8}", b in "[0-9a-c.+~-]{0,8}", c in "[0-9a-c.+~-]{0,8}") {
            prop_assert_eq!(compare_versions(&a, &b), compare_versions(&b, &a).reverse());
            prop_assert_eq!(compare_versions(&a, &a), Ordering::Equal);
            if compare_versions(&a, &b).is_le() && compare_versions(&b, &c).is_le() {
                prop_assert!(compare_versions(&a, &c).is_le());
            }
        }

        #[test]
        fn no_name_panics(name in "(linux-image-)?[0-9a-z.+~-]{0,30}(-amd64)?", release in "[0-9.]{0,5}") {
            let _ = newest(std::slice::from_ref(&name), &release, Flavour::Cloud);
            let _ = releases(&[name]);
        }
    }
}
