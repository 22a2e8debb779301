//! The balloon in the API's units and keys.

use devices::virtio::balloon::{Config, Handle, HintStatus, Tag};
use serde_json::{Map, Value, json};

use super::fault::Fault;
use super::model::Balloon;

/// Pages of 4096 bytes in a MiB.
const PAGES_PER_MIB: u32 = 256;

/// The device's configuration for this balloon, whose target has been checked.
pub fn device_config(balloon: &Balloon) -> Config {
    Config {
        target_pages: balloon.amount_mib.saturating_mul(PAGES_PER_MIB),
        deflate_on_oom: balloon.deflate_on_oom,
        statistics: balloon.stats_polling_interval_s > 0,
        hinting: balloon.free_page_hinting,
        reporting: balloon.free_page_reporting,
    }
}

/// A target in pages, if it fits into the guest's memory.
pub fn target_pages(amount_mib: u32, mem_size_mib: u64) -> Result<u32, Fault> {
    match amount_mib.checked_mul(PAGES_PER_MIB) {
        Some(pages) if u64::from(amount_mib) <= mem_size_mib => Ok(pages),
        _ => Err(Fault::BalloonSize { amount_mib: amount_mib.into(), mem_size_mib }),
    }
}

/// Whole MiB of `pages`.
pub fn mib(pages: u32) -> u32 {
    pages / PAGES_PER_MIB
}

/// `GET /balloon/statistics`: sizes, the guest's statistics, and what the host has seen, with the
/// age of the former.
pub fn statistics(handle: &Handle, mut host: Value) -> Value {
    let mut all = sizes(handle);
    if let Some(reported) = handle.statistics() {
        if let (Some(host), Some(age)) = (host.as_object_mut(), reported.age()) {
            host.insert("age_seconds".into(), age.as_secs_f64().into());
        }
        for tag in Tag::ALL {
            if let Some(value) = reported.get(tag) {
                all.insert(tag.name().into(), value.into());
            }
        }
    }
    all.insert("host".into(), host);
    all.into()
}

/// The balloon in metrics: sizes, and what the host has seen.
pub fn metrics(handle: &Handle, host: Value) -> Value {
    let mut all = sizes(handle);
    all.insert("host".into(), host);
    all.into()
}

/// The target and what the driver has reached.
fn sizes(handle: &Handle) -> Map<String, Value> {
    let (target, actual) = (handle.target_pages(), handle.actual_pages());
    [
        ("target_pages", target),
        ("actual_pages", actual),
        ("target_mib", mib(target)),
        ("actual_mib", mib(actual)),
    ]
    .map(|(key, value)| (key.to_owned(), value.into()))
    .into_iter()
    .collect()
}

/// `GET /balloon/hinting/status`.
pub fn hinting(status: HintStatus) -> Value {
    json!({"host_cmd": status.host_cmd, "guest_cmd": status.guest_cmd})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_fits_the_guest_or_is_refused() {
        assert_eq!(target_pages(0, 16).unwrap(), 0);
        assert_eq!(target_pages(16, 16).unwrap(), 16 << 8);
        for amount_mib in [17, 1 << 24, u32::MAX] {
            assert!(matches!(target_pages(amount_mib, 16), Err(Fault::BalloonSize { .. })), "{amount_mib}");
        }
        assert!(target_pages(1 << 24, 1 << 25).is_err(), "more pages than num_pages can say");
        assert_eq!((mib(255), mib(256), mib(u32::MAX)), (0, 1, (1 << 24) - 1));
    }
}
