//! What a method, a path and a body ask for.

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::fault::Fault;
use super::model::{
    Action, ActionType, Balloon, BalloonPatch, BootSource, CpuConfig, Drive, DrivePatch, Entropy,
    HintingStart, Logger, MachineConfig, MachineConfigPatch, Metrics, MmdsConfig, NetworkInterface,
    NetworkInterfacePatch, Pmem, PmemPatch, Serial, StatisticsPatch, VmPatch, VmState, Vsock,
};
use super::snapshot::{CreateSnapshot, LoadSnapshot};

/// First parts of paths that Firecracker serves and Samepage does not yet.
const NOT_YET: &[&str] = &["hotplug"];

/// A request that is well formed. Whether it can be carried out is up to
/// [`Instance`](super::instance::Instance).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    GetInstance,
    GetVersion,
    GetVmConfig,
    GetMachineConfig,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachineConfigPatch),
    PutBootSource(BootSource),
    PutDrive(Drive),
    PatchDrive(DrivePatch),
    PutPmem(Pmem),
    PatchPmem(PmemPatch),
    PutNetworkInterface(NetworkInterface),
    PatchNetworkInterface(NetworkInterfacePatch),
    GetMmds,
    PutMmds(Value),
    PatchMmds(Value),
    PutMmdsConfig(MmdsConfig),
    PutEntropy(Entropy),
    PutSerial(Serial),
    PutCpuConfig(CpuConfig),
    PutVsock(Vsock),
    PutLogger(Logger),
    PutMetrics(Metrics),
    PutAction(ActionType),
    PatchVm(VmState),
    CreateSnapshot(CreateSnapshot),
    LoadSnapshot(Box<LoadSnapshot>),
    GetBalloon,
    PutBalloon(Balloon),
    PatchBalloon(BalloonPatch),
    GetBalloonStatistics,
    PatchBalloonStatistics(StatisticsPatch),
    StartHinting(HintingStart),
    GetHinting,
    StopHinting,
}

impl Request {
    /// Reads a request.
    pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Self, Fault> {
        // A slash at the end is as good as none.
        let route =
            path.strip_prefix('/').map(|p| p.strip_suffix('/').filter(|p| !p.is_empty()).unwrap_or(p));
        let first = route.and_then(|r| r.split('/').next()).unwrap_or_default();
        if matches!(method, "GET" | "PUT" | "PATCH" | "DELETE") && NOT_YET.contains(&first) {
            return Err(Fault::NotYet { method: method.into(), path: path.into() });
        }
        let request = match (method, route.unwrap_or("?")) {
            ("GET", "") => Self::GetInstance,
            ("GET", "version") => Self::GetVersion,
            ("GET", "vm/config") => Self::GetVmConfig,
            ("GET", "machine-config") => Self::GetMachineConfig,
            ("GET", "mmds") => Self::GetMmds,
            ("GET", "balloon") => Self::GetBalloon,
            ("GET", "balloon/statistics") => Self::GetBalloonStatistics,
            ("GET", "balloon/hinting/status") => Self::GetHinting,
            ("PUT", "machine-config") => Self::PutMachineConfig(json(method, body)?),
            ("PUT", "boot-source") => Self::PutBootSource(json(method, body)?),
            ("PUT", route) if first == "drives" => {
                let in_path = id_in(method, path, route)?;
                let drive: Drive = json(method, body)?;
                same_id(in_path, &drive.drive_id)?;
                Self::PutDrive(drive)
            }
            ("PATCH", route) if first == "drives" => {
                let in_path = id_in(method, path, route)?;
                let patch: DrivePatch = json(method, body)?;
                same_id(in_path, &patch.drive_id)?;
                Self::PatchDrive(patch)
            }
            ("PUT", route) if first == "pmem" => {
                let in_path = id_in(method, path, route)?;
                let pmem: Pmem = json(method, body)?;
                same_id(in_path, &pmem.id)?;
                Self::PutPmem(pmem)
            }
            ("PATCH", route) if first == "pmem" => {
                let in_path = id_in(method, path, route)?;
                let patch: PmemPatch = json(method, body)?;
                same_id(in_path, &patch.id)?;
                Self::PatchPmem(patch)
            }
            ("PUT", route) if first == "network-interfaces" => {
                let in_path = id_in(method, path, route)?;
                let interface: NetworkInterface = json(method, body)?;
                same_id(in_path, &interface.iface_id)?;
                Self::PutNetworkInterface(interface)
            }
            ("PATCH", route) if first == "network-interfaces" => {
                let in_path = id_in(method, path, route)?;
                let patch: NetworkInterfacePatch = json(method, body)?;
                same_id(in_path, &patch.iface_id)?;
                Self::PatchNetworkInterface(patch)
            }
            ("PUT", "mmds") => Self::PutMmds(json(method, body)?),
            ("PATCH", "mmds") => Self::PatchMmds(json(method, body)?),
            ("PUT", "mmds/config") => Self::PutMmdsConfig(json(method, body)?),
            ("PUT", "entropy") => Self::PutEntropy(json(method, body)?),
            ("PUT", "serial") => Self::PutSerial(json(method, body)?),
            ("PUT", "cpu-config") => Self::PutCpuConfig(json(method, body)?),
            ("PUT", "vsock") => Self::PutVsock(json(method, body)?),
            ("PUT", "logger") => Self::PutLogger(json(method, body)?),
            ("PUT", "metrics") => Self::PutMetrics(json(method, body)?),
            ("PUT", "actions") => Self::PutAction(json::<Action>(method, body)?.action_type),
            ("PUT", "snapshot/create") => Self::CreateSnapshot(json(method, body)?),
            ("PUT", "snapshot/load") => Self::LoadSnapshot(Box::new(json(method, body)?)),
            ("PUT", "balloon") => Self::PutBalloon(json(method, body)?),
            ("PATCH", "machine-config") => {
                let patch: MachineConfigPatch = json(method, body)?;
                match patch.is_empty() {
                    true => return Err(Fault::Empty { method: method.into() }),
                    false => Self::PatchMachineConfig(patch),
                }
            }
            ("PATCH", "vm") => Self::PatchVm(json::<VmPatch>(method, body)?.state),
            ("PATCH", "balloon") => Self::PatchBalloon(json(method, body)?),
            ("PATCH", "balloon/statistics") => Self::PatchBalloonStatistics(json(method, body)?),
            ("PATCH", "balloon/hinting/start") => match body {
                b"" => Self::StartHinting(HintingStart::default()),
                _ => Self::StartHinting(json(method, body)?),
            },
            ("PATCH", "balloon/hinting/stop") => match body {
                b"" => Self::StopHinting,
                _ => return Err(Fault::Body { method: method.into() }),
            },
            _ => return Err(Fault::Route { method: method.into(), path: path.into() }),
        };
        match method == "GET" && !body.is_empty() {
            true => Err(Fault::Body { method: method.into() }),
            false => Ok(request),
        }
    }
}

/// The ID of a drive or an interface, which is the second and last part of the path.
fn id_in<'a>(method: &str, path: &str, route: &'a str) -> Result<&'a str, Fault> {
    let id = route.split_once('/').map(|(_, id)| id).filter(|id| !id.contains('/'));
    id.ok_or_else(|| Fault::Route { method: method.into(), path: path.into() })
}

/// It stands in the body, too.
fn same_id(in_path: &str, in_body: &str) -> Result<(), Fault> {
    match in_path == in_body {
        true => Ok(()),
        false => Err(Fault::Ids { in_path: in_path.into(), in_body: in_body.into() }),
    }
}

fn json<T: DeserializeOwned>(method: &str, body: &[u8]) -> Result<T, Fault> {
    match body {
        b"" => Err(Fault::Empty { method: method.into() }),
        _ => Ok(serde_json::from_slice(body)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::model::HugePages;

    fn parse(method: &str, path: &str, body: &str) -> Result<Request, String> {
        Request::parse(method, path, body.as_bytes()).map_err(|f| f.message())
    }

    #[test]
    fn every_route_is_found() {
        let balloon = r#"{"amount_mib":64,"deflate_on_oom":true}"#;
        for (method, path, body) in [
            ("GET", "/", ""),
            ("GET", "/version", ""),
            ("GET", "/vm/config", ""),
            ("GET", "/machine-config/", ""),
            ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64,"smt":false,"huge_pages":"2M"}"#),
            ("PATCH", "/machine-config", r#"{"mem_size_mib":64}"#),
            ("PUT", "/boot-source", r#"{"kernel_image_path":"a","boot_args":null}"#),
            (
                "PUT",
                "/network-interfaces/a",
                r#"{"iface_id":"a","host_dev_name":"t","mtu":null,"rx_rate_limiter":{}}"#,
            ),
            (
                "PATCH",
                "/network-interfaces/a",
                r#"{"iface_id":"a","tx_rate_limiter":{"bandwidth":{"size":1,"one_time_burst":null,"refill_time":2}}}"#,
            ),
            ("GET", "/mmds", ""),
            ("PUT", "/mmds", r#"{"a":{"b":[1]}}"#),
            ("PATCH", "/mmds", r#"{"a":null}"#),
            (
                "PUT",
                "/mmds/config",
                r#"{"network_interfaces":["a"],"version":"V2","ipv4_address":"169.254.1.1"}"#,
            ),
            (
                "PUT",
                "/mmds/config",
                r#"{"network_interfaces":[],"version":null,"imds_compat":null,"ipv4_address":null}"#,
            ),
            ("PUT", "/entropy", r#"{"rate_limiter":{"ops":{"size":1,"refill_time":2}}}"#),
            ("PUT", "/entropy", r#"{"rate_limiter":null}"#),
            ("PUT", "/serial", r#"{"serial_out_path":"a","rate_limiter":null}"#),
            ("PUT", "/cpu-config", r#"{"msr_modifiers":[]}"#),
            ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v","vsock_id":"v"}"#),
            ("PUT", "/metrics", r#"{"metrics_path":"a"}"#),
            ("PUT", "/metrics", r#"{"metrics_path":"a","emit_id":null,"properties":{}}"#),
            (
                "PUT",
                "/logger",
                r#"{"log_path":"a","level":"DEBUG","show_level":true,"show_log_origin":false}"#,
            ),
            ("PUT", "/logger", "{}"),
            ("PATCH", "/machine-config", r#"{"cpu_template":"None"}"#),
            ("PATCH", "/balloon/hinting/start", r#"{"acknowledge_on_stop":null}"#),
            ("PUT", "/drives/a", r#"{"drive_id":"a","path_on_host":"p","is_root_device":false}"#),
            ("PATCH", "/drives/a", r#"{"drive_id":"a","path_on_host":"p","rate_limiter":null}"#),
            ("PUT", "/pmem/a", r#"{"id":"a","path_on_host":"p","root_device":true,"read_only":null}"#),
            ("PATCH", "/pmem/a", r#"{"id":"a","rate_limiter":null}"#),
            ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
            ("PATCH", "/vm", r#"{"state":"Paused"}"#),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"a","mem_file_path":"b"}"#),
            (
                "PUT",
                "/snapshot/create",
                r#"{"snapshot_type":"Diff","snapshot_path":"a","mem_file_path":"b"}"#,
            ),
            (
                "PUT",
                "/snapshot/load",
                r#"{"snapshot_path":"a","mem_file_path":"b","enable_diff_snapshots":true}"#,
            ),
            (
                "PUT",
                "/snapshot/load",
                r#"{"snapshot_path":"a","mem_backend":{"backend_type":"Uffd","backend_path":"b"},"track_dirty_pages":null,
                "resume_vm":true,"clock_realtime":false,"network_overrides":[],"vsock_override":null,"huge_pages":"Snapshot"}"#,
            ),
            ("GET", "/balloon", ""),
            ("PUT", "/balloon", balloon),
            ("PATCH", "/balloon", r#"{"amount_mib":0}"#),
            ("GET", "/balloon/statistics", ""),
            ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#),
            ("PATCH", "/balloon/hinting/start", ""),
            ("PATCH", "/balloon/hinting/start", r#"{"acknowledge_on_stop":false}"#),
            ("GET", "/balloon/hinting/status", ""),
            ("PATCH", "/balloon/hinting/stop", ""),
        ] {
            assert!(parse(method, path, body).is_ok(), "{method} {path}: {:?}", parse(method, path, body));
        }
    }

    #[test]
    fn values_arrive() {
        assert_eq!(
            parse(
                "PUT",
                "/machine-config",
                r#"{"vcpu_count":3,"mem_size_mib":64,"huge_pages":"Transparent"}"#
            ),
            Ok(Request::PutMachineConfig(MachineConfig {
                vcpu_count: 3,
                mem_size_mib: 64,
                huge_pages: HugePages::Transparent,
                ..MachineConfig::default()
            }))
        );
        assert_eq!(
            parse("PATCH", "/balloon/hinting/start", "{}"),
            Ok(Request::StartHinting(HintingStart { acknowledge_on_stop: None }))
        );
        assert_eq!(parse("PATCH", "/vm", r#"{"state":"Resumed"}"#), Ok(Request::PatchVm(VmState::Resumed)));
    }

    #[test]
    fn unknown_routes_are_named() {
        for (method, path) in [
            ("PUT", "/foo"),
            ("PUT", "/drives"),
            ("PUT", "/drives/a/b"),
            ("DELETE", "/"),
            ("get", "/"),
            ("PUT", "/version"),
            ("GET", "//"),
            ("GET", "*"),
        ] {
            let said = format!("Invalid request method and/or path: {method} {path}.");
            assert_eq!(parse(method, path, "{}"), Err(said));
        }
        for first in NOT_YET {
            let said = format!("PUT /{first}/a is not supported by Samepage yet.");
            assert_eq!(parse("PUT", &format!("/{first}/a"), "{}"), Err(said));
        }
    }

    #[test]
    fn bodies_must_be_what_is_expected() {
        for (method, path, body, said) in [
            ("PUT", "/actions", "", "Empty PUT request."),
            ("PATCH", "/vm", "", "Empty PATCH request."),
            ("PATCH", "/machine-config", "{}", "Empty PATCH request."),
            ("GET", "/balloon", "{}", "GET request cannot have a body."),
            ("PATCH", "/balloon/hinting/stop", "{}", "PATCH request cannot have a body."),
            ("PUT", "/actions", "{", "EOF while parsing"),
            ("PUT", "/actions", "\u{1}", "expected value"),
            ("PUT", "/actions", r#"{"action_type":"Explode"}"#, "unknown variant `Explode`"),
            ("PUT", "/actions", r#"{"action_type":"InstanceStart","now":1}"#, "unknown field `now`"),
            ("PUT", "/actions", r#"{"action_type":"InstanceStart"} x"#, "trailing characters"),
            ("PUT", "/machine-config", r#"{"vcpu_count":1}"#, "missing field `mem_size_mib`"),
            ("PUT", "/machine-config", r#"{"vcpu_count":300,"mem_size_mib":1}"#, "expected u8"),
            ("PUT", "/machine-config", r#"{"vcpu_count":-1,"mem_size_mib":1}"#, "expected u8"),
            (
                "PUT",
                "/machine-config",
                r#"{"vcpu_count":1,"mem_size_mib":1,"huge_pages":"1G"}"#,
                "unknown variant",
            ),
            ("PUT", "/balloon", r#"{"amount_mib":1}"#, "missing field `deflate_on_oom`"),
            ("PUT", "/drives/a", r#"{"drive_id":"a","path_on_host":"p"}"#, "missing field `is_root_device`"),
            (
                "PUT",
                "/drives/b",
                r#"{"drive_id":"a","path_on_host":"p","is_root_device":true}"#,
                "The id from the path [b] does not match the id from the body [a]!",
            ),
            ("PUT", "/network-interfaces/a", r#"{"iface_id":"a"}"#, "missing field `host_dev_name`"),
            (
                "PUT",
                "/network-interfaces/b",
                r#"{"iface_id":"a","host_dev_name":"t"}"#,
                "The id from the path [b] does not match the id from the body [a]!",
            ),
            (
                "PUT",
                "/network-interfaces/a",
                r#"{"iface_id":"a","host_dev_name":"t","tx_rate_limiter":{"ops":{"size":9}}}"#,
                "missing field `refill_time`",
            ),
            (
                "PUT",
                "/serial",
                r#"{"rate_limiter":{"size":9,"refill_time":1}}"#,
                "not supported by Samepage yet: expected null",
            ),
            (
                "PUT",
                "/cpu-config",
                r#"{"msr_modifiers":[{"addr":"0x10","bitmap":"0b1"}]}"#,
                "not supported by Samepage yet: expected [] or null",
            ),
            (
                "PUT",
                "/drives/a",
                r#"{"drive_id":"a","path_on_host":"p","is_root_device":true,"cache_type":"Safe"}"#,
                "unknown variant `Safe`",
            ),
            (
                "PUT",
                "/drives/a",
                r#"{"drive_id":"a","path_on_host":"p","is_root_device":true,"io_engine":"Async"}"#,
                "io_engine \"Async\" is not supported by Samepage yet: expected \"Sync\" or null at line 1",
            ),
            (
                "PUT",
                "/drives/a",
                r#"{"drive_id":"a","is_root_device":false,"socket":"/s"}"#,
                "socket \"/s\" is not supported by Samepage yet: expected null",
            ),
            (
                "PUT",
                "/drives/a",
                r#"{"drive_id":"a","path_on_host":"p","is_root_device":false,"rate_limiter":{"ops":{"size":9,"refill_time":1}}}"#,
                "is not supported by Samepage yet: expected null",
            ),
            (
                "PUT",
                "/machine-config",
                r#"{"vcpu_count":1,"mem_size_mib":16,"cpu_template":"T2"}"#,
                "cpu_template \"T2\" is not supported by Samepage yet: expected \"None\" or null",
            ),
            ("PATCH", "/machine-config", r#"{"smt":null}"#, "Empty PATCH request."),
            (
                "PUT",
                "/metrics",
                r#"{"metrics_path":"m","properties":{"a":"b"}}"#,
                "not supported by Samepage yet",
            ),
            (
                "PUT",
                "/snapshot/create",
                r#"{"snapshot_type":"Half","snapshot_path":"a","mem_file_path":"b"}"#,
                "unknown variant `Half`",
            ),
            ("PUT", "/snapshot/create", r#"{"snapshot_path":"a"}"#, "missing field `mem_file_path`"),
            (
                "PUT",
                "/snapshot/load",
                r#"{"snapshot_path":"a","mem_backend":{"backend_type":"Tape","backend_path":"b"}}"#,
                "unknown variant `Tape`",
            ),
            ("PUT", "/logger", r#"{"level":"Loud"}"#, "unknown level \"Loud\": expected Off, Error"),
            ("PUT", "/logger", r#"{"file":"a"}"#, "unknown field `file`"),
            ("PATCH", "/balloon", r#"{"amount_mib":4294967296}"#, "expected u32"),
            ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":65536}"#, "expected u16"),
            ("PATCH", "/balloon/hinting/start", r#"{"acknowledge_on_stop":1}"#, "expected a boolean"),
        ] {
            let answer = parse(method, path, body).expect_err(body);
            assert!(answer.contains(said), "{method} {path} {body}: {answer}");
        }
        let deep = "[".repeat(50_000);
        assert!(parse("PUT", "/balloon", &deep).is_err());
    }
}
