//! A fleet's numbers in OpenMetrics text: names and units by Prometheus' conventions, every metric with its help, type and unit.
//!
//! Each metric is there in every scrape, without samples where there is nothing to tell: a dashboard shows no data rather
//! than an error. What one guest has bears its name; so sums over guests stay right when guests come and go.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use super::families::{self, Sample};
use crate::host::governor::Management;
use crate::merge::Progress;
use crate::merge::slab::engine::Statistics;

/// What all names begin with.
const PREFIX: &str = "samepage";

/// What the engine that merges says of itself.
#[derive(Clone, Debug, Default)]
pub struct EngineNow {
    /// Its name.
    pub name: String,
    /// How far it has come; None before it has begun, or where it cannot be told.
    pub progress: Option<Progress>,
    /// What the slab engine counts; None with another one.
    pub statistics: Option<Statistics>,
}

/// All metrics of the fleet called `fleet`, up to and with the mark of their end.
pub fn exposition(fleet: &str, management: Management, engine: EngineNow) -> String {
    let labels = [("fleet".into(), fleet.to_owned().into())];
    let mut registry = Registry::with_prefix_and_labels(PREFIX, labels.into_iter());
    registry.register_collector(Box::new(Snapshot { management, engine }));
    let mut text = String::new();
    // Writing to memory does not fail.
    let _ = encode(&mut text, &registry);
    text
}

/// What is told at one moment.
#[derive(Debug)]
struct Snapshot {
    management: Management,
    engine: EngineNow,
}

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder) -> fmt::Result {
        let mut sheet = Sheet { encoder };
        let build = [("version", env!("CARGO_PKG_VERSION")), ("engine", &self.engine.name)];
        let build: &[(&str, &str)] = &build;
        let help = "What runs: its version, and the engine that merges.";
        sheet.encoder.encode_descriptor("build", help, None, MetricType::Info)?.encode_info(&build)?;
        families::host(&self.management, &mut sheet)?;
        families::guests(&self.management, &mut sheet)?;
        families::policy(&self.management, &mut sheet)?;
        families::engine(&self.engine, &mut sheet)
    }
}

/// What metrics are written to.
pub(super) struct Sheet<'a> {
    encoder: DescriptorEncoder<'a>,
}

/// What a number is of.
#[derive(Clone, Copy)]
pub(super) enum Of {
    /// Bytes.
    Bytes,
    /// Bytes a second.
    BytesPerSecond,
    /// Seconds.
    Seconds,
    /// Parts of one.
    Ratio,
    /// A count, or yes (1) and no (0).
    Nothing,
}

impl Of {
    fn unit(self) -> Option<Unit> {
        match self {
            Self::Bytes => Some(Unit::Bytes),
            Self::BytesPerSecond => Some(Unit::Other("bytes_per_second".into())),
            Self::Seconds => Some(Unit::Seconds),
            Self::Ratio => Some(Unit::Other("ratio".into())),
            Self::Nothing => None,
        }
    }
}

impl Sheet<'_> {
    /// What can go up and down. The unit is added to the name.
    pub(super) fn gauge<'s>(
        &mut self,
        name: &str,
        of: Of,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'s>>,
    ) -> fmt::Result {
        let unit = of.unit();
        let mut metric = self.encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in samples {
            metric.encode_family(&labels.as_slice())?.encode_gauge(&value)?;
        }
        Ok(())
    }

    /// What only goes up while the daemon lives. The unit and `_total` are added to the name.
    pub(super) fn counter<'s>(
        &mut self,
        name: &str,
        of: Of,
        help: &str,
        samples: impl IntoIterator<Item = Sample<'s>>,
    ) -> fmt::Result {
        let unit = of.unit();
        let mut metric = self.encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in samples {
            let labels = labels.as_slice();
            let none: Option<&prometheus_client::metrics::exemplar::Exemplar<[(&str, &str); 0], f64>> = None;
            metric.encode_family(&labels)?.encode_counter(&value, none)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overcommit::ledger::{Account, Classes, Ledger};
    use crate::overcommit::pressure::Pressure;
    use crate::overcommit::view::{BalloonView, GuestView, HostView};

    fn management() -> Management {
        let classes = Classes { private: 3, absent: 5, ..Classes::default() };
        let account = Account { name: "a".into(), promised: 8, classes, ..Account::default() };
        let ledger = Ledger { guests: vec![account], promised: 8, capacity: 100, ..Ledger::default() };
        let guest = GuestView {
            name: "a".into(),
            balloon: Some(BalloonView { target_pages: 2, actual_pages: 1 }),
            throttle_pages_per_second: Some(10),
            ..GuestView::default()
        };
        Management {
            pressure: Pressure::Soft,
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
        let text = exposition("f", management(), EngineNow { name: "off".into(), ..EngineNow::default() });
        for line in [
            "# TYPE samepage_guest_memory_bytes gauge",
            "# UNIT samepage_guest_memory_bytes bytes",
            "samepage_guest_memory_bytes{fleet=\"f\",guest=\"a\",class=\"private\"} 12288.0",
            "samepage_guest_memory_bytes{fleet=\"f\",guest=\"a\",class=\"absent\"} 20480.0",
            "samepage_promised_bytes{fleet=\"f\"} 32768.0",
            "samepage_free_bytes{fleet=\"f\"} 28672.0",
            "samepage_pressure_state{fleet=\"f\",state=\"soft\"} 1.0",
            "samepage_pressure_state{fleet=\"f\",state=\"high\"} 0.0",
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
            text.contains(&format!("_build_info{{fleet=\"f\",version=\"{version}\",engine=\"off\"}} 1\n"))
        );
        assert!(text.ends_with("\n# EOF\n"));
    }

    #[test]
    fn every_metric_is_there_before_anything_is_known() {
        let names = |text: &str| -> Vec<String> {
            text.lines().filter(|l| l.starts_with("# TYPE")).map(str::to_owned).collect()
        };
        let nothing = exposition("f", Management::default(), EngineNow::default());
        let something = exposition("f", management(), EngineNow::default());
        assert_eq!(names(&nothing), names(&something));
        for line in nothing.lines().chain(something.lines()).filter(|line| !line.starts_with('#')) {
            let value: f64 = line.rsplit(' ').next().and_then(|value| value.parse().ok()).unwrap_or(f64::NAN);
            assert!(value.is_finite(), "{line}");
        }
    }
}
