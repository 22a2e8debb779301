//! Guests that send anything, and hosts that come and go, from a numbered pseudo-random source.

use splitmix::SplitMix64;

use super::*;

/// The release build runs many (`tests/run`).
const INPUTS: u64 = if cfg!(debug_assertions) { 60 } else { 1000 };

fn hostile(input: u64) -> usize {
    let mut random = SplitMix64::new(input);
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path(2)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (mut hosts, mut packets) = (Vec::new(), 0);
    for step in 0..60 {
        if guest.driver.status() & NEEDS_RESET != 0 || random.draw().is_multiple_of(50) {
            guest.start();
        }
        let port = [0, 1, 2, 1 << 30, (1 << 30) + 1][random.draw() as usize % 5];
        let small = |random: &mut SplitMix64| {
            [0, 1, 4096, u32::MAX, random.draw() as u32][random.draw() as usize % 5]
        };
        let header = Header {
            src_cid: if random.draw().is_multiple_of(20) { random.draw() } else { CID.into() },
            dst_cid: if random.draw().is_multiple_of(20) { random.draw() } else { HOST_CID },
            src_port: GUEST_PORT + (random.draw() % 3) as u32,
            dst_port: port,
            kind: if random.draw().is_multiple_of(20) { random.draw() as u16 } else { STREAM },
            op: (random.draw() % 9) as u16,
            flags: (random.draw() % 4) as u32,
            buf_alloc: small(&mut random),
            fwd_cnt: small(&mut random),
            len: 0,
        };
        let data = vec![step; (random.draw() % 5000) as usize];
        let len = if random.draw().is_multiple_of(10) { random.draw() as u32 } else { data.len() as u32 };
        guest.send_as_it_is(Header { len, ..header }, &data);
        match random.draw() % 6 {
            0 => {
                let mut host = guest.connect();
                let _ =
                    host.write_all(format!("CONNECT {}\nmore", GUEST_PORT + (step % 3) as u32).as_bytes());
                hosts.push(host);
            }
            1 if !hosts.is_empty() => drop(hosts.swap_remove(random.draw() as usize % hosts.len())),
            2 => hosts.extend(listener.accept().map(|(host, _)| host)),
            3 => hosts.iter_mut().for_each(|host| _ = host.write(&[1; 3000])),
            4 => hosts.iter_mut().for_each(|host| {
                host.set_nonblocking(true).unwrap();
                let _ = read(host);
            }),
            _ => {}
        }
        for _ in 0..random.draw() % 8 {
            packets += usize::from(guest.receive().is_some());
        }
    }
    guest.start();
    // Those that have said where to wait for a driver.
    drop(hosts);
    while guest.receive().is_some() {}
    let _ = guest.connected(4096);
    packets
}

#[test]
fn any_packets_are_survived() {
    let packets: usize = (0..INPUTS).map(hostile).sum();
    assert!(packets > 10 * INPUTS as usize, "{packets}");
}
