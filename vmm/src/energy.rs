//! `samepage energy`: what the memory that a fleet saves would save in energy, at the most.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;

use super::which::WhichFleet;
use fleet::daemon_client::{request, unexpected};
use fleet::living::choose;
use fleet::status::{FleetStatus, Reply, Request};
use kernel_view::memory_blocks::MemoryBlocks;
use memory::PAGE_BYTES;
use memory::layout::MAX_RAM_BYTES;
use memory::size::{SizeError, parse_size};
use os::print::outln;

/// How long the daemon may take to read the ledger.
const LIMIT: Duration = Duration::from_secs(120);
const HOUR_SECONDS: f64 = 3600.0;

/// Estimate how much energy the memory that a fleet saves would save
#[derive(clap::Args)]
#[command(
    after_help = "The model: memory draws its background power whether it holds anything or not, until a whole part of it is empty and rests in
self-refresh. So what is saved counts in whole blocks that the kernel can take offline, each for the difference of both powers. It is an upper
bound: saved pages lie scattered, and no block is offline before the kernel has moved what else is in it (echo offline
> /sys/devices/system/memory/memoryN/state).

Both powers are assumptions for DDR4. For your modules: supply voltage times IDD3N (standby) or IDD6N (self-refresh) of the data sheet,
times the chips of a module, divided by its GiB.

Examples:
  samepage energy                    of the fleet that is up
  samepage energy --saved 40G --standby 0.06 --self-refresh 0.02"
)]
pub(super) struct Args {
    #[command(flatten)]
    which: WhichFleet,
    /// Memory that is saved, with its unit, instead of what a fleet saves
    #[arg(long, value_name = "SIZE", value_parser = saved)]
    saved: Option<u64>,
    /// Background power of memory that is in use, in watts for each GiB
    #[arg(long, value_name = "WATTS", default_value_t = 0.05, value_parser = watts)]
    standby: f64,
    /// Power of memory in self-refresh, in watts for each GiB
    #[arg(long, value_name = "WATTS", default_value_t = 0.02, value_parser = watts)]
    self_refresh: f64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn saved(text: &str) -> Result<u64, SizeError> {
    parse_size(text, 1, MAX_RAM_BYTES)
}

/// 100 W for each GiB is more than any memory draws.
fn watts(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(watts) if (0.0..=100.0).contains(&watts) => Ok(watts),
        _ => Err("expected a number of watts from 0 to 100".into()),
    }
}

/// What rests, and what that saves.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Estimate {
    blocks: u64,
    watts: f64,
}

impl Estimate {
    fn of(saved_bytes: u64, blocks: MemoryBlocks, watts_per_gib: f64) -> Self {
        let whole = saved_bytes.checked_div(blocks.bytes).unwrap_or(0).min(blocks.online);
        let gib = (whole * blocks.bytes) as f64 / f64::from(1 << 30);
        Self { blocks: whole, watts: gib * watts_per_gib.max(0.0) }
    }
}

/// What merging, zeros and balloons save: pages that need no frame.
fn saved_pages(status: &FleetStatus) -> u64 {
    let given_back = status.merge.as_ref().map_or(0, |merge| merge.host.zero_pages);
    let ballooned = status.guests.iter().filter_map(|guest| Some(guest.balloon.as_ref()?.host.absent_pages));
    status.saved_pages + status.pages.zero + given_back + ballooned.sum::<u64>()
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let blocks = MemoryBlocks::read().context(
        "this kernel does not show its memory in blocks (CONFIG_MEMORY_HOTPLUG), so none of it can rest",
    )?;
    let saved_bytes = match args.saved {
        Some(bytes) => bytes,
        None => {
            let fleet = choose(args.which.name()?)?;
            let status = Request::Status { kvm: false, content: false, audit: false, settle_seconds: None };
            match request(&fleet, &status, LIMIT)? {
                Reply::Status(status) => saved_pages(&status) * PAGE_BYTES,
                other => return Err(unexpected(&other).into()),
            }
        }
    };
    let Estimate { blocks: resting, watts } =
        Estimate::of(saved_bytes, blocks, args.standby - args.self_refresh);
    let (joules, mib) = (watts * HOUR_SECONDS, |bytes: u64| bytes as f64 / f64::from(1 << 20));
    if args.json {
        let all = json!({
            "saved_bytes": saved_bytes, "block_bytes": blocks.bytes, "online_blocks": blocks.online, "resting_blocks": resting,
            "standby_watts_per_gib": args.standby, "self_refresh_watts_per_gib": args.self_refresh,
            "saved_watts": watts, "saved_joules_per_hour": joules,
        });
        outln!("{all}")?;
        return Ok(ExitCode::SUCCESS);
    }
    outln!(
        "saved: {:.1} MiB, {resting} whole blocks of {:.0} MiB of the {} that are online\n\
         estimate, at the most: {watts:.3} W, {joules:.0} J an hour ({} W for each GiB in use, {} W in self-refresh: assumptions, see --help)",
        mib(saved_bytes),
        mib(blocks.bytes),
        blocks.online,
        args.standby,
        args.self_refresh,
    )?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_blocks_rest_and_no_more_than_there_are() {
        let blocks = MemoryBlocks { bytes: 128 << 20, online: 16 };
        let estimate = |bytes| Estimate::of(bytes, blocks, 0.5);
        assert_eq!(estimate((128 << 20) - 1), Estimate { blocks: 0, watts: 0.0 });
        assert_eq!(estimate(1 << 30), Estimate { blocks: 8, watts: 0.5 });
        assert_eq!(estimate(1 << 40), Estimate { blocks: 16, watts: 1.0 });
        assert_eq!(Estimate::of(1 << 30, blocks, -1.0).watts, 0.0);
        assert_eq!(Estimate::of(1 << 30, MemoryBlocks::default(), 0.5).blocks, 0);
    }

    #[test]
    fn powers_are_numbers_that_memory_could_draw() {
        assert_eq!(watts("0.05"), Ok(0.05));
        assert!(["", "-1", "nan", "inf", "101"].iter().all(|text| watts(text).is_err()));
    }
}
