//! A fleet: all its guests, started, filled, merged, measured and checked together.

mod checkpoints;
mod clones;
mod engine;
mod joined;
mod standbys;
mod still;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::HostError;
use super::admission;
use super::check;
use super::checkpoints::{Shelf, suspended::Suspended};
use super::claim::Claim;
use super::guest::{Guest, Lifetime, Origin, shut_down_all};
use super::images::{Image, Images};
use super::ledger::{self, Budget, Reading};
use super::metrics::EngineNow;
use super::pledge::{self, Pledge};
use super::pool::Pool;
use super::preflight;
use super::runtime::FleetDir;
use super::shutdown::Shutdown;
use super::spec::{EngineName, FleetSpec, GuestSpec};
use super::status::Verified;
use super::takeover::Left;
use super::vm_handle::VmHandle;
use super::watch::{Stage, Watch};
use machine::control::Request;
use measure::Space;
use measure::content::{self, Content};
use measure::frames::{self, Frames};
use memory::PAGE_BYTES;
use merge::slab::engine::Statistics;
use merge::{Engine, Progress, Settling, SlabPages};
use overcommit::admission::Refusal;

/// How often merging is looked at.
const MERGE_POLL: Duration = Duration::from_millis(50);

/// How merging went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Merged {
    /// From the start to the last page that was merged.
    pub seconds: f64,
    /// What the engine says at the end.
    pub progress: Progress,
}

/// A fleet of running guests. Dropping it ends those that live with us and stops the engine.
pub struct Fleet {
    /// What it is to be.
    pub spec: FleetSpec,
    /// Its guests, in the order of the file.
    pub guests: Vec<Guest>,
    engine: Box<dyn Engine>,
    merging: bool,
    /// What all may use, in pages.
    capacity: u64,
    dir: FleetDir,
    lifetime: Lifetime,
    /// Of a fleet that has no daemon.
    _claim: Option<Claim>,
    /// What other fleets know of it.
    pledge: Pledge,
    /// Guests that are not asked for anything, for they do not answer.
    left_out: Vec<String>,
    /// Processes that were refused, and why: that is said once, however often they ask.
    refused: BTreeMap<u32, String>,
    images: Images,
    /// What clones are made of, where the fleet file asks for it.
    pool: Option<Pool>,
    /// What its guests go on from that were saved.
    suspended: Suspended,
}

impl Fleet {
    /// As [`Fleet::ready`], and fills them. On an error those that were started are ended.
    pub fn up(
        spec: FleetSpec,
        engine: Option<Box<dyn Engine>>,
        dir: &FleetDir,
        lifetime: Lifetime,
        watch: &Watch,
    ) -> Result<Self, HostError> {
        let mut fleet = Self::ready(spec, engine, dir, lifetime, watch)?;
        match fleet.fill(watch).and_then(|()| fleet.start_from(watch)) {
            Ok(()) => Ok(fleet),
            Err(e) => {
                fleet.stop_started();
                Err(e)
            }
        }
    }

    /// The guest of this name.
    pub(crate) fn guest(&mut self, name: &str) -> Result<&mut Guest, HostError> {
        let Self { guests, spec, .. } = self;
        let Some(at) = guests.iter().position(|guest| guest.spec.name == name) else {
            return Err(HostError::no_guest(name, &spec.name, guests.iter().map(|guest| &guest.spec.name)));
        };
        Ok(&mut guests[at])
    }

    /// Starts all guests and waits until they are ready. They are yet to be filled. `engine` must be of the kind that `spec` names; None is
    /// what `spec` asks for.
    pub fn ready(
        spec: FleetSpec,
        engine: Option<Box<dyn Engine>>,
        dir: &FleetDir,
        lifetime: Lifetime,
        watch: &Watch,
    ) -> Result<Self, HostError> {
        let engine = engine.map_or_else(|| engine::engine(&spec, dir), Ok)?;
        let claim = Claim::take(&spec.name)?;
        dir.create()?;
        let left = Left::none(&spec, dir)?;
        Self::come_up(spec, engine, dir, lifetime, Some(claim), (left, Suspended::default()), watch)
    }

    /// As [`Fleet::ready`], for the daemon that has claimed the name: guests that an earlier one left run on. Those that are not as
    /// `spec` says are an error, before anything is touched, or end with `replace`.
    pub(super) fn take_over(
        mut spec: FleetSpec,
        dir: &FleetDir,
        replace: bool,
        shelf: Option<&Shelf>,
        watch: &Watch,
    ) -> Result<Self, HostError> {
        let left = Left::find(&spec, dir, replace)?;
        let engine = engine::engine(&spec, dir)?;
        let suspended = Suspended::find(shelf, &mut spec, &|guest| left.runs(guest), watch)?;
        Self::come_up(spec, engine, dir, Lifetime::TheirOwn, None, (left, suspended), watch)
    }

    fn come_up(
        mut spec: FleetSpec,
        engine: Box<dyn Engine>,
        dir: &FleetDir,
        lifetime: Lifetime,
        claim: Option<Claim>,
        (mut left, suspended): (Left, Suspended),
        watch: &Watch,
    ) -> Result<Self, HostError> {
        let (capacity, _) = admission::capacity(&spec.overcommit)?;
        let pledge = Pledge::take(dir)?;
        let guests = left.adopt(&mut spec, dir)?;
        let mut fleet = Self {
            guests,
            engine,
            merging: false,
            capacity: capacity.pages,
            dir: dir.clone(),
            lifetime,
            pledge,
            left_out: Vec::new(),
            refused: BTreeMap::new(),
            images: Images::default(),
            pool: None,
            suspended,
            spec,
            _claim: claim,
        };
        {
            // From the look until the promise is made no other fleet promises anything.
            let _admitting = pledge::admitting()?;
            fleet.judge()?;
            fleet.pledge.set(promises(&fleet.spec))?;
        }
        match fleet.bring_up(left, watch).and_then(|()| fleet.start_pool()) {
            Ok(()) => Ok(fleet),
            Err(e) => {
                fleet.stop_started();
                Err(e)
            }
        }
    }

    /// Has all guests fill their memory as the fleet file says, those that have not yet.
    pub fn fill(&mut self, watch: &Watch) -> Result<(), HostError> {
        self.each(|guest| guest.fill(watch)).map(drop)
    }

    /// Whether the guests that do not run yet are admitted. Those that an earlier daemon admitted run, and count as what they
    /// are.
    fn judge(&mut self) -> Result<(), HostError> {
        let runs = |spec: &GuestSpec| self.guests.iter().any(|guest| guest.spec.name == spec.name);
        let (adopted, newcomers): (Vec<_>, Vec<_>) = self.spec.guests.iter().cloned().partition(runs);
        if newcomers.is_empty() {
            return Ok(());
        }
        let with = |guests: &[GuestSpec]| FleetSpec { guests: guests.to_vec(), ..self.spec.clone() };
        preflight::check(&with(&newcomers), &self.dir)?;
        if self.guests.is_empty() {
            return admission::judge(&self.spec)?.check();
        }
        let adopted = with(&adopted);
        let ledger = self.ledger(false)?.ledger;
        let judged = admission::judge_more(&newcomers, &ledger, &adopted)?;
        match newcomers.into_iter().zip(judged).find_map(|(spec, refusal)| Some((spec.name, refusal?))) {
            Some((guest, refusal)) => Err(HostError::NotAdmitted { guest, refusal }),
            None => Ok(()),
        }
    }

    fn bring_up(&mut self, left: Left, watch: &Watch) -> Result<(), HostError> {
        // Before the guests: they share from the first instant what others have loaded.
        self.engine.open()?;
        left.end(&self.dir);
        let known = |name: &str| self.spec.guests.iter().any(|guest| guest.name == name);
        self.dir.remove_left(known);
        for guest in std::mem::take(&mut self.guests) {
            self.register(guest);
        }
        for (n, spec) in self.spec.guests.clone().iter().enumerate() {
            // Clones are started when their origins are ready and have filled their memory.
            let saved = self.suspended.image(&spec.name).cloned();
            let is_due = spec.clone_of.is_none() || saved.is_some();
            if is_due && !self.guests.iter().any(|guest| guest.number == n) {
                self.start(spec, n, saved.as_ref())?;
            }
        }
        self.guests.sort_by_key(|guest| guest.number);
        self.release_held();
        self.each(|guest| guest.wait_here(watch)).map(drop)
    }

    fn start(
        &mut self,
        spec: &GuestSpec,
        number: usize,
        image: Option<&Arc<Image>>,
    ) -> Result<(), HostError> {
        let (engine, overcommit) = (self.spec.engine, self.spec.overcommit);
        let socket =
            (engine == EngineName::Slab).then(|| engine::merge_socket(&self.spec, &self.dir)).transpose()?;
        // What comes from a disk is checked by a process of its own.
        let standby = |image: &Image| (!image.is_from_disk()).then(|| self.standby_for(spec)).flatten();
        let origin = image.map(|image| Origin { image, standby: standby(image) });
        let guest =
            Guest::start(spec, number, &self.dir, self.lifetime, (engine, socket), &overcommit, origin)?;
        self.register(guest);
        Ok(())
    }

    fn register(&mut self, guest: Guest) {
        if let Some(pid) = guest.pid() {
            self.engine.admit(&guest.spec.name, pid, &guest.spec.domain, guest.spec.vm.memory_bytes);
        }
        self.guests.push(guest);
    }

    /// Admits guests that come later, as far as the ledger allows, and waits until they are ready; `number` is that of the first.
    /// They are yet to be filled. Returns which were not admitted, and why.
    pub fn admit(
        &mut self,
        guests: &[(usize, GuestSpec)],
        watch: &Watch,
    ) -> Result<Vec<(String, Box<Refusal>)>, HostError> {
        let mut refused = Vec::new();
        let ledger = self.ledger(false)?.ledger;
        let specs: Vec<GuestSpec> = guests.iter().map(|(_, spec)| spec.clone()).collect();
        let admitted = {
            let _admitting = pledge::admitting()?;
            let judged = admission::judge_more(&specs, &ledger, &self.spec)?;
            let mut admitted = Vec::new();
            for ((number, spec), refusal) in guests.iter().zip(judged) {
                match refusal {
                    Some(refusal) => refused.push((spec.name.clone(), refusal)),
                    None => {
                        self.spec.guests.push(spec.clone());
                        admitted.push((spec, *number));
                    }
                }
            }
            self.pledge.set(promises(&self.spec))?;
            admitted
        };
        for (spec, number) in admitted {
            self.start(spec, number, None)?;
        }
        self.each(|guest| guest.wait_ready(watch))?;
        if self.merging && self.spec.engine == EngineName::Ksm {
            self.each(|guest| guest.control(&Request::Mergeable { on: true }))?;
        }
        Ok(refused)
    }

    /// Stops a guest and removes it from the fleet.
    pub fn remove(&mut self, name: &str) {
        if let Some(at) = self.guests.iter().position(|guest| guest.spec.name == name) {
            self.guests.remove(at).stop();
            self.spec.guests.retain(|guest| guest.name != name);
            // If that fails, other fleets leave the memory alone.
            let _ = self.pledge.set(promises(&self.spec));
        }
    }

    /// From now on these guests are asked for nothing, and all others are.
    pub fn leave_out(&mut self, guests: Vec<String>) {
        self.left_out = guests;
    }

    /// Leaves out those, too, that fell silent since the last look.
    pub(crate) fn leave_out_silent(&mut self) -> Result<(), HostError> {
        let silent = self.each(|guest| Ok(guest.is_silent().then(|| guest.spec.name.clone())))?;
        self.left_out.extend(silent.into_iter().flatten());
        Ok(())
    }

    /// The guests that run and are not left out.
    fn asked(&mut self) -> impl Iterator<Item = &mut Guest> {
        let left_out = &self.left_out;
        self.guests
            .iter_mut()
            .filter(|g| !left_out.contains(&g.spec.name))
            .filter_map(|g| g.ended().is_none().then_some(g))
    }

    /// Does something with every guest that runs, all at the same time. One that ends meanwhile is left out.
    pub fn each<T: Send>(
        &mut self,
        work: impl Fn(&mut Guest) -> Result<T, HostError> + Sync,
    ) -> Result<Vec<T>, HostError> {
        let work = &work;
        let results: Vec<_> = thread::scope(|scope| {
            let running = self.asked();
            let one = move |guest: &mut Guest| match work(guest) {
                Err(HostError::Socket { .. } | HostError::Unanswered { .. }) if guest.is_ending() => None,
                result => Some(result),
            };
            let threads: Vec<_> = running.map(|guest| scope.spawn(move || one(guest))).collect();
            threads.into_iter().map(thread::ScopedJoinHandle::join).collect()
        });
        results.into_iter().filter_map(|r| r.unwrap_or(Some(Err(HostError::Interrupted)))).collect()
    }

    /// Where the memory of the guests that run lies.
    pub fn spaces(&mut self) -> Result<Vec<Space>, HostError> {
        self.each(|guest| guest.space())
    }

    /// What could be shared within each trust domain: every page hashed and compared, while all guests are paused.
    pub fn content(&mut self, watch: &Watch) -> Result<Content, HostError> {
        self.paused(|fleet| {
            let mut domains: BTreeMap<&str, Vec<Space>> = BTreeMap::new();
            let spaces = fleet.spaces()?;
            let total = spaces.iter().map(Space::pages).sum();
            for space in spaces {
                let guest = fleet.spec.guests.iter().find(|guest| guest.name == space.name);
                domains.entry(guest.map_or("", |guest| &guest.domain)).or_default().push(space);
            }
            let (mut all, mut before) = (Content::default(), 0);
            for spaces in domains.values() {
                let mut tell = |done, _| watch.tell(Stage::Content, 0, before + done, total);
                all.add(&content::measure(spaces, &mut tell)?);
                before += spaces.iter().map(Space::pages).sum::<u64>();
            }
            Ok(all)
        })
    }

    /// The handles of the guests that run.
    pub fn handles(&mut self) -> Result<Vec<VmHandle>, HostError> {
        let running = self.guests.iter_mut().filter_map(|g| g.ended().is_none().then_some(g));
        Ok(running
            .map(|guest| guest.handle())
            .collect::<Result<Vec<_>, _>>()?
            .into_iter()
            .flatten()
            .collect())
    }

    /// What the fleet may use, and what its engine keeps of it.
    pub fn budget(&self) -> Budget {
        let dead =
            self.engine.statistics().map_or(0, |s| s.domains.values().map(|d| d.slab_dead_bytes).sum());
        let merging = self.merging && self.spec.engine != EngineName::Off;
        // Clones that have ended keep nothing.
        let (image_pages, dead_slabs) = (self.pin_images(), dead.div_ceil(PAGE_BYTES));
        let unnamed_image_pages = image_pages.saturating_sub(self.named_image_pages());
        let pool_pages = self.pool.as_ref().map_or(0, Pool::pages);
        let slab_pages = (image_pages > 0).then(|| self.slab_pages().map(|pages| pages())).flatten();
        let capacity = self.capacity;
        Budget { capacity, dead_slabs, image_pages, unnamed_image_pages, pool_pages, merging, slab_pages }
    }

    /// See [`Engine::slab_pages`].
    pub fn slab_pages(&self) -> Option<SlabPages> {
        self.engine.slab_pages()
    }

    /// Has the engine merge at urgent priority, with all the processor time that it can use, or at its normal one.
    pub fn set_priority(&mut self, urgent: bool) {
        self.engine.set_priority(urgent);
    }

    /// The ledger as it is now; audited if that is asked for, for which the guests are paused.
    pub fn ledger(&mut self, audited: bool) -> Result<Reading, HostError> {
        let read = |fleet: &mut Self| {
            let mut handles = fleet.handles()?;
            handles.retain(|handle| !fleet.left_out.contains(&handle.guest));
            ledger::read(&handles, fleet.budget(), audited)
        };
        if !audited {
            return read(self);
        }
        let mut reading = self.paused(read)?;
        // That they were paused for this does not count.
        for said in &mut reading.said {
            let guest = self.guests.iter().find(|guest| guest.spec.name == said.status.name);
            said.status.paused =
                guest.is_some_and(|guest| guest.vm_status().is_ok_and(|status| status.paused));
        }
        Ok(reading)
    }

    /// Which frames the guests have.
    pub fn frames(&mut self) -> Result<Frames, HostError> {
        loop {
            let spaces = self.spaces()?;
            match frames::measure(&spaces) {
                Ok(frames) => return Ok(frames),
                // One guest less each time.
                Err(_) if self.running() < spaces.len() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// How many guests run.
    fn running(&mut self) -> usize {
        self.asked().count()
    }

    /// Lets the engine begin.
    pub fn start_merging(&mut self) -> Result<(), HostError> {
        if self.spec.engine == EngineName::Ksm {
            self.each(|guest| guest.control(&Request::Mergeable { on: true }))?;
        }
        let spaces = self.spaces()?;
        self.engine.start(&spaces)?;
        self.merging = true;
        Ok(())
    }

    /// Waits until merging brings nothing new, or nothing merges any more, or `limit` is over. `goal` is what could be merged, for the bar.
    pub fn settle(&mut self, goal: u64, limit: Duration, watch: &Watch) -> Result<Merged, HostError> {
        let begin = Instant::now();
        let (mut settling, mut merged_seconds) = (Settling::default(), 0.0);
        loop {
            watch.check()?;
            let progress = self.engine.progress()?;
            let seconds = begin.elapsed().as_secs_f64();
            if settling.saw(&progress) {
                merged_seconds = seconds;
            }
            watch.tell(Stage::Merge, 0, progress.merged_pages.min(goal), goal);
            let settled = settling.is_over(&progress);
            let stalls = self.engine.stalled().is_some();
            if self.spec.engine == EngineName::Off || settled || stalls || begin.elapsed() > limit {
                return Ok(Merged { seconds: merged_seconds, progress });
            }
            thread::sleep(MERGE_POLL);
        }
    }

    /// How far the engine has come; None before it has begun.
    pub fn progress(&mut self) -> Option<Progress> {
        self.merging.then(|| self.engine.progress().ok()).flatten()
    }

    /// What the slab engine knows of its guests; None with another one.
    pub fn merge_statistics(&self) -> Option<Statistics> {
        self.engine.statistics()
    }

    /// What the engine says of itself.
    pub fn engine_now(&mut self) -> EngineNow {
        let (progress, statistics) = (self.progress(), self.merge_statistics());
        EngineNow { name: self.spec.engine.name().into(), progress, statistics }
    }

    /// What a reader of the engine's numbers should know.
    pub fn notes(&self) -> Vec<String> {
        let wanted = self.spec.overcommit.sampling_seconds();
        let own = self.guests.iter().filter(|guest| !guest.has_joined());
        let of_guests = own.filter_map(|guest| guest.started().note(wanted));
        self.engine.notes().into_iter().chain(of_guests).collect()
    }

    /// Why nothing merges any more, though the engine was started.
    pub fn stalled(&self) -> Option<String> {
        self.engine.stalled()
    }

    /// Stops the engine and puts the host's settings back; what is merged stays so.
    pub fn stop_merging(&mut self) {
        self.engine.stop();
    }

    /// Has every guest check all its pages, and the host check them too. A paused guest cannot, and is left out.
    pub fn verify(&mut self, watch: &Watch) -> Result<Verified, HostError> {
        self.leave_out_silent()?;
        let still = self.each(|guest| Ok(guest.vm_status()?.paused.then(|| guest.spec.name.clone())))?;
        // Those that others started have their COM2 for themselves.
        let joined =
            self.guests.iter().filter(|guest| guest.has_joined()).map(|guest| guest.spec.name.clone());
        let mut skipped: Vec<String> =
            still.into_iter().flatten().chain(self.left_out.clone()).chain(joined).collect();
        skipped.sort();
        skipped.dedup();
        let skips = |guest: &Guest| skipped.contains(&guest.spec.name);
        let by_guests = self.each(|guest| if skips(guest) { Ok((0, 0)) } else { guest.verify(watch) })?;
        let reports = self.each(|guest| if skips(guest) { Ok(None) } else { guest.report(watch) })?;
        let by_host = self.paused(|fleet| {
            let total = fleet.guests.len() as u64;
            let mut wrong = 0;
            for ((n, guest), report) in fleet.asked().enumerate().zip(reports) {
                watch.check()?;
                if let Some(report) = report {
                    wrong += check::wrong_pages(guest, &report)
                        .map_err(|source| HostError::Check { guest: guest.spec.name.clone(), source })?;
                }
                watch.tell(Stage::Check, 0, n as u64 + 1, total);
            }
            Ok(wrong)
        })?;
        let (verified_pages, wrong) = by_guests.iter().fold((0, 0), |(a, b), (c, m)| (a + c, b + m));
        Ok(Verified { verified_pages, mismatched_pages: wrong + by_host, skipped })
    }

    /// Memory promised to all guests, in bytes; always whole pages.
    pub fn promised_bytes(&self) -> u64 {
        let bytes = self.spec.guests.iter().map(|g| g.vm.memory_bytes).sum();
        debug_assert!(u64::is_multiple_of(bytes, PAGE_BYTES));
        bytes
    }

    /// Ends all guests and the engine.
    pub fn stop(&mut self) {
        self.stop_those(|_| true);
    }

    /// Ends the engine and all guests, these in good order as far as `shutdown` lets them. Returns what the engine has left of the host's
    /// settings.
    pub fn shut_down(&mut self, shutdown: &Shutdown) -> Vec<String> {
        let before = self.engine.notes();
        self.pool = None;
        self.engine.stop();
        shut_down_all(&mut self.guests, shutdown);
        self.engine.notes().into_iter().filter(|note| !before.contains(note)).collect()
    }

    /// Ends the guests that were started here, and the engine. What an earlier daemon left runs on, for a later one.
    pub fn stop_started(&mut self) {
        self.stop_those(Guest::is_child);
    }

    fn stop_those(&mut self, which: impl Fn(&Guest) -> bool) {
        self.engine.stop();
        self.pool = None;
        thread::scope(|scope| {
            for guest in self.guests.iter_mut().filter(|guest| which(guest)) {
                scope.spawn(move || guest.stop());
            }
        });
    }

    /// Writes down anew what is known of each guest.
    pub(super) fn save(&self) {
        self.guests.iter().for_each(Guest::save);
    }
}

/// What the guests of `spec` are promised, in pages.
fn promises(spec: &FleetSpec) -> impl Iterator<Item = (&str, u64)> {
    spec.guests.iter().map(|guest| (guest.name.as_str(), guest.vm.memory_bytes / PAGE_BYTES))
}

/// Tells other fleets what the guests are promised by now.
fn pledge_of(fleet: &mut Fleet) -> Result<(), HostError> {
    let _admitting = pledge::admitting()?;
    fleet.pledge.set(promises(&fleet.spec))
}
