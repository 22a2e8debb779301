//! A file in place of API requests: one JSON object, with a section for each endpoint.
//!
//! It is read in one go into the API's objects, so that an error says where in the file it is.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use thiserror::Error;

use super::fault::Fault;
use super::keys::is_empty;
use super::model::{
    Balloon, BootSource, CpuConfig, Drive, Entropy, Logger, MachineConfig, Metrics, MmdsConfig,
    NetworkInterface, Pmem, Serial, Vsock,
};
use super::request::Request;
use os::named_file;

/// The sections, in the order in which they are carried out.
const SECTIONS: [&str; 13] = [
    "logger",
    "machine-config",
    "cpu-config",
    "boot-source",
    "drives",
    "pmem",
    "network-interfaces",
    "mmds-config",
    "vsock",
    "balloon",
    "entropy",
    "serial",
    "metrics",
];
/// Sections of Firecracker's that Samepage has no use for yet: they may be null or empty.
const NOT_YET: [&str; 1] = ["memory-hotplug"];
/// The longest file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Why a VM cannot be configured from a file.
#[derive(Debug, Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("it cannot be read")]
    Read(#[source] io::Error),
    /// It is far longer than any description of a VM.
    #[error("it is longer than {MAX_FILE_BYTES} bytes")]
    Length,
    /// It is no JSON, or something else than an object with the sections that there are.
    #[error("it is not a JSON object with the API's objects as its sections")]
    Json(#[source] serde_json::Error),
    /// Metadata that is no JSON.
    #[error("it is not JSON")]
    Metadata(#[source] serde_json::Error),
    /// A section is something else than its object.
    #[error("the section {section:?} cannot be used")]
    Object {
        /// The section.
        section: String,
        /// Why, and where in the file.
        #[source]
        source: serde_json::Error,
    },
    /// A section cannot be carried out.
    #[error("the section {section:?} cannot be used")]
    Section {
        /// The section.
        section: String,
        /// Why.
        #[source]
        source: Box<Fault>,
    },
}

impl ConfigFileError {
    /// Says which section it was.
    pub(super) fn section(section: &str) -> impl FnOnce(Fault) -> Self {
        move |source| Self::Section { section: section.into(), source: Box::new(source) }
    }
}

/// Puts what a file says into the metadata service.
pub fn metadata(path: &Path, store: &mmds::Store, limit: usize) -> Result<(), ConfigFileError> {
    let value = serde_json::from_slice(&text(path)?).map_err(ConfigFileError::Metadata)?;
    store.put(value, limit).map_err(|error| ConfigFileError::section("metadata")(error.into()))
}

/// The requests that a file stands for, with their sections, without the one that starts the VM.
pub fn read(path: &Path) -> Result<Vec<(&'static str, Request)>, ConfigFileError> {
    requests(&text(path)?)
}

fn text(path: &Path) -> Result<Vec<u8>, ConfigFileError> {
    let mut text = Vec::new();
    let file = named_file::stream(path).map_err(ConfigFileError::Read)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut text).map_err(ConfigFileError::Read)?;
    match text.len() as u64 > MAX_FILE_BYTES {
        true => Err(ConfigFileError::Length),
        false => Ok(text),
    }
}

fn requests(text: &[u8]) -> Result<Vec<(&'static str, Request)>, ConfigFileError> {
    let mut section = None;
    let mut json = serde_json::Deserializer::from_slice(text);
    let read = Sections { at: &mut section }.deserialize(&mut json);
    let sections =
        read.and_then(|sections| json.end().map(|()| sections)).map_err(|source| match section {
            Some(section) => ConfigFileError::Object { section, source },
            None => ConfigFileError::Json(source),
        })?;
    let Contents {
        logger,
        metrics,
        machine,
        cpu,
        boot,
        drives,
        pmem,
        interfaces,
        mmds,
        vsock,
        balloon,
        entropy,
        serial,
    } = sections;
    let mut requests = Vec::new();
    // What has to say something of the others first.
    requests.extend(logger.map(|it| ("logger", Request::PutLogger(it))));
    requests.extend(machine.map(|it| ("machine-config", Request::PutMachineConfig(it))));
    requests.extend(cpu.map(|it| ("cpu-config", Request::PutCpuConfig(it))));
    requests.extend(boot.map(|it| ("boot-source", Request::PutBootSource(it))));
    requests.extend(drives.into_iter().flatten().map(|it| ("drives", Request::PutDrive(it))));
    requests.extend(pmem.into_iter().flatten().map(|it| ("pmem", Request::PutPmem(it))));
    let interfaces = interfaces.into_iter().flatten();
    requests.extend(interfaces.map(|it| ("network-interfaces", Request::PutNetworkInterface(it))));
    requests.extend(mmds.map(|it| ("mmds-config", Request::PutMmdsConfig(it))));
    requests.extend(vsock.map(|it| ("vsock", Request::PutVsock(it))));
    requests.extend(balloon.map(|it| ("balloon", Request::PutBalloon(it))));
    requests.extend(entropy.map(|it| ("entropy", Request::PutEntropy(it))));
    requests.extend(serial.map(|it| ("serial", Request::PutSerial(it))));
    requests.extend(metrics.map(|it| ("metrics", Request::PutMetrics(it))));
    Ok(requests)
}

/// What a file says.
#[derive(Debug, Default)]
struct Contents {
    logger: Option<Logger>,
    metrics: Option<Metrics>,
    machine: Option<MachineConfig>,
    cpu: Option<CpuConfig>,
    boot: Option<BootSource>,
    drives: Option<Vec<Drive>>,
    pmem: Option<Vec<Pmem>>,
    interfaces: Option<Vec<NetworkInterface>>,
    mmds: Option<MmdsConfig>,
    vsock: Option<Vsock>,
    balloon: Option<Balloon>,
    entropy: Option<Entropy>,
    serial: Option<Serial>,
}

/// Reads the contents, and says of what it cannot read in which section it was.
struct Sections<'a> {
    at: &'a mut Option<String>,
}

impl<'de> DeserializeSeed<'de> for Sections<'_> {
    type Value = Contents;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Contents, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Sections<'_> {
    type Value = Contents;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with the API's objects as its sections")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Contents, M::Error> {
        let mut contents = Contents::default();
        let mut seen = Vec::new();
        while let Some(section) = map.next_key::<String>()? {
            if seen.contains(&section) {
                return Err(M::Error::custom(format_args!("the section {section:?} is there twice")));
            }
            *self.at = Some(section.clone());
            // A section that is null or an empty list counts as not there: GET /vm/config shows,
            // and Firecracker's own files have, what is not used so.
            match section.as_str() {
                "logger" => contents.logger = map.next_value()?,
                "metrics" => contents.metrics = map.next_value()?,
                "machine-config" => contents.machine = map.next_value()?,
                "cpu-config" => contents.cpu = map.next_value()?,
                "boot-source" => contents.boot = map.next_value()?,
                "drives" => contents.drives = map.next_value()?,
                "pmem" => contents.pmem = map.next_value()?,
                "network-interfaces" => contents.interfaces = map.next_value()?,
                "mmds-config" => contents.mmds = map.next_value()?,
                "vsock" => contents.vsock = map.next_value()?,
                "balloon" => contents.balloon = map.next_value()?,
                "entropy" => contents.entropy = map.next_value()?,
                "serial" => contents.serial = map.next_value()?,
                known if NOT_YET.contains(&known) => {
                    if !is_empty(&map.next_value::<Value>()?) {
                        return Err(M::Error::custom("it is not supported by Samepage yet: expected null"));
                    }
                }
                unknown => {
                    *self.at = None;
                    let nearest = nearest(unknown);
                    return Err(M::Error::custom(format_args!(
                        "there is no section {unknown:?}: did you mean {nearest:?}?"
                    )));
                }
            }
            *self.at = None;
            seen.push(section);
        }
        Ok(contents)
    }
}

/// The section that is most like this.
fn nearest(unknown: &str) -> &'static str {
    let likeness = |known: &&str| (strsim::jaro_winkler(known, unknown) * 1000.0) as u32;
    SECTIONS.into_iter().chain(NOT_YET).max_by_key(likeness).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use os::one_line;

    fn read(text: &str) -> Result<Vec<&'static str>, String> {
        let requests = requests(text.as_bytes());
        requests.map(|all| all.into_iter().map(|(s, _)| s).collect()).map_err(|e| one_line(&e))
    }

    #[test]
    fn sections_become_requests_in_a_working_order() {
        let text = r#"{"balloon":{"amount_mib":0,"deflate_on_oom":true},"boot-source":{"kernel_image_path":"a"},
            "machine-config":{"vcpu_count":1,"mem_size_mib":64},"metrics":null,"drives":[],"vsock":null}"#;
        assert_eq!(read(text).unwrap(), ["machine-config", "boot-source", "balloon"]);
        let drives = r#"{"drives":[{"drive_id":"a","path_on_host":"p","is_root_device":false},
            {"drive_id":"b","path_on_host":"q","is_root_device":true}],"boot-source":{"kernel_image_path":"a"},
            "logger":{"log_path":"l"}}"#;
        assert_eq!(read(drives).unwrap(), ["logger", "boot-source", "drives", "drives"]);
        assert_eq!(read("{}").unwrap(), Vec::<&str>::new());
    }

    #[test]
    fn what_is_null_or_as_by_default_is_accepted_as_firecrackers_files_have_it() {
        // Every section and every optional key, spelt out.
        let text = r#"{
            "boot-source": {"kernel_image_path": "vmlinux.bin", "boot_args": "reboot=k", "initrd_path": null},
            "drives": [{
                "drive_id": "rootfs", "partuuid": null, "is_root_device": true, "cache_type": "Unsafe",
                "is_read_only": null, "path_on_host": "rootfs.ext4", "io_engine": "Sync", "rate_limiter": null,
                "socket": null
            }, {
                "drive_id": "data", "is_root_device": false, "path_on_host": "data", "cache_type": "Writeback",
                "io_engine": null, "rate_limiter": {"bandwidth": null, "ops": {"size": 0, "refill_time": 0}}
            }],
            "machine-config": {
                "vcpu_count": 2, "mem_size_mib": 1024, "smt": null, "track_dirty_pages": null,
                "huge_pages": null, "cpu_template": "None"
            },
            "balloon": {
                "amount_mib": 0, "deflate_on_oom": false, "stats_polling_interval_s": null,
                "free_page_hinting": null, "free_page_reporting": null
            },
            "metrics": {"metrics_path": "m", "emit_id": false, "properties": null},
            "logger": {"log_path": null, "level": null, "show_level": null, "show_log_origin": null, "module": null},
            "network-interfaces": [{
                "iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": null, "mtu": null, "rx_rate_limiter": null,
                "tx_rate_limiter": {"bandwidth": null}
            }],
            "cpu-config": null, "vsock": null, "mmds-config": null, "entropy": null,
            "pmem": [], "serial": null, "memory-hotplug": null
        }"#;
        let all = [
            "logger",
            "machine-config",
            "boot-source",
            "drives",
            "drives",
            "network-interfaces",
            "balloon",
            "metrics",
        ];
        assert_eq!(read(text).unwrap(), all);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, said) in [
            (r#"{"machine-cfg":{}}"#, "did you mean \"machine-config\"?"),
            (r#"{"boot_source":{}}"#, "did you mean \"boot-source\"?"),
            (r#"{"baloon":{}}"#, "did you mean \"balloon\"?"),
            (r#"{"mmds":{}}"#, "did you mean \"mmds-config\"?"),
            (r#"{"drives":[{}]}"#, "\"drives\" cannot be used: missing field"),
            (r#"{"drives":[{"drive_id":"a","path_on_host":"p"}]}"#, "missing field `is_root_device`"),
            (r#"{"drives":{}}"#, "\"drives\" cannot be used: invalid type: map, expected a sequence"),
            (r#"{"balloon":{}}"#, "\"balloon\" cannot be used: missing field"),
            (r#"{"balloon":[]}"#, "\"balloon\" cannot be used: invalid"),
            (r#"{"balloon":null,"balloon":null}"#, "the section \"balloon\" is there twice"),
            (r#"{"metrics":{"metrics_path":"a","metrics_path":"b"}}"#, "duplicate field `metrics_path`"),
            (r#"{"balloon":null} {}"#, "trailing characters"),
            ("[]", "it is not a JSON object"),
            ("", "EOF"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(said), "{text}: {error}");
        }
        for section in NOT_YET {
            let error = read(&format!(r#"{{"{section}":{{"a":1}}}}"#)).expect_err(section);
            let said = format!("the section {section:?} cannot be used: it is not supported by Samepage yet");
            assert!(error.contains(&said), "{error}");
        }
    }

    #[test]
    fn lines_and_columns_are_those_of_the_file() {
        let text = "{\n  \"machine-config\": {\"vcpu_count\": 1, \"mem_size_mib\": 128},\n  \"boot-source\": {\n    \
                    \"kernel_image_path\": \"builtin\",\n    \"boot_arg\": \"quiet\"\n  }\n}\n";
        let error = read(text).expect_err("a key that is not there");
        assert!(error.contains("unknown field `boot_arg`"), "{error}");
        assert!(error.contains("at line 5 column 14"), "{error}");
        let text = "{\"drives\": [\n{\"drive_id\": \"a\", \"path_on_host\": \"p\", \"is_root_device\": true,\n \
                    \"io_engine\": \"Async\"}]}";
        let error = read(text).expect_err("another engine");
        assert!(
            error.contains("io_engine \"Async\" is not supported by Samepage yet: expected \"Sync\""),
            "{error}"
        );
        assert!(error.contains("at line 3 column"), "{error}");
        let error = read("{\"pmem\":\n\n  {\"id\": 3}}").expect_err("pmem");
        assert!(error.contains("at line 3 column"), "{error}");
    }
}
