//! The same Linux guest under Samepage and under QEMU's microvm, driven the same way: commands for
//! the agent, balloon sizes, and the processor time that the VMM itself takes.

mod qemu;
mod samepage;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Child;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

pub use qemu::{MICROVM, Qemu};
pub use samepage::Samepage;

/// What guests get: no PCI probing that no VMM here answers, and the lines that count.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// Time limit for a guest to boot, or to carry out a command.
const LIMIT: Duration = Duration::from_secs(120);
/// How often a balloon that moves is looked at.
const POLL: Duration = Duration::from_millis(10);

/// The guest: one vCPU, this much memory, this kernel.
#[derive(Clone, Copy, Debug)]
pub struct Linux<'a> {
    /// An ELF vmlinux, which QEMU boots by PVH.
    pub kernel: &'a Path,
    /// An initramfs whose /init is the agent.
    pub initrd: &'a Path,
    /// RAM in MiB.
    pub memory_mib: u64,
    /// More for its command line.
    pub append: &'a str,
}

impl Linux<'_> {
    /// The whole command line.
    fn cmdline(&self) -> String {
        format!("{CMDLINE} {}", self.append)
    }
}

/// What every VMM does with a balloon.
pub trait Balloon {
    /// For the report.
    fn name(&self) -> &'static str;
    /// Asks for a balloon of this size.
    fn set_target(&mut self, bytes: u64) -> Result<()>;
    /// The size that the driver says it has reached, in bytes.
    fn actual(&mut self) -> Result<u64>;
    fn agent(&mut self) -> &mut Agent;
    fn pid(&self) -> u32;
    /// Whether a thread of this name runs guest code, and not the VMM's own.
    fn is_vcpu(&self, thread: &str) -> bool;
}

/// What one change of a balloon took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    /// From the request until the driver says that it is done.
    pub seconds: f64,
    /// Processor time of the VMM's threads that run no guest code.
    pub vmm_cpu_seconds: f64,
}

/// Sets the balloon to `bytes` and waits until it is there.
///
/// # Errors
/// It is not there in time.
pub fn move_to(vm: &mut dyn Balloon, bytes: u64) -> Result<Moved> {
    let (began, cpu) = (Instant::now(), vmm_cpu_seconds(vm)?);
    vm.set_target(bytes)?;
    loop {
        let actual = vm.actual()?;
        if actual == bytes {
            let seconds = began.elapsed().as_secs_f64();
            return Ok(Moved { seconds, vmm_cpu_seconds: vmm_cpu_seconds(vm)? - cpu });
        }
        if began.elapsed() > LIMIT {
            bail!("{}: the balloon stands at {actual} of {bytes} bytes after {LIMIT:?}", vm.name());
        }
        thread::sleep(POLL);
    }
}

/// Time on the processor so far, of every thread that is no vCPU. From schedstat, in nanoseconds.
fn vmm_cpu_seconds(vm: &dyn Balloon) -> Result<f64> {
    let mut nanoseconds = 0u64;
    let tasks = format!("/proc/{}/task", vm.pid());
    for task in fs::read_dir(&tasks).with_context(|| format!("{}: {tasks}", vm.name()))? {
        let path = task?.path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        if vm.is_vcpu(name.trim()) {
            continue;
        }
        // A thread may end meanwhile.
        let text = fs::read_to_string(path.join("schedstat")).unwrap_or_default();
        nanoseconds += text.split(' ').next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(nanoseconds).as_secs_f64())
}

/// The agent in a guest: lines in, lines out.
pub struct Agent {
    input: Box<dyn Write + Send>,
    lines: Receiver<String>,
}

impl Agent {
    fn new(input: impl Write + Send + 'static, output: impl Read + Send + 'static) -> Self {
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let _ = send.send(String::from_utf8_lossy(&line).trim().to_owned());
            }
        });
        Self { input: Box::new(input), lines }
    }

    /// Waits for a line that `is` so; the console's other lines are passed over.
    ///
    /// # Errors
    /// It does not come.
    pub fn wait(&mut self, what: &str, is: impl Fn(&str) -> bool) -> Result<String> {
        let until = Instant::now() + LIMIT;
        let mut last = String::from("nothing");
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if is(&line) => return Ok(line),
                Ok(line) if !line.is_empty() => last = line,
                Ok(_) => {}
                Err(_) => bail!("the guest did not say {what}; its last line: {last}"),
            }
        }
    }

    /// Sends a command and waits for its final answer.
    ///
    /// # Errors
    /// The guest refuses, or does not answer.
    pub fn command(&mut self, line: &str) -> Result<String> {
        self.input.write_all(format!("{line}\n").as_bytes())?;
        self.input.flush()?;
        let answer = self.wait("an answer", |l| l.starts_with("ok ") || l.starts_with("err "))?;
        ensure!(answer.starts_with("ok "), "{line} was answered by {answer}");
        Ok(answer)
    }
}

/// A VMM that ends with its measurement.
pub(crate) struct Process(pub(crate) Child);

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself, which is reported elsewhere.
        let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
        let _ = self.0.wait();
    }
}
