//! The server of metrics.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread;

use rustix::fs::Mode;
use wire::http::{self, Listener};

use super::http::{Page, RULES, Scrapes};
use crate::HostError;
use crate::spec::MetricsAddress;
use os::SocketFile;

/// An address that is taken, and not yet served.
pub struct Bound {
    listener: Listener,
    file: Option<SocketFile>,
    address: MetricsAddress,
}

/// Serves metrics until it is dropped; then the address is free again.
pub struct Server {
    #[expect(dead_code, reason = "held until nothing is served any more")]
    server: http::Server,
    /// It goes after the server.
    #[expect(dead_code, reason = "held until nothing is served any more")]
    file: Option<SocketFile>,
}

impl Server {
    /// Takes the address, so that a mistake is known before anything else is begun.
    ///
    /// # Errors
    /// It is in use, not of this host, or not permitted.
    pub fn bind(address: &MetricsAddress) -> Result<Bound, HostError> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => HostError::MetricsTaken { address: address.clone() },
            _ => HostError::Metrics { address: address.clone(), source },
        };
        let (listener, file) = bind(address).map_err(failed)?;
        Ok(Bound { listener, file, address: address.clone() })
    }

    /// Answers its clients with `page`.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(bound: Bound, page: Arc<Page>) -> Result<Self, HostError> {
        let Bound { listener, file, address } = bound;
        let thread = thread::Builder::new().name("metrics".into());
        let server = http::Server::start(thread, listener, RULES, Scrapes(page))
            .map_err(|source| HostError::Metrics { address, source })?;
        Ok(Self { server, file })
    }
}

fn bind(address: &MetricsAddress) -> io::Result<(Listener, Option<SocketFile>)> {
    match address {
        MetricsAddress::Tcp(address) => {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok((Listener::Tcp(listener), None))
        }
        MetricsAddress::Unix(path) => {
            let (listener, file) = SocketFile::stream(path, Mode::RUSR | Mode::WUSR)?;
            Ok((Listener::Unix(listener), Some(file)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::http::MAX_CLIENTS;
    use std::fs;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::time::Duration;

    fn server(address: &MetricsAddress) -> Result<Server, HostError> {
        Server::start(Server::bind(address)?, Arc::new(|_| "# EOF\n".into()))
    }

    fn scrape(mut stream: impl Read + Write) -> String {
        // A client that is turned away need not be able to ask.
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    /// A port of this host that was free just now.
    fn free() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
    }

    #[test]
    fn an_address_is_had_by_one_at_a_time() {
        let address = MetricsAddress::Tcp(free());
        let MetricsAddress::Tcp(socket) = address else { return };
        for _ in 0..2 {
            let first = server(&address).unwrap();
            assert!(scrape(TcpStream::connect(socket).unwrap()).ends_with("# EOF\n"));
            let error = server(&address).err().unwrap().to_string();
            assert!(error.contains(&address.to_string()) && error.contains("taken"), "{error}");
            drop(first);
        }
        assert!(TcpStream::connect(socket).is_err());
    }

    #[test]
    fn a_socket_that_was_left_is_no_hindrance_and_a_file_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock");
        // As a killed daemon leaves it.
        drop(UnixListener::bind(&path).unwrap());
        let address = MetricsAddress::Unix(path.clone());
        let first = server(&address).unwrap();
        assert!(scrape(UnixStream::connect(&path).unwrap()).ends_with("# EOF\n"));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(server(&address).is_err());
        assert!(scrape(UnixStream::connect(&path).unwrap()).ends_with("# EOF\n"));
        drop(first);
        assert!(!path.exists());
        fs::write(&path, "mine").unwrap();
        assert!(server(&address).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[test]
    fn one_client_too_many_is_turned_away_and_the_rest_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock");
        let _server = server(&MetricsAddress::Unix(path.clone())).unwrap();
        // They connect, and ask only later.
        let waiting: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&path).unwrap()).collect();
        let mut further = String::new();
        let _ = UnixStream::connect(&path).unwrap().read_to_string(&mut further);
        assert!(further.starts_with("HTTP/1.1 503 "), "{further}");
        for client in waiting {
            assert!(scrape(client).ends_with("# EOF\n"));
        }
        // Their places are free again, as soon as their threads have seen that they disconnected.
        let mut again = String::new();
        for _ in 0..100 {
            again = scrape(UnixStream::connect(&path).unwrap());
            if again.ends_with("# EOF\n") {
                return;
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("{again}");
    }
}
