//! The metadata service: what the host may put there, and a Debian guest that reads it over its own interface.

use std::fs;
use std::time::Duration;

use serde_json::{Value, json};
use tests::api::ApiVm;
use tests::lab::lab_script;
use tests::sandbox::Sandbox;
use tests::vm::SOON;
use tests::{require_kvm, require_tool};

use super::network::{in_namespace, without_taps};
use super::power::need_guest;

fn end(sandbox: &Sandbox, vm: ApiVm) {
    vm.running().kill(rustix::process::Signal::TERM);
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

#[test]
fn contents_are_put_patched_and_bounded() {
    let sandbox = Sandbox::new();
    let vm = ApiVm::firecracker(&sandbox, &["--http-api-max-payload-size", "20000000"], &[]);
    assert_eq!(vm.get("/mmds"), Value::Null);
    assert_eq!(vm.ask("PATCH", "/mmds", &json!({})).fault(), "The MMDS data store is not initialized.");
    vm.put("/mmds", &json!({"latest": {"user-data": "a", "gone": 1}}));
    vm.patch("/mmds", &json!({"latest": {"gone": null, "more": {"b": [1]}}}));
    let contents = json!({"latest": {"user-data": "a", "more": {"b": [1]}}});
    assert_eq!(vm.get("/mmds"), contents);
    let long = json!({"a": "x".repeat(10 << 20)});
    for method in ["PUT", "PATCH"] {
        let answer = vm.ask(method, "/mmds", &long);
        assert!(answer.fault().contains("and 51200 are the most"), "{answer:?}");
    }
    assert!(vm.ask("PUT", "/mmds", &json!([1])).fault().contains("must be a JSON object"));
    assert_eq!(vm.get("/mmds"), contents);
    // The service is on interfaces that are there, at a link-local address.
    vm.put("/network-interfaces/eth0", &json!({"iface_id": "eth0", "host_dev_name": "lo"}));
    for (config, said) in [
        (json!({"network_interfaces": []}), "The network interfaces list provided is empty."),
        (
            json!({"network_interfaces": ["eth1"]}),
            "does not correspond to any existing network interface: \"eth1\"",
        ),
        (
            json!({"network_interfaces": ["eth0"], "ipv4_address": "10.0.0.1"}),
            "The MMDS IPv4 address is not link local",
        ),
        (json!({"network_interfaces": ["eth0"], "ipv4_address": "169.254.255.1"}), "is not link local"),
        (json!({"network_interfaces": ["eth0"], "ipv4_address": "x"}), "IPv4"),
        (json!({"network_interfaces": ["eth0"], "version": "V3"}), "unknown variant `V3`"),
        (json!({"version": "V2"}), "missing field `network_interfaces`"),
    ] {
        let answer = vm.ask("PUT", "/mmds/config", &config);
        assert!(answer.fault().contains(said), "{config}: {answer:?}");
    }
    let config = json!({"network_interfaces": ["eth0"], "version": "V2", "ipv4_address": "169.254.170.2", "imds_compat": true});
    vm.put("/mmds/config", &config);
    assert_eq!(vm.get("/vm/config")["mmds-config"], config);
    end(&sandbox, vm);
}

#[test]
fn contents_come_from_a_file_within_a_limit() {
    let sandbox = Sandbox::new();
    let file = sandbox.file("metadata.json");
    let path = file.to_str().expect("UTF-8");
    fs::write(&file, r#"{"a": {"b": "c"}}"#).expect("a file");
    let vm = ApiVm::firecracker(&sandbox, &["--metadata", path, "--mmds-size-limit", "30"], &[]);
    assert_eq!(vm.get("/mmds"), json!({"a": {"b": "c"}}));
    let answer = vm.ask("PATCH", "/mmds", &json!({"d": "x".repeat(30)}));
    assert!(answer.fault().contains("and 30 are the most"), "{answer:?}");
    end(&sandbox, vm);
    let socket = sandbox.file("other.sock");
    for (text, said) in [
        ("{", "it is not JSON"),
        ("[]", "must be a JSON object"),
        (r#"{"a": "0123456789012345678901234"}"#, "30 are the most"),
    ] {
        fs::write(&file, text).expect("a file");
        let args =
            ["--api-sock", socket.to_str().expect("UTF-8"), "--metadata", path, "--mmds-size-limit", "30"];
        let run = sandbox.firecracker(args).output();
        assert_eq!(run.code, Some(152), "{run}");
        assert!(run.stderr.contains(said), "{said}: {run}");
    }
    sandbox.assert_clean_within(SOON);
}

/// A VM that is loaded has the service where it was, and nothing in it.
#[test]
fn a_snapshot_has_the_service_and_not_its_contents() {
    require_kvm!();
    let _ = (require_tool!("ip"), require_tool!("curl"));
    if let Some(why) = without_taps() {
        tests::host::skipped(module_path!(), &why);
        return;
    }
    let sandbox = Sandbox::new();
    let script = r#"
        ip tuntap add dev tap0 mode tap
        ip link set tap0 up
        start() {
            rm -f api.sock
            "$SAMEPAGE" run --console none --api-sock ./api.sock 2>messages &
            vm=$!
            until_there api.sock
        }
        api() { curl -sS --fail-with-body --unix-socket ./api.sock -X "$1" "http://localhost$2" ${3:+-d "$3"}; }
        config='{"version":"V2","network_interfaces":["eth0"],"ipv4_address":"169.254.170.2","imds_compat":true}'
        start
        api PUT /machine-config '{"vcpu_count": 1, "mem_size_mib": 16}'
        api PUT /boot-source '{"kernel_image_path": "builtin"}'
        api PUT /network-interfaces/eth0 '{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01"}'
        api PUT /mmds/config "$config"
        api PUT /mmds '{"latest": {"user-data": "secret"}}'
        api PUT /actions '{"action_type": "InstanceStart"}'
        api PATCH /vm '{"state": "Paused"}'
        api PUT /snapshot/create '{"snapshot_path": "vm.state", "mem_file_path": "vm.memory"}'
        kill $vm && wait $vm
        if grep -q secret vm.state; then fail "the contents are saved"; fi
        "$SAMEPAGE" snapshot info ./vm.state | grep -q '^mmds *version 1' || fail "no section: $("$SAMEPAGE" snapshot info ./vm.state)"
        start
        api PUT /snapshot/load '{"snapshot_path": "vm.state", "mem_file_path": "vm.memory", "resume_vm": true}'
        [ "$(api GET /mmds)" = null ] || fail "$(api GET /mmds)"
        api GET /vm/config >all.json
        python3 -c 'import json, sys; assert json.load(open("all.json"))["mmds-config"] == json.loads(sys.argv[1])' "$config" || fail "$(cat all.json)"
        api PUT /mmds '{"latest": {"user-data": "other"}}'
        api GET /mmds | grep -q other || fail "$(api GET /mmds)"
        kill $vm && wait $vm
    "#;
    let outcome = in_namespace(&sandbox, SOON, script);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

/// A Debian guest of a program called `firecracker`, on a TAP: metadata with a token, and without one where that is enough; a file from
/// the host, which is not faster than its limit, and is when the limit is gone.
#[test]
fn lab_a_debian_guest_reads_its_metadata() {
    let image = need_guest();
    let script = format!(
        r#"
        samepage={samepage} image={image}
        mkdir /var/tmp/mmds && cd /var/tmp/mmds
        ln -s "$samepage" firecracker
        cpio -id --quiet bin/busybox <"$image/guest.cpio"
        mkdir -p www root/etc
        head -c 400000 /dev/urandom >www/file
        cat >root/etc/act <<'END'
#!/bin/busybox sh
export PATH=/bin
for name in sh sed cat ip wget nc sleep date sha256sum ifconfig route poweroff; do busybox ln -s busybox /bin/$name 2>/dev/null; done
ifconfig eth0 10.9.0.2 netmask 255.255.255.0 up
route add -host 169.254.169.254 dev eth0
at() {{ cat /proc/uptime | sed 's/\..*//'; }}
ask() {{ printf '%s\r\nHost: x\r\nConnection: close\r\n\r\n' "$1" | nc 169.254.169.254 80 | sed 's/\r//'; }}
echo "guest: without: $(ask 'GET /latest/user-data HTTP/1.1' | sed -n '1p;$p' | sed ':a;N;s/\n/ /;ta')"
token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nX-metadata-token-ttl-seconds: 600\r\nConnection: close\r\n\r\n' | nc 169.254.169.254 80 | sed -n '$p')
echo "guest: with: $(busybox wget -q -O - --header "X-metadata-token: $token" http://169.254.169.254/latest/user-data)"
echo "guest: list: $(busybox wget -q -O - --header "X-metadata-token: $token" http://169.254.169.254/latest | sed ':a;N;s/\n/ /;ta')"
from=$(at)
busybox wget -q -O /tmp/file http://10.9.0.1:8080/file || busybox wget -q -O /file http://10.9.0.1:8080/file
echo "guest: took $(( $(at) - from ))"
echo "guest: sum $(busybox sha256sum /tmp/file /file 2>/dev/null | sed -n '1s/ .*//p')"
poweroff
END
        chmod 755 root/etc/act
        (cd root && find . | cpio -o -H newc --quiet) | cat "$image/guest.cpio" - >all.cpio
        echo '{{"latest": {{"user-data": "hello from the host", "meta-data": {{"a": "b"}}}}}}' >metadata.json
        cat >vm.json <<END
{{
  "boot-source": {{"kernel_image_path": "$image/vmlinux", "initrd_path": "$PWD/all.cpio", "boot_args": "console=ttyS0 quiet panic=-1"}},
  "machine-config": {{"vcpu_count": 1, "mem_size_mib": 256}},
  "network-interfaces": [{{"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "02:00:00:00:00:01",
    "rx_rate_limiter": {{"bandwidth": {{"size": 10000, "refill_time": 100}}}}}}],
  "mmds-config": {{"network_interfaces": ["eth0"], "version": "V2"}}
}}
END
        cat >inside <<'END'
set -euxo pipefail
busybox=./bin/busybox
$busybox tunctl -t tap0
$busybox ifconfig tap0 10.9.0.1 netmask 255.255.255.0 up
$busybox httpd -p 8080 -h www
./firecracker --no-api --config-file vm.json --metadata metadata.json
echo "host: sum $(sha256sum <www/file)"
END
        unshare --net bash inside
        "#,
        samepage = tests::samepage().display(),
        image = image.display(),
    );
    let outcome = lab_script(Duration::from_secs(300), &script).success();
    let after = |words: &str| {
        let line = outcome.stdout.lines().find_map(|line| line.split_once(words));
        line.unwrap_or_else(|| panic!("no {words:?}: {outcome}")).1.trim().to_owned()
    };
    let without = after("guest: without: ");
    assert!(without.starts_with("HTTP/1.1 401 Unauthorized"), "{without}");
    assert_eq!(after("guest: with: "), "hello from the host");
    assert_eq!(after("guest: list: "), "meta-data/ user-data");
    let sum = after("host: sum ");
    assert_eq!(Some(after("guest: sum ").as_str()), sum.split_whitespace().next(), "{outcome}");
    // 400 kB at 100 kB a second; the bucket was full.
    let seconds: u64 = after("guest: took ").parse().expect("seconds");
    assert!(seconds >= 3, "{seconds} s: the limit was not kept");
}
