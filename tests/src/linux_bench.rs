//! What the benches that boot Linux have in common: options, the host's huge pages, kernel and
//! initrd in memory.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use tempfile::TempDir;

const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Options of every such bench.
pub struct Options {
    /// What `samepage image` made.
    pub image: PathBuf,
    /// Measured rounds.
    pub rounds: usize,
    /// Guest RAM in MiB.
    pub memory_mib: u64,
    /// Transparent huge pages of the host while it runs.
    pub thp: String,
    /// Whether to print one JSON object.
    pub json: bool,
}

impl Options {
    /// Defaults: three rounds, and guests of this much memory.
    #[must_use]
    pub fn new(memory_mib: u64, thp: &str) -> Self {
        Self { image: PathBuf::new(), rounds: 3, memory_mib, thp: thp.into(), json: false }
    }

    /// Reads the command line. `more` gets what is not known here, with a way to its value, and
    /// says whether it knows it. None if help was asked for.
    ///
    /// # Errors
    /// The command line is wrong.
    pub fn parse(
        mut self,
        usage: &str,
        mut more: impl FnMut(&str, &mut dyn FnMut() -> Result<String>) -> Result<bool>,
    ) -> Result<Option<Self>> {
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
            match arg.as_str() {
                "--image" => self.image = value()?.into(),
                "--rounds" => self.rounds = value()?.parse().context("--rounds takes a number")?,
                "--memory" => self.memory_mib = value()?.parse().context("--memory takes a number of MiB")?,
                "--thp" => self.thp = value()?,
                "--json" => self.json = true,
                "-h" | "--help" => return Ok(None),
                other if more(other, &mut value)? => {}
                other => bail!("unknown argument {other}\n\n{usage}"),
            }
        }
        ensure!(
            self.image.is_dir(),
            "--image DIR is needed; make one with `samepage image --out DIR`\n\n{usage}"
        );
        ensure!(self.rounds > 0, "--rounds must be at least 1");
        Ok(Some(self))
    }

    /// Sets the host's huge pages, and reads kernel and initrd into memory.
    ///
    /// # Errors
    /// The setting or the files cannot be had.
    pub fn prepare(&self) -> Result<InMemory> {
        fs::write(THP, &self.thp).with_context(|| format!("cannot write '{}' to {THP}", self.thp))?;
        let dir = tempfile::tempdir_in("/dev/shm").context("cannot make a directory in /dev/shm")?;
        let copy = |name| -> Result<PathBuf> {
            let (from, to) = (self.image.join(name), dir.path().join(name));
            fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
            Ok(to)
        };
        Ok(InMemory { kernel: copy("vmlinux")?, initrd: copy("initrd.cpio")?, dir })
    }
}

/// A kernel and an initrd in memory, for as long as this lives.
pub struct InMemory {
    /// An ELF vmlinux.
    pub kernel: PathBuf,
    /// An initramfs whose /init is the agent.
    pub initrd: PathBuf,
    /// Where they are, with room for more.
    pub dir: TempDir,
}
