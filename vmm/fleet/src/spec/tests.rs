//! Fleet files, right and wrong.

use std::path::PathBuf;

use machine::{Overlay, Unpack};
use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<FleetSpec, String> {
    FleetSpec::parse(text, Path::new("/fleets")).map_err(|e| match std::error::Error::source(&e) {
        Some(source) => format!("{e}: {source}"),
        None => e.to_string(),
    })
}

#[test]
fn defaults_count_and_paths() {
    let text = "name = 'f'\n[defaults]\nmemory = '64M'\nkernel = 'k'\n[[guest]]\nname = 'a'\ncount = 2\n\
                [[guest]]\nname = 'b'\nmemory = '1G'\nfill = { zero = 50, unique = 50 }\n";
    let fleet = parse(text).unwrap();
    let names: Vec<_> = fleet.guests.iter().map(|g| g.name.as_str()).collect();
    assert_eq!(names, ["a-0", "a-1", "b"]);
    assert_eq!(fleet.guests[2].vm.memory_bytes, 1 << 30);
    assert_eq!(fleet.guests[0].vm.kernel.as_deref(), Some(Path::new("/fleets/k")));
    assert_eq!((fleet.engine, fleet.merge), (EngineName::Slab, Tuning::default()));
    assert!(fleet.guests.iter().all(|guest| guest.domain == "f"));
    assert_eq!((fleet.metrics, fleet.pool), (None, 0));
    assert_eq!(parse("name = 'f'\npool = 1024\n[[guest]]\nname = 'a'").unwrap().pool, 1024);
    let error = parse("name = 'f'\npool = 1025\n[[guest]]\nname = 'a'").unwrap_err();
    assert!(error.contains("pool = 1025 is not possible: expected 0 to 1024"), "{error}");
    let served = parse("name = 'f'\nmetrics = 'unix:m'\n[[guest]]\nname = 'a'").unwrap();
    assert_eq!(served.metrics, Some(MetricsAddress::Unix("/fleets/m".into())));
}

#[test]
fn guests_go_on_from_others_of_the_file() {
    let text = "name = 'f'\n[defaults]\nmemory = '64M'\n[[guest]]\nname = 'c'\ncount = 2\nfrom = 'web'\n\
                [[guest]]\nname = 'web'\nmemory = '32M'\ndomain = 'd'\nfill = { unique = 100 }\n";
    let fleet = parse(text).unwrap();
    let [a, b, web] = &fleet.guests[..] else { panic!("{fleet:?}") };
    assert_eq!((&*a.name, &*b.name, &*web.name), ("c-0", "c-1", "web"));
    assert_eq!((a.clone_of.as_deref(), web.clone_of.as_deref()), (Some("web"), None));
    assert_eq!((a.vm.memory_bytes, &*a.domain, a.fill), (32 << 20, "d", web.fill));
    for (key, said) in [
        ("from = 'nosuch'", "guest c-0: from = \"nosuch\", which is no guest of this file"),
        ("from = 'c-1'", "which is a clone itself"),
        (
            "from = 'web'\nmemory = '64M'",
            "guest c: it has `from`, and is as its origin is: `memory` is not possible",
        ),
        ("from = 'web'\ndomain = 'e'", "`domain` is not possible"),
    ] {
        let error = parse(&text.replace("from = 'web'", key)).unwrap_err();
        assert!(error.contains(said), "{key}: {error}");
    }
    let writes = text.replace("domain = 'd'", "drives = [{ path = 'a.img' }]");
    assert!(parse(&writes).unwrap_err().contains("a drive that it may write"));
    let defaults = text.replace("memory = '64M'", "from = 'web'");
    assert!(parse(&defaults).unwrap_err().contains("unknown field `from`"));
}

#[test]
fn clones_of_a_file_have_taps_of_their_own() {
    let text = "name = 'f'\n[[guest]]\nname = 'web'\nnet = [{ tap = 't{n}' }]\n[[guest]]\nname = 'c'\ncount = 2\nfrom = 'web'\n\
                [[guest]]\nname = 'd'\ncount = 2\nfrom = 'web'\nnet = [{ tap = 'd{n}' }]\n";
    let fleet = parse(text).unwrap();
    let of = |guest: &GuestSpec| guest.vm.net[0].tap.clone().unwrap();
    assert_eq!(fleet.guests.iter().map(of).collect::<Vec<_>>(), ["t0", "t1", "t2", "d0", "d1"]);
    let macs: BTreeSet<_> =
        fleet.guests.iter().map(|guest| guest.vm.net[0].mac.unwrap().to_string()).collect();
    assert_eq!(macs.len(), 5);
    for (net, said) in [
        (
            "[{ tap = 't0' }, { tap = 'a' }]",
            "guest d-0: 2 network interfaces are given, and its origin has 1",
        ),
        ("[{ tap = 't0' }]", "guests web and d-0 both have the TAP t0"),
    ] {
        let error = parse(&text.replace("[{ tap = 'd{n}' }]", net)).unwrap_err();
        assert!(error.contains(said), "{net}: {error}");
    }
    let error = parse(&text.replace("'t{n}'", "'t'")).unwrap_err();
    assert!(error.contains("guest c-0: the TAP t is another guest's"), "{error}");
}

#[test]
fn a_guest_may_decompress_its_own_kernel() {
    // The old name of the key still works, and either name overrides the other in `[defaults]`.
    let text = "name = 'f'\n[defaults]\nkernel = 'k'\nunpack = 'guest'\n[[guest]]\nname = 'a'\n\
                [[guest]]\nname = 'b'\nkernel_decompress = 'host'\n";
    let fleet = parse(text).unwrap();
    assert_eq!(fleet.guests.iter().map(|g| g.vm.unpack).collect::<Vec<_>>(), [Unpack::Guest, Unpack::Host]);
    let usual = parse("name = 'f'\n[[guest]]\nname = 'a'").unwrap();
    assert_eq!(usual.guests[0].vm.unpack, Unpack::Host);
    assert!(parse(&text.replace("'host'", "'qemu'")).unwrap_err().contains("unknown variant `qemu`"));
}

#[test]
fn domains_and_what_merging_may_cost() {
    let text = "name = 'f'\nmerge = { cpu_percent = 20, min_run_pages = 8 }\n[defaults]\ndomain = 'x'\n\
                [[guest]]\nname = 'a'\n[[guest]]\nname = 'b'\ndomain = 'y'";
    let fleet = parse(text).unwrap();
    assert_eq!(fleet.guests.iter().map(|g| g.domain.as_str()).collect::<Vec<_>>(), ["x", "y"]);
    let merge = Tuning { cpu_percent: Some(20), min_run_pages: 8, ..Tuning::default() };
    assert_eq!(fleet.merge, merge);
}

#[test]
fn drives_are_where_the_file_is_and_each_guest_may_have_its_own() {
    let text = "name = 'f'\n[defaults]\ndrives = [{ path = 'a.img', read_only = true }]\n[[guest]]\nname = 'a'\ncount = 2\n\
                [[guest]]\nname = 'b'\ndrives = [{ path = '/b.img' }, { path = 'a.img', read_only = true }]\n[[guest]]\nname = 'c'\ndrives = []";
    let fleet = parse(text).unwrap();
    let drives: Vec<Vec<(&Path, bool)>> = fleet
        .guests
        .iter()
        .map(|g| g.vm.drives.iter().map(|d| (d.path.as_path(), d.read_only)).collect())
        .collect();
    let (common, own) = ((Path::new("/fleets/a.img"), true), (Path::new("/b.img"), false));
    assert_eq!(drives, [vec![common], vec![common], vec![own, common], vec![]]);
}

#[test]
fn many_guests_have_one_drive_by_overlays_or_by_numbers() {
    let text = "name = 'f'\n[[guest]]\nname = 'a'\ncount = 2\ndrives = [{ path = 'base', overlay = true }, \
                { path = 'base', overlay = 'top-{n}' }, { path = '{n}.img' }, { path = 'base', overlay = false, read_only = true }]";
    let fleet = parse(text).unwrap();
    for (n, guest) in fleet.guests.iter().enumerate() {
        let drives: Vec<_> = guest.vm.drives.iter().map(|d| (d.path.clone(), d.overlay.clone())).collect();
        let base = || PathBuf::from("/fleets/base");
        let top = Overlay::Kept(format!("/fleets/top-{n}").into());
        let own = PathBuf::from(format!("/fleets/{n}.img"));
        let expected = [(base(), Some(Overlay::Temporary)), (base(), Some(top)), (own, None), (base(), None)];
        assert_eq!(drives, expected);
    }
}

#[test]
fn each_guest_has_its_own_interfaces() {
    let text = "name = 'f'\n[defaults]\nnet = [{ tap = 'tap{n}', mtu = 1280 }, { tap = 'auto', bridge = 'br0' }]\n[[guest]]\n\
                name = 'a'\ncount = 2\n[[guest]]\nname = 'b'\nnet = []";
    let fleet = parse(text).unwrap();
    let nets: Vec<_> = fleet.guests.iter().map(|guest| &guest.vm.net).collect();
    assert_eq!((nets[0][0].tap.as_deref(), nets[1][0].tap.as_deref()), (Some("tap0"), Some("tap1")));
    assert_eq!((nets[0][1].tap.as_deref(), nets[0][1].bridge.as_deref()), (None, Some("br0")));
    assert_eq!((nets[0][0].mtu, nets[2].len()), (Some(1280), 0));
    let macs: BTreeSet<_> =
        nets.iter().flat_map(|net| net.iter()).filter_map(|i| i.mac.map(|m| m.0)).collect();
    assert_eq!(macs.len(), 4);
    assert_eq!(parse(text).unwrap(), fleet);
}

#[test]
fn every_mistake_is_named() {
    for (text, expected) in [
        ("name = 'f'", "no guests"),
        ("name = 'f'\n[[guest]]\nname = 'a'\n[[guest]]\nname = 'a'", "two guests are called \"a\""),
        ("name = 'f'\nnme = 1", "unknown field `nme`"),
        ("name = 'f'\nname = 'g'\n[[guest]]\nname = 'a'", "duplicate key"),
        ("name = 'f'\n[[guest]]\nname = 'a'\nmemry = '1G'", "unknown field `memry`"),
        ("name = 'f'\nmetrics = ':9464'\n[[guest]]\nname = 'a'", "\":9464\" is no address"),
        ("name = '../f'\n[[guest]]\nname = 'a'", "no name"),
        ("name = 'f'\n[[guest]]\nname = 'a'\nmemory = '0'", "memory"),
        ("name = 'f'\n[[guest]]\nname = 'a'\ncpus = 33", "33 vCPUs"),
        ("name = 'f'\n[[guest]]\nname = 'a'\nready_seconds = 0", "expected 1 to 86400"),
        ("name = 'f'\n[[guest]]\nname = 'a'\nfill = { zero = 99 }", "make 99"),
        ("name = 'f'\n[[guest]]\nname = 'a'\ninitrd = 'i'", "needs a kernel"),
        (
            "name = 'f'\nengine = 'ksm'\n[[guest]]\nname = 'a'\ndomain = 'x'\n[[guest]]\nname = 'b'",
            "cannot keep the domains f, x apart",
        ),
        ("name = 'f'\n[[guest]]\nname = 'a'\ndomain = 'x/y'", "no name"),
        ("name = 'f'\n[[guest]]\nname = 'a'\ndrives = [{ file = 'x' }]", "unknown field `file`"),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ndrives = [{path='1'},{path='2'},{path='3'},{path='4'},{path='5'}]",
            "5 drives are not possible: expected at most 4",
        ),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ncount = 2\ndrives = [{ path = 'x' }]",
            "guests a-0 and a-1 both have the drive /fleets/x",
        ),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ncount = 2\ndrives = [{ path = 'x', overlay = 'y' }]",
            "guests a-0 and a-1 both have the drive /fleets/y",
        ),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ndrives = [{ path = 'x', overlay = 'x' }]",
            "guests a and a both have the drive /fleets/x",
        ),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ndrives = [{ path = 'x', overlay = true, read_only = true }]",
            "the drive /fleets/x has read_only and overlay: expected one of them",
        ),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ndrives = [{ path = 'x', overlay = 3 }]",
            "true, or the path of a file for what the guest writes",
        ),
        (
            "name = 'f'\n[defaults]\ndrives = [{ path = 'x', read_only = true }]\n[[guest]]\nname = 'a'\n[[guest]]\nname = 'b'\n\
             drives = [{ path = 'x' }]",
            "guests a and b both have the drive",
        ),
        ("name = 'f'\n[[guest]]\nname = 'a'\nnet = [{ mac = 'x' }]", "missing field `tap`"),
        ("name = 'f'\n[[guest]]\nname = 'a'\nnet = [{ tap = 't', ip = 'x' }]", "unknown field `ip`"),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\nnet = [{ tap = 'a b' }]",
            "guest a: net: \"a b\" cannot be the name",
        ),
        ("name = 'f'\n[[guest]]\nname = 'a'\nnet = [{ tap = 't', mac = 'x' }]", "\"x\" is no MAC address"),
        ("name = 'f'\n[[guest]]\nname = 'a'\nnet = [{ tap = 't', mtu = 9 }]", "MTU of \"9\""),
        ("name = 'f'\n[[guest]]\nname = 'a'\nnet = [{ tap = 't', bridge = 'b' }]", "bridge= is for auto"),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ncount = 2\nnet = [{ tap = 't' }]",
            "guests a-0 and a-1 both have the TAP t",
        ),
        (
            "name = 'f'\n[[guest]]\nname = 'a'\ncount = 2\nnet = [{ tap = 't{n}', mac = '02:00:00:00:00:01' }]",
            "guests a-0 and a-1 both have the MAC address 02:00:00:00:00:01",
        ),
        ("name = 'f'\nopen = { domains = [{ domain = 'a' }] }", "neither uid nor cgroup"),
        ("name = 'f'\nopen = { domains = [{ uid = 1, domain = 'a/b' }] }", "no name"),
        ("name = 'f'\nopen = { domains = [{ cgroup = 'x', domain = 'a' }] }", "\"x\" is no control group"),
        ("name = 'f'\nengine = 'ksm'\n[open]", "expected engine \"slab\""),
        ("name = 'f'\nopen = { uid = 1 }", "unknown field `uid`"),
        ("name = 'f'\n[defaults]\nname = 'a'\n[[guest]]\nname = 'b'", "unknown field `name`"),
        ("name = 'f'\n[defaults]\ncount = 2\n[[guest]]\nname = 'b'", "unknown field `count`"),
        ("name = 'f'\n[[guest]]\ncpus = 1", "missing field `name`"),
        ("name = 'f'\nmerge = { cpu = 1 }\n[[guest]]\nname = 'a'", "unknown field `cpu`"),
    ] {
        let error = parse(text).unwrap_err();
        assert!(error.contains(expected), "{text:?} gave {error:?}, expected {expected:?}");
    }
}

proptest! {
    #[test]
    fn rubbish_never_panics(text in ".{0,200}") {
        let _ = parse(&text);
    }
}
