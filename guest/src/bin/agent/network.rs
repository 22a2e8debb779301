//! Network interfaces, as `ip=` on the kernel's command line says.

use guest::ip::Ip;
use guest::protocol::{Done, ErrorCode, Mac, Reply, Text};

use crate::init::log;
use crate::sys::Errno;
use crate::sys::interfaces::Interfaces;

/// Configures what `cmdline` says; a failure is reported and the rest goes on.
pub(crate) fn start(cmdline: &str) {
    if let Err(error) = Interfaces::open().and_then(|interfaces| interfaces.bring_up("lo")) {
        log(format_args!("lo: {error}"));
    }
    for ip in Ip::all(cmdline) {
        match ip {
            Err(error) => log(format_args!("ip=: {error}")),
            Ok(ip) => {
                if let Err(error) = configure(&ip) {
                    log(format_args!("{}: {error}", ip.device));
                }
            }
        }
    }
}

fn configure(ip: &Ip<'_>) -> Result<(), Errno> {
    let interfaces = Interfaces::open()?;
    interfaces.set_address(ip.device, ip.address)?;
    interfaces.set_netmask(ip.device, ip.netmask)?;
    interfaces.bring_up(ip.device)?;
    ip.gateway.map_or(Ok(()), |gateway| interfaces.add_default_route(gateway))
}

/// Gives interfaces another Ethernet address. Their drivers read it once, when this guest, or the one that it is a copy of, booted.
pub(crate) fn obey(was: Mac, is: Mac) -> Reply {
    let replaced = Interfaces::open().and_then(|interfaces| {
        let replaced = interfaces.replace_address(was.0, is.0);
        interfaces.close();
        replaced
    });
    match replaced {
        Ok(interfaces) => Reply::Ok(Done::Mac { interfaces }),
        Err(error) => {
            Reply::Err { code: ErrorCode::Failed, message: Text::of(format_args!("SIOCSIFHWADDR: {error}")) }
        }
    }
}
