//! A fleet's metrics: names and units by Prometheus' conventions, every metric with its help, type
//! and unit.
//!
//! Each metric is there in every scrape, without samples where there is nothing to tell: a
//! dashboard shows no data rather than an error. What one guest has bears its name; so sums over
//! guests stay right when guests come and go.

use super::families::{self, EngineNow};
use super::sheet::{Of, Sheet};
use super::text::{self, Format, Kind};
use crate::management::Management;

/// All metrics of the fleet called `fleet`.
pub fn exposition(fleet: &str, management: &Management, engine: &EngineNow, format: Format) -> String {
    let mut sheet = Sheet::new(fleet);
    let build = vec![("version", env!("CARGO_PKG_VERSION")), ("engine", engine.name.as_str())];
    let help = "What runs: its version, and the engine that merges.";
    sheet.add("build", Kind::Info, Of::Nothing, help, [(build, 1.0)]);
    families::host(management, &mut sheet);
    families::guests(management, &mut sheet);
    families::policy(management, &mut sheet);
    families::engine(engine, &mut sheet);
    text::write(&sheet.into_families(), format)
}

#[cfg(test)]
mod tests {
    use super::*;
    use overcommit::ledger::{Account, Classes, Ledger};
    use overcommit::memory_state::MemoryState;
    use overcommit::view::{BalloonView, GuestView, HostView};

    fn management() -> Management {
        let classes = Classes { private: 3, absent: 5, ..Classes::default() };
        let (walk_age_seconds, by_counters) = (Some(3.5), true);
        let account = Account {
            name: "a".into(),
            promised: 8,
            classes,
            walk_age_seconds,
            by_counters,
            ..Account::default()
        };
        let ledger = Ledger { guests: vec![account], promised: 8, capacity: 100, ..Ledger::default() };
        let guest = GuestView {
            name: "a".into(),
            balloon: Some(BalloonView { target_pages: 2, actual_pages: 1 }),
            throttle_pages_per_second: Some(10),
            ..GuestView::default()
        };
        Management {
            memory_state: MemoryState::Soft,
            host: Some(HostView { free_pages: 7, ..HostView::default() }),
            guests: vec![guest],
            ledger: Some(ledger),
            looks: 4,
            cpu_seconds: 0.5,
            ..Management::default()
        }
    }

    #[test]
    fn numbers_have_names_units_and_labels() {
        let text = exposition(
            "f",
            &management(),
            &EngineNow { name: "off".into(), ..EngineNow::default() },
            Format::OpenMetrics,
        );
        for line in [
            "# TYPE samepage_guest_memory_bytes gauge",
            "# UNIT samepage_guest_memory_bytes bytes",
            "samepage_guest_memory_bytes{fleet=\"f\",guest=\"a\",class=\"private\"} 12288.0",
            "samepage_guest_memory_bytes{fleet=\"f\",guest=\"a\",class=\"absent\"} 20480.0",
            "samepage_guest_walk_age_seconds{fleet=\"f\",guest=\"a\"} 3.5",
            "samepage_guest_by_counters{fleet=\"f\",guest=\"a\"} 1.0",
            "samepage_promised_bytes{fleet=\"f\"} 32768.0",
            "samepage_free_bytes{fleet=\"f\"} 28672.0",
            "samepage_memory_state{fleet=\"f\",state=\"soft\"} 1.0",
            "samepage_memory_state{fleet=\"f\",state=\"high\"} 0.0",
            "samepage_guest_balloon_target_bytes{fleet=\"f\",guest=\"a\"} 8192.0",
            "samepage_guest_throttle_bytes_per_second{fleet=\"f\",guest=\"a\"} 40960.0",
            "# TYPE samepage_governor_cpu_seconds counter",
            "samepage_governor_cpu_seconds_total{fleet=\"f\"} 0.5",
            "samepage_policy_actions_total{fleet=\"f\",action=\"balloon\"} 0.0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        let version = env!("CARGO_PKG_VERSION");
        assert!(
            text.contains(&format!("_build_info{{fleet=\"f\",version=\"{version}\",engine=\"off\"}} 1.0\n"))
        );
        assert!(text.ends_with("\n# EOF\n"));
    }

    #[test]
    fn every_metric_is_there_before_anything_is_known() {
        let names = |text: &str| -> Vec<String> {
            text.lines().filter(|l| l.starts_with("# TYPE")).map(str::to_owned).collect()
        };
        let nothing = exposition("f", &Management::default(), &EngineNow::default(), Format::Text);
        let something = exposition("f", &management(), &EngineNow::default(), Format::Text);
        assert_eq!(names(&nothing), names(&something));
        for line in nothing.lines().chain(something.lines()).filter(|line| !line.starts_with('#')) {
            let value: f64 = line.rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or(f64::NAN);
            assert!(value.is_finite(), "{line}");
        }
    }
}
