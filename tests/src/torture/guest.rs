//! One guest of the torture: its VM's process, and its commands.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kernel_view::pagemap::Pagemap;
use machine::working_set::Sampling;
use machine::{Console, VmConfig};
use rustix::process::{Pid, setpriority_process};
use serde_json::{Value, json};

use super::choices::Choices;
use super::{Options, Tally};
use crate::keeper::Image;

/// Time limit of any command to a guest: some ten times what the slowest takes in the lab.
const LIMIT: Duration = Duration::from_secs(300);
/// Poll interval for a VM or a balloon.
const LOOK: Duration = Duration::from_millis(10);
/// What a VM's thread that merges is called.
const AGENT: &str = "merge";
/// Contents that guests choose from: few, so that they have them in common and have them again.
const SEEDS: u64 = 6;
/// Pages that are rewritten within some 20 ms, as an agent waits from one look to the next.
const FEW_PAGES: u64 = 1000;
/// Pages of a working set's sample: a tenth of a guest's and more.
const SAMPLES: u64 = 1000;
/// The most pages that are rewritten in a second.
const MAX_RATE: u64 = 40_000;

pub(super) struct Guest {
    name: String,
    process: Child,
    com2: BufReader<UnixStream>,
    control: PathBuf,
    log: PathBuf,
    ram_pages: u64,
    /// Wrong pages reported already.
    mismatched: u64,
}

impl Guest {
    /// Its VM ends when its standard input does, so that it does not outlive us.
    pub(super) fn start(dir: &Path, name: &str, options: &Options, merge: &Path) -> Result<Self> {
        let memory_mib = options.memory_mib;
        let sampling = options.sampling.map(|period| period.as_secs_f64().to_string());
        let samples = SAMPLES.to_string();
        let file = |kind: &str| dir.join(format!("{name}.{kind}"));
        let (control, com2, log) = (file("ctl"), file("com2"), file("log"));
        let mut program = Command::new(crate::samepage());
        program
            .args(["run", "--lifeline", "--console", "none", "--name", name, "--memory"])
            .arg(format!("{memory_mib}M"))
            .args(["--control".as_ref(), control.as_os_str(), "--com2".as_ref(), com2.as_os_str()])
            .args(["--merge".as_ref(), merge.as_os_str()])
            .args(sampling.iter().flat_map(|s| ["--sample-working-set", s, "--samples", &samples]))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        let mut guest = Self::connected(name, program, (control, com2, log), options)?;
        let ready = guest.line()?;
        ensure!(ready.starts_with("ready "), "it said {ready:?} instead of being ready");
        Ok(guest)
    }

    /// The VM that `program` starts, once it can be talked to.
    fn connected(
        name: &str,
        mut program: Command,
        (control, com2, log): (PathBuf, PathBuf, PathBuf),
        options: &Options,
    ) -> Result<Self> {
        let mut process = program.spawn()?;
        let until = Instant::now() + LIMIT;
        let com2 = loop {
            match connect(&com2) {
                Ok(com2) => break com2,
                Err(error) if process.try_wait()?.is_some() || Instant::now() > until => {
                    bail!("{error:#}; it said: {}", fs::read_to_string(&log)?);
                }
                Err(_) => thread::sleep(LOOK),
            }
        };
        let ram_pages = options.memory_mib << 8;
        Ok(Self { name: name.to_owned(), process, com2, control, log, ram_pages, mismatched: 0 })
    }

    /// One that goes on from where `image` is, in the middle of whatever that one was doing.
    pub(super) fn cloned(
        dir: &Path,
        name: &str,
        options: &Options,
        merge: &Path,
        image: &Image,
    ) -> Result<Self> {
        let file = |kind: &str| dir.join(format!("{name}.{kind}"));
        let (control, com2, log) = (file("ctl"), file("com2"), file("log"));
        let config = VmConfig {
            name: name.to_owned(),
            memory_bytes: options.memory_mib << 20,
            console: Console::None,
            control: Some(control.clone()),
            com2: Some(com2.clone()),
            merge: Some(merge.to_owned()),
            sampling: options.sampling.map(|period| Sampling { period, samples: SAMPLES }),
            lifeline: true,
            ..VmConfig::default()
        };
        let mut program = image.command(config)?;
        program.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(File::create(&log)?);
        let mut guest = Self::connected(name, program, (control, com2, log), options)?;
        // It says that it is a copy, and then the answers to what its original was asked.
        while !guest.line()?.starts_with("generation ") {}
        guest.com2.get_mut().write_all(b"random\n")?;
        while !guest.line()?.starts_with("ok command=random ") {}
        guest.command("idle")?;
        Ok(guest)
    }

    /// Where it is asked.
    pub(super) fn control(&self) -> &Path {
        &self.control
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Makes its agent polite or not. A polite one has to let the vCPU go first, also in the middle
    /// of a merge: which is when its writes are to meet the frozen pages.
    pub(super) fn mind(&self, choices: &mut Choices) -> Result<()> {
        let nice = [0, 10, 19][choices.below(3) as usize];
        for task in fs::read_dir(format!("/proc/{}/task", self.process.id()))? {
            let task = task?;
            let number = task.file_name().to_string_lossy().parse().ok().and_then(Pid::from_raw);
            if fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == AGENT) {
                // Only root may make it less polite again.
                let _ = setpriority_process(number, nice);
            }
        }
        Ok(())
    }

    /// Does one thing, which `what` below 100 says. Returns how many pages it has checked.
    pub(super) fn turn(&mut self, what: u64, choices: &mut Choices, tally: &mut Tally) -> Result<u64> {
        match what {
            0..25 => self.fill(choices)?,
            25..55 => {
                let class = ["zero", "common", "dup", "unique", "all"][choices.below(5) as usize];
                let (rate, seconds) = (choices.below(MAX_RATE), 1 + choices.below(3));
                self.command(&format!("churn class={class} rate={rate} seconds={seconds}"))?;
            }
            55..70 => return self.verify(tally),
            70..80 => {
                let freed = self.command(&format!("free percent={}", 1 + choices.below(100)))?;
                let freed = number(&freed, "freed").unwrap_or(0);
                self.balloon(freed)?;
            }
            80..90 => self.balloon(choices.below(self.ram_pages))?,
            90..97 => {
                self.deflate()?;
                let checked = self.command("balloon check")?;
                tally.ballooned += number(&checked, "checked")?;
                // A page that was given back and does not read as zeros.
                tally.mismatches += number(&checked, "nonzero")?;
            }
            // It rests, and is merged.
            _ => thread::sleep(Duration::from_millis(choices.below(1000))),
        }
        Ok(0)
    }

    fn fill(&mut self, choices: &mut Choices) -> Result<()> {
        let mut left = 100;
        let [zero, common, dup] = [40, 80, 60].map(|most| {
            let percent = choices.below(most).min(left);
            left -= percent;
            percent
        });
        let (seed, shared) = (choices.below(SEEDS), 100 + choices.below(2));
        let mut fill = format!(
            "fill seed={seed} common={shared} zero={zero} common_pct={common} dup={dup} unique={left}"
        );
        match choices.below(4) {
            // Whatever the balloon has left.
            0 => {}
            // As much as it likes.
            1 => fill += &format!(" pages={}", choices.below(self.ram_pages)),
            // So few that churn comes round about when they are looked at: it meets them while they
            // are merged.
            2 => fill += &format!(" pages={}", 64 + choices.below(FEW_PAGES)),
            // All of it.
            _ => self.deflate()?,
        }
        self.command(&fill)?;
        Ok(())
    }

    /// Checks all of its pages. Returns how many.
    pub(super) fn verify(&mut self, tally: &mut Tally) -> Result<u64> {
        let verified = self.command("verify")?;
        let checked = number(&verified, "checked")?;
        tally.verified += checked;
        // Also those that churn has found since the last time.
        let all = number(&self.command("report")?, "mismatched")?;
        if all > self.mismatched {
            eprintln!("guest {}: {} pages are wrong; {verified}", self.name, all - self.mismatched);
            tally.mismatches += all - self.mismatched;
            self.mismatched = all;
        }
        Ok(checked)
    }

    /// Counts its pages that are shared, from outside.
    pub(super) fn count(&mut self, tally: &mut Tally) -> Result<()> {
        let status = self.ask(&json!({"op": "status"}))?["status"].take();
        let mut pagemap = Pagemap::open(self.process.id())?;
        let mut entries = Vec::new();
        for extent in status["extents"].as_array().context("no extents")? {
            let number = |key: &str| extent[key].as_u64().with_context(|| format!("no {key}"));
            pagemap.read(memory::Hva(number("hva")?), number("bytes")? as usize / 4096, &mut entries)?;
            for entry in entries.iter().filter(|entry| entry.present()) {
                tally.merged += u64::from(entry.file_or_shared());
                tally.zeros += u64::from(!entry.file_or_shared() && !entry.exclusive());
            }
        }
        Ok(())
    }

    /// How many samples of its working set were taken.
    pub(super) fn periods(&mut self) -> Result<u64> {
        let known = self.ask(&json!({"op": "working_set"}))?;
        known["working_set"]["periods"].as_u64().with_context(|| format!("no working set: {known}"))
    }

    /// Asks it for a balloon of this size, which it need not be able to give.
    fn balloon(&mut self, pages: u64) -> Result<()> {
        let set = self.ask(&json!({"op": "balloon_target", "pages": pages}))?;
        ensure!(set == "done", "balloon of {pages} pages: {set}");
        Ok(())
    }

    fn deflate(&mut self) -> Result<()> {
        self.balloon(0)?;
        let until = Instant::now() + LIMIT;
        while self.ask(&json!({"op": "balloon_size"}))?["balloon_size"]["actual_pages"] != 0 {
            ensure!(Instant::now() < until, "the balloon is not empty after {LIMIT:?}");
            thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Has it obey, and gives its answer: also that it has no room, or no such pages, which comes
    /// with random commands.
    pub(super) fn command(&mut self, command: &str) -> Result<String> {
        self.com2.get_mut().write_all(format!("{command}\n").as_bytes()).or_else(|e| self.ended(&e))?;
        let answer = loop {
            let line = self.line()?;
            if !line.starts_with("progress ") {
                break line;
            }
        };
        let expected = ["ok ", "err code=memory ", "err code=empty "];
        ensure!(expected.iter().any(|e| answer.starts_with(e)), "{command:?} was answered {answer:?}");
        Ok(answer)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        match self.com2.read_line(&mut line) {
            Ok(0) => self.ended(&"it closed the connection"),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => self.ended(&error),
        }
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        let answered = connect(&self.control).and_then(|mut control| {
            control.get_mut().write_all(format!("{request}\n").as_bytes())?;
            let mut line = String::new();
            control.read_line(&mut line)?;
            Ok(serde_json::from_str(&line)?)
        });
        answered.or_else(|error| self.ended(&error))
    }

    /// The error of a VM that no longer answers.
    fn ended<T>(&mut self, error: &dyn std::fmt::Display) -> Result<T> {
        let until = Instant::now() + Duration::from_secs(2);
        while self.process.try_wait()?.is_none() && Instant::now() < until {
            thread::sleep(LOOK);
        }
        let status = self.process.try_wait()?.map_or("it runs".into(), |status| status.to_string());
        bail!("{error}; {status}; it said: {}", fs::read_to_string(&self.log)?)
    }

    /// Ends it in good order.
    pub(super) fn end(mut self) -> Result<()> {
        self.ask(&json!({"op": "stop"}))?;
        let status = self.process.wait()?;
        let said = fs::read_to_string(&self.log)?;
        ensure!(status.success() && said.is_empty(), "guest {}: {status}; it said: {said}", self.name);
        Ok(())
    }
}

/// However it goes, and also as a part of the torture: at once.
impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(super) fn connect(socket: &Path) -> Result<BufReader<UnixStream>> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(BufReader::new(stream))
}

/// The number after `key=` in an answer.
fn number(answer: &str, key: &str) -> Result<u64> {
    let value = answer.split(' ').find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    value.and_then(|value| value.parse().ok()).with_context(|| format!("no number {key}= in {answer:?}"))
}
