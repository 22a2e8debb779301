//! Starts the VM process of a guest.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

use machine::working_set::Sampling;
use machine::{Console, VmConfig, Vsock, handover};
use os::{Process, executable, handed};

use super::{Guest, Lifetime, Running};
use crate::HostError;
use crate::images::Image;
use crate::lifetime::OOM_SCORE_ADJ;
use crate::pool::{Standby, VmProcess};
use crate::runtime::FleetDir;
use crate::spec::{EngineName, GuestSpec, Overcommit};
use crate::state::{Saved, Started};

/// Until the governor has seen it, a guest may take this much memory a second: 64 MiB.
const NEWCOMER_PAGES_PER_SECOND: u64 = 16_384;

/// What a guest goes on from, and the process that stands by for it, if there is one.
pub(crate) struct Origin<'a> {
    pub(crate) image: &'a Arc<Image>,
    pub(crate) standby: Option<Standby>,
}

impl Guest {
    /// Starts the VM process of guest `number`, which goes on from `origin` if there is one.
    pub(crate) fn start(
        spec: &GuestSpec,
        number: usize,
        dir: &FleetDir,
        lifetime: Lifetime,
        (engine, merge): (EngineName, Option<PathBuf>),
        overcommit: &Overcommit,
        origin: Option<Origin<'_>>,
    ) -> Result<Self, HostError> {
        let failed = |source| HostError::Spawn { guest: spec.name.clone(), source };
        let (control, com2, log) = (dir.control(&spec.name)?, dir.com2(&spec.name)?, dir.log(&spec.name));
        let _ = fs::remove_file(&log);
        let working_set_seconds = overcommit.sampling_seconds();
        // Before there is a process: one that is found without it is not of this fleet's making.
        let started = Started { guest: spec.clone(), engine, working_set_seconds };
        Saved::new(started, None, None, None).write(dir)?;
        // Appending, as the console does: else each would write over the other's lines.
        let messages = File::options().create(true).append(true).open(&log).map_err(failed)?;
        let (lifeline, daemon) = match lifetime {
            Lifetime::WithUs => (true, None),
            Lifetime::TheirOwn => (false, Some(std::process::id().cast_signed())),
        };
        let path = dir.vsock(&spec.name)?;
        let vm = VmConfig {
            vsock: spec.vm.vsock.clone().map(|vsock| Vsock { path, ..vsock }),
            console: Console::File(log),
            control: Some(control.clone()),
            com2: Some(com2),
            merge,
            sampling: working_set_seconds.map(Sampling::every_seconds),
            throttle: overcommit.policy.then_some(NEWCOMER_PAGES_PER_SECOND),
            oom_score_adj: Some(OOM_SCORE_ADJ),
            lifeline,
            daemon,
            ..spec.vm.clone()
        };
        // By these a later daemon, and lists of processes, know which VM it is; what it is to be is data.
        let mut arguments = ["run", "--name", &spec.name, "--control"].map(OsString::from).to_vec();
        arguments.push(control.into());
        arguments
            .extend(daemon.iter().flat_map(|pid| ["--daemon".to_owned(), pid.to_string()]).map(Into::into));
        let (image, standby) = origin.map_or((None, None), |origin| (Some(origin.image), origin.standby));
        let taken = standby.zip(image).and_then(|(standby, image)| {
            let taken = standby.become_vm(&arguments, &vm, &messages, image);
            // It has ended; a new process does as well.
            taken.inspect_err(|error| tracing::debug!("{}: no process of the pool: {error}", spec.name)).ok()
        });
        let process = taken.map_or_else(|| spawn(vm, &arguments, image, messages), Ok).map_err(failed)?;
        let VmProcess { child, process, lifeline } = process;
        let guest = Self {
            spec: spec.clone(),
            number,
            dir: dir.clone(),
            engine,
            working_set_seconds,
            process: Running::Child { child, process, lifeline },
            joined: None,
            com2: None,
            ready: image.and_then(|image| image.ready),
            fill: image.and_then(|image| image.fill),
            image: image.cloned(),
            generation: None,
        };
        guest.save();
        Ok(guest)
    }
}

/// Starts a process for the VM of `config`, which goes on from `image` if there is one.
fn spawn(
    config: VmConfig,
    arguments: &[OsString],
    image: Option<&Arc<Image>>,
    messages: File,
) -> io::Result<VmProcess> {
    let mut program = executable::command();
    let image = image.map(|image| image.give(&mut program)).transpose()?;
    let lifeline = config.lifeline;
    let config = handed::give(&mut program, handover::write(&VmConfig { image, ..config })?);
    program
        .args(arguments)
        .args(["--config-fd", &config.to_string()])
        .stdin(if lifeline { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::null())
        .stderr(messages)
        // A Control-C on the terminal is for us, and we tell the guests.
        .process_group(0);
    let mut child = program.spawn()?;
    let lifeline = child.stdin.take();
    match Process::of_child(&child) {
        Ok(process) => Ok(VmProcess { child, process, lifeline }),
        Err(error) => {
            let _ = child.kill().and_then(|()| child.wait());
            Err(error)
        }
    }
}
