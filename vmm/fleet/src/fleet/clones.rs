//! Snapshots of guests of a fleet, and guests that go on from them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::{Fleet, pledge_of};
use crate::HostError;
use crate::admission;
use crate::guest::Guest;
use crate::images::keeper::keep;
use crate::images::{Image, ImageInfo, ImageSlab, MAX_IMAGES};
use crate::pledge;
use crate::spec::{GuestSpec, MAX_GUESTS, NetSpec, SpecError, check_interface_owners, check_name, taps};
use crate::status::{Cloned, Wanted};
use crate::watch::Watch;
use machine::Interface;
use merge::slab::engine::ImageSlabs;

/// An image keeps a slab of merging's, and all of it, for one page in this many that its memory has of it.
const WORTH_PART: u64 = 4;

/// The slabs of these images, by the number of their file, and their pages.
fn slabs_of<'a>(images: impl Iterator<Item = &'a Arc<Image>>) -> BTreeMap<u64, u64> {
    let mut images: Vec<&Arc<Image>> = images.collect();
    images.sort_unstable_by_key(|image| Arc::as_ptr(image));
    images.dedup_by_key(|image| Arc::as_ptr(image));
    images.iter().flat_map(|image| image.slab_sizes()).collect()
}

impl Fleet {
    /// Captures a guest, and keeps that as `name`.
    pub fn snapshot(&mut self, guest: &str, name: &str) -> Result<ImageInfo, HostError> {
        check_name(name).map_err(|source| HostError::ImageName { source })?;
        if self.images.get(name).is_some() {
            return Err(HostError::ImageTaken { name: name.into() });
        }
        if self.guests.iter().any(|other| other.spec.name == name) {
            return Err(HostError::ImageOfGuest { name: name.into() });
        }
        if self.images.is_full() {
            return Err(HostError::TooManyImages { most: MAX_IMAGES });
        }
        let image = Arc::new(self.capture(guest)?);
        let info = ImageInfo::of(name, &image, 0);
        self.images.insert(name, image);
        Ok(info)
    }

    /// The snapshots that are kept.
    pub fn snapshots(&self) -> Vec<ImageInfo> {
        self.images.iter().map(|(name, image)| ImageInfo::of(name, image, self.clones_of(image))).collect()
    }

    /// Removes a snapshot. Guests that went on from it run on.
    pub fn remove_snapshot(&mut self, name: &str) -> Result<(), HostError> {
        match self.images.remove(name) {
            true => {
                self.pin_images();
                Ok(())
            }
            false => Err(self.no_image(name)),
        }
    }

    /// The slabs that snapshots and clones keep, by the number of their file, and their pages.
    fn image_slabs(&self) -> BTreeMap<u64, u64> {
        let named = self.images.iter().map(|(_, image)| image);
        slabs_of(named.chain(self.guests.iter().filter_map(Guest::image)))
    }

    /// The pages of slabs that snapshots keep, each once.
    pub(super) fn named_image_pages(&self) -> u64 {
        slabs_of(self.images.iter().map(|(_, image)| image)).values().sum()
    }

    /// Lets go of images that clones keep alone, and of processes that stand by. The clones have of them what they use; a capture of one of them copies more.
    pub(crate) fn drop_unnamed_images(&mut self) {
        let named: Vec<Arc<Image>> = self.images.iter().map(|(_, image)| image.clone()).collect();
        let is_named = |image: &Arc<Image>| named.iter().any(|other| Arc::ptr_eq(other, image));
        for guest in &mut self.guests {
            if guest.image().is_some_and(|image| !is_named(image)) {
                guest.forget_image();
            }
        }
        self.pin_images();
        if let Some(pool) = &self.pool {
            pool.shed();
        }
    }

    /// Tells merging which slabs images have: the others are its own. Returns the pages of those, each once.
    pub(super) fn pin_images(&self) -> u64 {
        let slabs = self.image_slabs();
        let pages = slabs.values().sum();
        if let Some(merged) = self.engine.images() {
            merged.pins().set(slabs.into_keys().collect());
        }
        pages
    }

    fn no_image(&self, name: &str) -> HostError {
        let known: Vec<&str> = self.images.names().collect();
        let known = if known.is_empty() { "none".into() } else { known.join(", ") };
        HostError::NoImage { name: name.into(), fleet: self.spec.name.clone(), known }
    }

    fn clones_of(&self, image: &Arc<Image>) -> usize {
        self.guests.iter().filter(|guest| guest.image().is_some_and(|of| Arc::ptr_eq(of, image))).count()
    }

    /// Starts clones, and waits until each has answered. All of them, or none.
    pub fn start_clones(&mut self, wanted: &Wanted, watch: &Watch) -> Result<Cloned, HostError> {
        let Wanted { of, count, prefix, net } = wanted;
        let room = MAX_GUESTS.saturating_sub(self.guests.len());
        if !(1..=room).contains(count) {
            return Err(HostError::CloneCount { asked: *count, room, most: MAX_GUESTS });
        }
        let kept = self.images.get(of).cloned();
        let spec = match &kept {
            Some(image) => image.spec.clone(),
            None => self.guest(of)?.spec.clone(),
        };
        let specs = self.clone_specs(&spec, prefix.as_deref().unwrap_or(of), *count, net)?;
        self.fits(&specs)?;
        let image = match kept {
            Some(image) => image,
            None => Arc::new(self.capture(of)?),
        };
        self.start_named(specs, &image, of, Instant::now(), watch)
    }

    /// Starts all of these, which go on from the image called `of`, or none.
    pub(super) fn start_named(
        &mut self,
        specs: Vec<GuestSpec>,
        image: &Arc<Image>,
        of: &str,
        began: Instant,
        watch: &Watch,
    ) -> Result<Cloned, HostError> {
        let names: Vec<String> = specs.iter().map(|spec| spec.name.clone()).collect();
        match self.start_all(specs, image, watch) {
            Ok(()) => Ok(Cloned {
                guests: names,
                seconds: began.elapsed().as_secs_f64(),
                image: Some(ImageInfo::of(of, image, self.clones_of(image))),
            }),
            Err(error) => {
                self.take_back(&names);
                Err(error)
            }
        }
    }

    fn start_all(
        &mut self,
        specs: Vec<GuestSpec>,
        image: &Arc<Image>,
        watch: &Watch,
    ) -> Result<(), HostError> {
        {
            let _admitting = pledge::admitting()?;
            // Once more, now that no other fleet admits guests meanwhile.
            self.fits(&specs)?;
            self.spec.guests.extend(specs.iter().cloned());
            self.pledge.set(super::promises(&self.spec))?;
        }
        let first = self.guests.iter().map(|guest| guest.number + 1).max().unwrap_or(0);
        self.go_on((first..).zip(specs), image, watch)
    }

    /// Starts those guests of the fleet file that go on from others of it, and waits until each has answered. Those run, and have filled
    /// their memory.
    pub(crate) fn start_from(&mut self, watch: &Watch) -> Result<(), HostError> {
        let mut wanted: BTreeMap<String, Vec<(usize, GuestSpec)>> = BTreeMap::new();
        for (number, spec) in self.spec.guests.iter().enumerate() {
            let runs = self.guests.iter().any(|guest| guest.number == number);
            if let Some(origin) = spec.clone_of.clone().filter(|_| !runs) {
                wanted.entry(origin).or_default().push((number, spec.clone()));
            }
        }
        for (origin, clones) in wanted {
            let image = Arc::new(self.capture(&origin)?);
            self.go_on(clones.into_iter(), &image, watch)?;
        }
        self.guests.sort_by_key(|guest| guest.number);
        Ok(())
    }

    /// Starts these, by their numbers, and waits until each has answered.
    fn go_on(
        &mut self,
        clones: impl Iterator<Item = (usize, GuestSpec)>,
        image: &Arc<Image>,
        watch: &Watch,
    ) -> Result<(), HostError> {
        let _held = self.hold_pool();
        let mut names: Vec<String> = Vec::new();
        for (number, spec) in clones {
            watch.check()?;
            self.start(&spec, number, Some(image))?;
            names.push(spec.name);
        }
        let is_new = |guest: &Guest| names.contains(&guest.spec.name);
        self.each(|guest| if is_new(guest) { guest.wait_answer(watch) } else { Ok(()) })?;
        // One that ended meanwhile is not asked, and is not there.
        match self.guests.iter_mut().filter(|guest| is_new(guest)).find_map(Guest::failure) {
            Some(failure) => Err(failure),
            None => Ok(()),
        }
    }

    /// Ends what was started of these, and forgets them.
    fn take_back(&mut self, names: &[String]) {
        let is_new = |name: &String| names.contains(name);
        let (gone, stay) = std::mem::take(&mut self.guests).into_iter().partition(|g| is_new(&g.spec.name));
        self.guests = stay;
        let mut gone: Vec<Guest> = gone;
        std::thread::scope(|scope| gone.iter_mut().for_each(|guest| _ = scope.spawn(|| guest.stop())));
        for name in names {
            self.engine.remove(name);
            let _ = std::fs::remove_file(self.dir.log(name));
        }
        self.spec.guests.retain(|guest| !is_new(&guest.name));
        if let Err(error) = pledge_of(self) {
            tracing::warn!("{error}");
        }
    }

    /// An error if not all of `specs` may come in: then it says how many may.
    pub(super) fn fits(&mut self, specs: &[GuestSpec]) -> Result<(), HostError> {
        let ledger = self.ledger(false)?.ledger;
        let judged = admission::judge_more(specs, &ledger, &self.spec)?;
        let fit = judged.iter().take_while(|refusal| refusal.is_none()).count();
        match judged.into_iter().flatten().next() {
            Some(refusal) => Err(HostError::ClonesNotAdmitted { asked: specs.len(), fit, refusal }),
            None => Ok(()),
        }
    }

    /// What the clones are to be: free names, with the next numbers behind `prefix`; interfaces of their own, whose TAPs are there.
    pub(super) fn clone_specs(
        &self,
        spec: &GuestSpec,
        prefix: &str,
        count: usize,
        net: &[NetSpec],
    ) -> Result<Vec<GuestSpec>, HostError> {
        let is_free = |name: &String| {
            !self.guests.iter().any(|guest| guest.spec.name == *name) && self.images.get(name).is_none()
        };
        let names = (0..).map(|n| format!("{prefix}-{n}")).filter(is_free).take(count);
        let names: Vec<String> = names.collect();
        for name in &names {
            check_name(name).map_err(|source| HostError::ImageName { source })?;
        }
        let wrong = |source| HostError::CloneNet { source };
        let mut taken = taps(&self.spec.guests);
        let specs = names.into_iter().map(|name| spec.cloned(name, &self.spec.name, net, &mut taken));
        let specs = specs.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
        check_interface_owners(self.spec.guests.iter().chain(&specs)).map_err(wrong)?;
        for spec in &specs {
            let missing = |source| wrong(SpecError::Net { guest: spec.name.clone(), source });
            spec.vm.net.iter().try_for_each(Interface::look).map_err(missing)?;
        }
        Ok(specs)
    }

    pub(crate) fn capture(&mut self, name: &str) -> Result<Image, HostError> {
        let dir = self.dir.clone();
        let guest = self.guest(name)?;
        guest.may_be_captured()?;
        let handle = guest.handle()?;
        let handle =
            handle.ok_or_else(|| HostError::NotCaptured { guest: name.into(), why: "it does not run" })?;
        let (spec, said) = (guest.spec.clone(), (guest.ready(), guest.filled().copied()));
        let domain = spec.domain.clone();
        // Slabs of images of its own domain, kept by a name or by clones.
        let kept =
            self.images.iter().map(|(_, image)| image).chain(self.guests.iter().filter_map(Guest::image));
        let near: Vec<Arc<Image>> = kept.filter(|image| image.spec.domain == domain).cloned().collect();
        let merged = self.engine.images();
        let known = |inode, used| -> Option<ImageSlab> {
            let kept = || near.iter().find_map(|image| image.slab(inode)).cloned();
            kept().or_else(|| {
                let (file, pages) = merged.as_ref()?.find(&domain, inode)?;
                // It will be kept whole.
                (used * WORTH_PART >= pages).then(|| ImageSlab::new(file, pages, inode))
            })
        };
        let pins = merged.as_ref().map(ImageSlabs::pins).unwrap_or_default();
        let kept = keep(&handle, &spec.vm.drives, &dir, &known, &pins);
        if kept.is_err() {
            self.pin_images();
        }
        Ok(Image::new(spec, said, kept?))
    }
}
