//! `samepage snapshot` on what is on the disk, and `samepage restore`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::progress::{draw_target, interrupt_flag, is_set};
use super::table::mib;
use fleet::HostError;
use fleet::checkpoints::{CheckpointInfo, Shelf, Work, WorkKind};
use fleet::daemon_client::request;
use fleet::living::choose;
use fleet::status::{OnDisk, Reply, Request, Restore};
use os::print::{errln, outln};
use store::{Collected, Compression, Damage, Name, Verified};

/// How long the daemon may take to write or read what a guest has.
const LIMIT: Duration = Duration::from_secs(3600);
/// How often it is asked how far it is, and how long it may take to say so.
const LOOK: Duration = Duration::from_millis(200);
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// How long a process waits for another that changes the store.
pub(super) const STORE_LIMIT: Duration = Duration::from_secs(120);

/// Where checkpoints are.
#[derive(clap::Args)]
pub(super) struct Where {
    /// The directory of checkpoints, with a store for each trust domain [default: $SAMEPAGE_STORE_DIR, else
    /// /var/lib/samepage/checkpoints for root, else samepage/checkpoints in $XDG_DATA_HOME or ~/.local/share]
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Which trust domain; not needed while only one has a checkpoint of this name
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
}

impl Where {
    /// As by default.
    pub(super) fn usual() -> Self {
        Self { store: None, domain: None }
    }

    pub(super) fn shelf(&self) -> anyhow::Result<Shelf> {
        Ok(Shelf::find(self.store.as_deref())?)
    }

    /// Its place, for a daemon.
    pub(super) fn on_disk(&self, compress: Compression) -> anyhow::Result<OnDisk> {
        Ok(OnDisk { stores: self.shelf()?.path().into(), compress })
    }

    /// All checkpoints. What is damaged is said on standard error.
    pub(super) fn list(&self) -> anyhow::Result<Vec<CheckpointInfo>> {
        let (found, damaged) = self.shelf()?.list(self.domain.as_deref())?;
        damaged.iter().for_each(|why| errln!("warning: {why}"));
        Ok(found)
    }

    /// The domain of a checkpoint.
    pub(super) fn domain_of(&self, name: &Name) -> anyhow::Result<String> {
        Ok(self.shelf()?.domain_of(name, self.domain.as_deref())?)
    }

    /// The domain that was said.
    pub(super) fn said_domain(&self) -> Option<&str> {
        self.domain.as_deref()
    }

    /// The domains that are meant.
    fn domains(&self) -> anyhow::Result<Vec<String>> {
        match &self.domain {
            Some(domain) => Ok(vec![domain.clone()]),
            None => Ok(self.shelf()?.domains()?),
        }
    }
}

/// A bar of pages.
pub(super) fn bar(what: &str) -> ProgressBar {
    let template = "{prefix:>20} [{bar:32}] {human_pos:>9} / {human_len} pages";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, draw_target())
        .with_style(style.progress_chars("=> "))
        .with_prefix(what.to_owned())
}

/// Asks the daemon of a fleet, and shows how far it is with what it writes or reads.
pub(super) fn ask(fleet: &str, question: &Request) -> Result<Reply, HostError> {
    watching(fleet, true, || request(fleet, question, LIMIT))
}

/// Shows how far the daemon is with what it writes or reads, if it does that, while `work` waits for it.
pub(super) fn watching<T>(fleet: &str, is_long: bool, work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let teller = scope.spawn(|| {
            let bar = bar("");
            while is_long && !done.load(Ordering::Relaxed) && !bar.is_hidden() {
                thread::park_timeout(LOOK);
                let Ok(Reply::Works(works)) = request(fleet, &Request::Works, LOOK_LIMIT) else { continue };
                let Some(Work { kind, done, total, .. }) = works.first() else { continue };
                bar.set_prefix(if *kind == WorkKind::Save { "write" } else { "read" });
                bar.set_length((*total).max(1));
                bar.set_position(*done);
            }
            bar.finish_and_clear();
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        teller.thread().unpark();
        result
    })
}

pub(super) fn line(one: &CheckpointInfo) -> String {
    let when = os::Moment::of(one.saved_at);
    let mut text = format!(
        "{}: on disk, guest {}, domain {}, {} MiB of memory, saved at {when}",
        one.name,
        one.guest,
        one.domain,
        mib(one.memory_bytes)
    );
    if let Some(size) = one.size {
        text += &format!("; {} MiB, of which {} MiB alone", mib(size.bytes), mib(size.own_bytes));
    }
    if let Some(saved) = one.saved {
        text += &format!(
            "; {} pages, {} of them new, {} MiB written in {:.2} s",
            saved.pages,
            saved.new_pages,
            mib(saved.written_bytes),
            one.seconds.unwrap_or(0.0)
        );
    }
    if let Some(fleet) = &one.suspended {
        text += &format!("; `fleet up` of {fleet} goes on from it");
    }
    text
}

/// Verifies every file of the stores.
pub(super) fn verify(place: &Where, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Of {
        domain: String,
        #[serde(flatten)]
        verified: Verified,
    }
    let (shelf, interrupted, bar) = (place.shelf()?, interrupt_flag()?, bar("verify"));
    let mut all = Vec::new();
    for domain in place.domains()? {
        let Some(store) = shelf.store(&domain)? else { bail!("domain {domain} has no checkpoints") };
        let verified = store.read(STORE_LIMIT)?.verify(&mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            !is_set(&interrupted)
        })?;
        all.push(Of { domain, verified });
    }
    bar.finish_and_clear();
    if json {
        outln!("{}", serde_json::to_string(&all)?)?;
    } else {
        for Of { domain, verified } in &all {
            let Verified { checkpoints, pages, damage } = verified;
            outln!("{domain}: {checkpoints} checkpoints, {pages} pages, {} files damaged", damage.len())?;
            for Damage { path, why, checkpoints } in damage {
                outln!("  {}: {why}; needed by: {}", path.display(), checkpoints.join(", "))?;
            }
        }
        if all.is_empty() {
            outln!("no checkpoints")?;
        }
    }
    let is_whole = all.iter().all(|of| of.verified.damage.is_empty());
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Removes a checkpoint. False if there is none.
pub(super) fn remove(place: &Where, snapshot: &str, json: bool) -> anyhow::Result<ExitCode> {
    let name = Name::new(snapshot)?;
    let domain = place.domain_of(&name)?;
    let store = place.shelf()?.store(&domain)?.context("its store is gone")?;
    store.write(STORE_LIMIT)?.remove(&name)?;
    match json {
        true => outln!("{}", serde_json::json!({ "removed": snapshot, "domain": domain }))?,
        false => outln!(
            "removed {snapshot} of domain {domain}; `samepage snapshot gc` gives back the pages that no other one has"
        )?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Gives back what no checkpoint has.
pub(super) fn collect(place: &Where, compress: Compression, json: bool) -> anyhow::Result<ExitCode> {
    #[derive(Serialize)]
    struct Of {
        domain: String,
        #[serde(flatten)]
        collected: Collected,
    }
    let (shelf, interrupted, bar) = (place.shelf()?, interrupt_flag()?, bar("move"));
    let mut all = Vec::new();
    for domain in place.domains()? {
        let Some(store) = shelf.store(&domain)? else { bail!("domain {domain} has no checkpoints") };
        let collected = store.write(STORE_LIMIT)?.collect(compress, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
            !is_set(&interrupted)
        })?;
        all.push(Of { domain, collected });
    }
    bar.finish_and_clear();
    if json {
        outln!("{}", serde_json::to_string(&all)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    for Of { domain, collected } in &all {
        let Collected { removed_packs, moved_pages, freed_bytes } = collected;
        outln!(
            "{domain}: {removed_packs} packs removed, {moved_pages} pages moved, {:.1} MiB given back",
            *freed_bytes as f64 / f64::from(1 << 20)
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Start guests that go on from a checkpoint on disk
#[derive(clap::Args)]
#[command(after_help = "Examples:
  samepage snapshot web-0 warm --disk       save a guest; its fleet, or the host, may go down then
  samepage restore warm                     it goes on in the fleet that is up, under its name if that is free
  samepage restore warm --count 10 --as w   ten guests, w-0 to w-9, that go on from there and share what they have in common

The fleet must be up; `samepage host --open NAME` makes one without guests. All of the guests come up and answer, or none does.
Each is told that it is a copy, as a clone is.")]
pub(super) struct Args {
    /// The checkpoint
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// How many
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1024))]
    count: u64,
    /// How their names begin; each gets a number behind it [default: the guest's name; of one alone without a number]
    #[arg(long = "as", value_name = "PREFIX")]
    prefix: Option<String>,
    /// Which fleet; not needed while only one is up
    #[arg(long, visible_alias = "fleet", value_name = "FLEET")]
    name: Option<String>,
    #[command(flatten)]
    place: Where,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let Args { checkpoint, count, prefix, name, place, json } = args;
    // Before a fleet is asked for: a mistyped name is the more likely mistake.
    let domain = place.domain_of(&Name::new(&checkpoint)?)?;
    let fleet = choose(name)?;
    let stores = place.shelf()?.path().into();
    let wanted = Restore { name: checkpoint, domain, stores, count: usize::try_from(count)?, prefix };
    let restored = match ask(&fleet, &Request::Restore(wanted))? {
        Reply::Cloned(restored) => restored,
        other => bail!("the daemon answered something else: {other:?}"),
    };
    match json {
        true => outln!("{}", serde_json::to_string(&restored)?)?,
        false => outln!(
            "{} guests answer after {:.2} s: {}",
            restored.guests.len(),
            restored.seconds,
            restored.guests.join(", ")
        )?,
    }
    Ok(ExitCode::SUCCESS)
}
