//! Network interfaces: TAPs that are there, missing, in use, made and gone. Each test has a network
//! namespace of its own, and so nothing of this machine's network changes. What passes over them
//! needs Linux guests, in the lab.

use std::time::Duration;

use serde_json::json;
use tests::api::ApiVm;
use tests::lab::lab_script;
use tests::run::Outcome;
use tests::sandbox::Sandbox;
use tests::vm::SOON;
use tests::{require_kvm, require_slabs, require_tool};

use super::power::need_guest;

/// Runs a script in a network namespace of its own, with these functions: `taps` counts TAPs,
/// `refused WORDS ARGUMENTS...` has `samepage run` fail and say the words.
pub(super) fn in_namespace(sandbox: &Sandbox, limit: Duration, script: &str) -> Outcome {
    let functions = r#"
        set -euo pipefail
        cd "$DIR"
        fail() { echo "FAILED: $*" >&2; exit 1; }
        taps() { grep -c "${1:-samepage}" /proc/net/dev || true; }
        until_there() {
            for n in {1..600}; do if [ -S "$1" ]; then return; fi; sleep 0.1; done
            fail "no socket $1"
        }
        refused() {
            words=$1
            shift
            if "$@" 2>refused; then fail "not refused: $*"; fi
            grep -qF -- "$words" refused || fail "$* did not say '$words' but: $(cat refused)"
        }
        run="$SAMEPAGE run --memory 16M --console none"
    "#;
    let script = format!("unshare --net bash --norc -c {}", quoted(&format!("{functions}\n{script}")));
    sandbox.shell(&script).timeout(limit).output()
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// As root only: a namespace takes that, and its TAPs.
macro_rules! require_taps {
    () => {
        require_kvm!();
        let _ = require_tool!("ip");
        if let Some(why) = without_taps() {
            tests::host::skipped(module_path!(), &why);
            return;
        }
    };
}

pub(super) fn without_taps() -> Option<String> {
    let made = Sandbox::new().shell("unshare --net ip tuntap add dev tap0 mode tap").timeout(SOON).output();
    (made.code != Some(0)).then(|| format!("no TAP can be made in a namespace of its own: {}", made.stderr))
}

#[test]
fn what_is_no_tap_is_refused_by_name() {
    require_taps!();
    let sandbox = Sandbox::new();
    let script = r#"
        refused "there is no interface tap0: make it (\`ip tuntap add dev tap0 mode tap user" $run --net tap0
        refused "the interface lo is no TAP" $run --net lo
        refused "cannot be the name of an interface" $run --net "tap 0"
        refused "is no MAC address" $run --net tap0,mac=1
        refused "at most 4" $run --net auto --net auto --net auto --net auto --net auto
        refused "cannot be put on the bridge none" $run --net auto,bridge=none
        [ "$(taps)" = 0 ] || fail "a TAP is left"

        ip tuntap add dev tap0 mode tap user 1
        refused "this user may not use the TAP tap0" setpriv --bounding-set=-net_admin --inh-caps=-net_admin $run --net tap0
        refused "this user may not make a TAP" setpriv --bounding-set=-net_admin --inh-caps=-net_admin $run --net auto
        ip tuntap add dev tap1 mode tap multi_queue
        refused "is no TAP with one queue" $run --net tap1

        $run --net tap0 --control vm.sock 2>notes &
        until_there vm.sock
        grep -qF 'the TAP tap0 is down, so nothing passes' notes || fail "$(cat notes)"
        refused "the TAP tap0 is in use" $run --net tap0
        kill $! && wait $!
        # It was there before, and stays.
        [ "$(taps tap0)" = 1 ] || fail "tap0 is gone"
    "#;
    let outcome = in_namespace(&sandbox, SOON, script);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn a_tap_that_is_made_goes_with_its_vm() {
    require_taps!();
    let sandbox = Sandbox::new();
    let script = r#"
        ip link add br0 type bridge
        $run --net auto --net auto,bridge=br0,mtu=1280 --control vm.sock 2>notes &
        until_there vm.sock
        [ "$(taps)" = 2 ] || fail "$(cat /proc/net/dev)"
        ip link show master br0 | grep -q 'samepage1:.* mtu 1280' || fail "$(ip link)"
        [ "$(ip link show up | grep -c samepage)" = 2 ] || fail "$(ip link)"
        grep -qF 'the TAP samepage0 was made for this VM' notes || fail "$(cat notes)"
        # However it ends.
        kill -KILL $!
        wait $! || true
        for n in {1..100}; do if [ "$(taps)" = 0 ]; then break; fi; sleep 0.1; done
        [ "$(taps)" = 0 ] || fail "$(ip link)"
    "#;
    let outcome = in_namespace(&sandbox, SOON, script);
    assert_eq!(outcome.code, Some(0), "{outcome}");
}

#[test]
fn a_hundred_guests_with_nets_come_and_go_and_leave_no_tap() {
    require_taps!();
    let sandbox = Sandbox::new();
    let script = r#"
        cat >fleet.toml <<'END'
name = "nets"
engine = "off"
[defaults]
memory = "16M"
net = [{ tap = "auto" }]
[[guest]]
name = "g"
count = 100
END
        "$SAMEPAGE" fleet up fleet.toml
        [ "$(taps)" = 100 ] || fail "$(taps) TAPs"
        "$SAMEPAGE" fleet down --now
        for n in {1..100}; do if [ "$(taps)" = 0 ]; then break; fi; sleep 0.1; done
        [ "$(taps)" = 0 ] || fail "$(ip link)"
        # A TAP that is missing is told before anything is started, and a MAC address is one guest's.
        sed -i 's/"auto"/"tap{n}"/; s/count = 100/count = 2/' fleet.toml
        refused "there is no interface tap1" "$SAMEPAGE" fleet up fleet.toml --dry-run
        sed -i 's/"tap{n}"/"auto", mac = "02:00:00:00:00:01"/' fleet.toml
        for dry in "" --dry-run; do
            refused "guests g-0 and g-1 both have the MAC address 02:00:00:00:00:01" "$SAMEPAGE" fleet up fleet.toml $dry
        done
    "#;
    let outcome = in_namespace(&sandbox, SOON * 4, script);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

/// What is captured of a device is its driver's; a TAP and a socket each VM has of its own.
#[test]
fn clones_have_taps_and_sockets_of_their_own() {
    require_slabs!();
    require_taps!();
    let sandbox = Sandbox::new();
    let script = r#"
        cat >fleet.toml <<'END'
name = "nets"
[[guest]]
name = "g"
memory = "16M"
net = [{ tap = "auto" }]
vsock = true
END
        sockets() { find "$SAMEPAGE_RUNTIME_DIR" -name '*.vsock' | wc -l; }
        "$SAMEPAGE" fleet up fleet.toml
        "$SAMEPAGE" clone g --count 3
        [ "$(taps)" = 4 ] || fail "$(taps) TAPs"
        [ "$(sockets)" = 4 ] || fail "$(sockets) sockets"
        "$SAMEPAGE" fleet verify
        "$SAMEPAGE" fleet down --now
        for n in {1..100}; do if [ "$(taps)" = 0 ]; then break; fi; sleep 0.1; done
        [ "$(taps)" = 0 ] || fail "$(ip link)"
    "#;
    let outcome = in_namespace(&sandbox, SOON * 2, script);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

/// Each on a TAP of its own, by number; what cannot be is said, and leaves nothing.
#[test]
fn a_clones_tap_is_nobody_elses() {
    require_slabs!();
    require_taps!();
    let sandbox = Sandbox::new();
    let script = r#"
        for n in 0 1 2 3 4; do ip tuntap add dev "t$n" mode tap; ip link set "t$n" up; done
        ip tuntap add dev other mode tap
        cat >fleet.toml <<'END'
name = "nets"
[defaults]
memory = "16M"
[[guest]]
name = "g"
net = [{ tap = "t{n}", mac = "02:00:00:00:00:01" }]
[[guest]]
name = "single"
net = [{ tap = "other" }]
[[guest]]
name = "f"
count = 2
from = "g"
END
        has() {
            pid=$("$SAMEPAGE" fleet status --json | python3 -c 'import json, sys; print({g["name"]: g["pid"] for g in json.load(sys.stdin)["guests"]}[sys.argv[1]])' "$1")
            for fd in /proc/"$pid"/fdinfo/*; do sed -n 's/^iff:\t//p' "$fd" 2>/dev/null || true; done | sort -u | xargs
        }
        "$SAMEPAGE" fleet up fleet.toml
        [ "$(has g),$(has f-0),$(has f-1)" = "t0,t1,t2" ] || fail "$(has g),$(has f-0),$(has f-1)"
        "$SAMEPAGE" clone g --as c
        [ "$(has c-0)" = t3 ] || fail "$(has c-0)"
        # One is left.
        refused "there is no interface t5" "$SAMEPAGE" clone g --as d --count 2
        refused "guest s-0: the TAP other is another guest's" "$SAMEPAGE" clone single --as s
        refused "2 network interfaces are given, and its origin has 1" "$SAMEPAGE" clone g --as s --net auto --net auto
        refused "both have the MAC address 02:00:00:00:00:02" "$SAMEPAGE" clone g --as s --count 2 --net auto,mac=02:00:00:00:00:02
        refused "both have the MAC address 02:00:00:00:00:01" "$SAMEPAGE" clone g --as s --net auto,mac=02:00:00:00:00:01
        refused "is no option of a network interface" "$SAMEPAGE" clone g --as s --net auto,ip=1
        # One that another program has.
        $run --net t4 --control vm.sock &
        until_there vm.sock
        refused "the TAP t4 is in use: each guest needs one of its own" "$SAMEPAGE" clone g --as s
        kill $! && wait $!
        "$SAMEPAGE" clone g --as d
        "$SAMEPAGE" clone single --as s --count 2 --net auto
        [ "$(has d-0),$(taps)" = "t4,2" ] || fail "$(has d-0),$(taps)"
        names=$("$SAMEPAGE" fleet status --json | python3 -c 'import json, sys; print(*[g["name"] for g in json.load(sys.stdin)["guests"]])')
        [ "$names" = "g single f-0 f-1 c-0 d-0 s-0 s-1" ] || fail "$names"
        "$SAMEPAGE" fleet verify
        "$SAMEPAGE" fleet down --now
    "#;
    let outcome = in_namespace(&sandbox, SOON * 4, script);
    assert_eq!(outcome.code, Some(0), "{outcome}");
    sandbox.assert_clean_within(SOON);
}

#[test]
fn the_api_has_interfaces_as_firecrackers_has() {
    require_kvm!();
    let sandbox = Sandbox::new();
    let vm = ApiVm::start(&sandbox, &[] as &[&str]);
    assert_eq!(vm.get("/vm/config")["network-interfaces"], json!([]));
    let interface =
        |tap: &str| json!({"iface_id": "eth0", "host_dev_name": tap, "guest_mac": "02:00:00:00:00:01"});
    let missing = vm.ask("PUT", "/network-interfaces/eth0", &interface("samepage-none"));
    assert!(missing.fault().contains("there is no interface samepage-none"), "{missing:?}");
    // What is no TAP is known when it is taken.
    vm.put("/network-interfaces/eth0", &interface("lo"));
    assert_eq!(vm.get("/vm/config")["network-interfaces"], json!([interface("lo")]));
    let mut other = interface("lo");
    other["iface_id"] = json!("eth1");
    for (body, said) in [
        (&other, "The MAC address is already in use: 02:00:00:00:00:01, by \"eth0\"."),
        (&json!({"iface_id": "eth1", "host_dev_name": "lo"}), "The TAP is already in use: lo, by \"eth0\"."),
        (&json!({"iface_id": "eth1", "host_dev_name": "lo", "guest_mac": "1"}), "\"1\" is no MAC address"),
        (
            &json!({"iface_id": "eth1", "host_dev_name": "lo", "rx_rate_limiter": {"ops": {"size": 1}}}),
            "missing field `refill_time`",
        ),
        (&interface("lo"), "does not match the id from the body"),
    ] {
        let answer = vm.ask("PUT", "/network-interfaces/eth1", body);
        assert!(answer.fault().contains(said), "{body}: {answer:?}");
    }
    vm.put("/boot-source", &json!({"kernel_image_path": "builtin"}));
    let failed = vm.ask("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
    let known = ["the interface lo is no TAP", "/dev/net/tun"];
    assert!(known.iter().any(|said| failed.fault().contains(said)), "{failed:?}");
    vm.running().kill(rustix::process::Signal::TERM);
    let _ = vm.into_running().wait().success();
    sandbox.assert_clean_within(SOON);
}

/// The sums that stand behind `words` in the guests' consoles.
fn sums<'a>(outcome: &'a Outcome, words: &str) -> Vec<&'a str> {
    let lines = outcome.stdout.lines().filter_map(|line| line.split_once(words));
    // The rates stand there too.
    let is_sum = |word: &&str| word.len() == 64;
    lines.filter_map(|(_, rest)| rest.split_whitespace().next()).filter(is_sum).collect()
}

/// Two Debian guests, merged meanwhile, each on a TAP of its own in a network namespace: each fetches
/// a page and 16 MiB, pings, and sends 16 MiB, with checksums that were not computed on the way.
#[test]
fn lab_debian_guests_are_on_the_network() {
    let image = need_guest();
    let script = format!(
        r#"
        samepage={samepage} image={image}
        mkdir /var/tmp/net && cd /var/tmp/net
        cpio -id --quiet bin/busybox <"$image/guest.cpio"
        mkdir www
        echo hello >www/page
        head -c 16777216 /dev/urandom >www/big
        echo "host: in $(sha256sum <www/big)"
        cat >inside <<'END'
set -euxo pipefail
PATH=$PATH:/var/tmp/net/bin
for n in 0 1; do
    busybox tunctl -t "tap$n"
    busybox ifconfig "tap$n" "10.9.$n.1" netmask 255.255.255.0 up
    # It closes when the guest does, and not before.
    busybox nc -l -p "500$n" < <(sleep 600) >/dev/null &
    busybox nc -l -p "501$n" < <(sleep 600) | sha256sum >"sum$n" &
done
busybox httpd -p 8080 -h www
"$samepage" fleet up fleet.toml
logs=$(find "$SAMEPAGE_RUNTIME_DIR" -name 'g?.log')
for log in $logs; do
    for try in $(seq 250); do if grep -q 'net: done' "$log"; then break; fi; sleep 1; done
    grep 'net:' "$log"
done
"$samepage" fleet status
"$samepage" fleet down --now
grep -H . sum? | sed 's/^/host: out /'
END
        export samepage SAMEPAGE_RUNTIME_DIR=/run/samepage-net
        cat >fleet.toml <<END
name = "nets"
[defaults]
memory = "256M"
kernel = "$image/vmlinux"
initrd = "$image/guest.cpio"
[[guest]]
name = "g0"
net = [{{ tap = "tap0" }}]
cmdline = "console=ttyS0 quiet panic=-1 do=net-10.9.0.1-10.9.0.2"
[[guest]]
name = "g1"
net = [{{ tap = "tap1", mtu = 1280 }}]
cmdline = "console=ttyS0 quiet panic=-1 do=net-10.9.1.1-10.9.1.2"
END
        unshare --net bash inside
        "#,
        samepage = tests::samepage().display(),
        image = image.display(),
    );
    let outcome = lab_script(Duration::from_secs(420), &script).success();
    assert_eq!(outcome.stdout.matches("net: page hello").count(), 2, "{outcome}");
    assert_eq!(outcome.stdout.matches("50 packets received, 0% packet loss").count(), 2, "{outcome}");
    let (there, sent) = (sums(&outcome, "host: in "), sums(&outcome, "net: in "));
    assert!(there.len() == 1 && sent == [there[0], there[0]], "{outcome}");
    let mut arrived: Vec<_> = outcome
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix("host: out ")?.split_once(':')?.1.split_whitespace().next())
        .collect();
    let mut sent = sums(&outcome, "net: out ");
    arrived.sort_unstable();
    sent.sort_unstable();
    assert!(sent.len() == 2 && arrived == sent, "{outcome}");
    let wrong: Vec<_> =
        outcome.stdout.lines().filter(|line| line.contains("_errors:") && !line.ends_with(":0")).collect();
    assert!(wrong.is_empty(), "{outcome}");
    eprintln!("{}", outcome.stdout);
}

/// A Debian guest's programs and the host's, over vsock: 8 MiB to the host, the same back from there, and an echo in the guest. Perl
/// does both ends: it is on every Debian, and needs no module for that.
#[test]
fn lab_a_debian_guest_has_sockets() {
    let image = need_guest();
    let script = format!(
        r#"
        samepage={samepage} image={image}
        mkdir /var/tmp/vsock && cd /var/tmp/vsock
        mkdir -p root/bin root/etc
        perl=$(readlink -f "$(command -v perl)")
        cp "$perl" root/bin/perl
        for library in $(ldd "$perl" | grep -o '/[^ ]*'); do install -D "$library" "root$library"; done
        cat >root/etc/common.pl <<'END'
our $data = join("", map {{ pack "N", $_ }} 1 .. 16381) x 128;
sub all {{ my ($from, $got) = (shift, ""); while (sysread $from, $got, 65536, length $got) {{ }} $got }}
sub give {{ my ($to, $text) = @_; for (my $n = 0; $n < length $text;) {{ $n += syswrite($to, $text, 100000, $n) || die "write: $!" }} }}
1;
END
        cat >root/etc/guest.pl <<'END'
require "/etc/common.pl";
sub address {{ pack "SSLLx4", 40, 0, @_ }}
socket my $listener, 40, 1, 0 or die "socket: $!";
bind $listener, address(1024, 0xffffffff) or die "bind: $!";
listen $listener, 5;
socket my $none, 40, 1, 0;
print connect($none, address(99, 2)) ? "connected to none\n" : "none: $!\n";
socket my $host, 40, 1, 0;
connect $host, address(52, 2) or die "connect: $!";
give($host, $data);
shutdown $host, 1;
print all($host) eq $data ? "back: all\n" : "back: wrong\n";
accept my $client, $listener or die "accept: $!";
give($client, all($client));
close $client;
END
        cat >root/etc/act <<'END'
#!/bin/busybox sh
export PATH=/bin
perl /etc/guest.pl 2>&1 | sed 's/^/guest: /'
poweroff
END
        chmod 755 root/etc/act
        (cd root && find . | cpio -o -H newc --quiet) | cat "$image/guest.cpio" - >all.cpio
        cat >host.pl <<'END'
require "./root/etc/common.pl";
sub address {{ pack "Sa108", 1, shift }}
alarm 200;
socket my $listener, 1, 1, 0 or die "socket: $!";
bind $listener, address("v.sock_52") or die "bind: $!";
listen $listener, 5;
accept my $guest, $listener or die "accept: $!";
my $got = all($guest);
print "host: ", $got eq $data ? "all" : "wrong", "\n";
give($guest, $got);
close $guest;
socket my $echo, 1, 1, 0;
connect $echo, address("v.sock") or die "connect: $!";
give($echo, "CONNECT 1024\n");
my $ok = "";
while ($ok !~ /\n/) {{ sysread $echo, $ok, 1, length $ok or die "no OK" }}
print "host: $ok";
give($echo, substr $data, 0, 60000);
shutdown $echo, 1;
print "echo: ", all($echo) eq substr($data, 0, 60000) ? "all" : "wrong", "\n";
END
        perl host.pl &
        until [ -e v.sock_52 ]; do sleep 0.1; done
        "$samepage" run --memory 256M --kernel "$image/vmlinux" --initrd all.cpio --vsock cid=3,path=v.sock
        wait $!
        [ ! -e v.sock ]
        "#,
        samepage = tests::samepage().display(),
        image = image.display(),
    );
    let outcome = lab_script(Duration::from_secs(300), &script).success();
    for said in
        ["guest: none: Connection reset by peer", "guest: back: all", "host: all", "host: OK ", "echo: all"]
    {
        assert!(outcome.stdout.contains(said), "no {said:?}: {outcome}");
    }
}
