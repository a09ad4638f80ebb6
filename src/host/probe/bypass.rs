//! Probes beside the rules of this host.
//!
//! With `local_traffic` the rules in OUTPUT balance connections of this host, and
//! refuse them while a pool is empty. A probe of a backend on a balanced port is
//! such a connection: another backend would answer it, or nobody ever again.
//! Nothing in a packet tells a probe from other connections without a rule or a
//! mark. But the kernel asks the rules only for a connection that is not in its
//! connection table yet. So the probe's entry is made first, from an address and
//! a port that are bound for it, as one that keeps its addresses and was answered
//! already. Seen on Linux 6.18 with iptables 1.8.9, both variants, both families:
//! the rules of nat are not asked, not even counted, and `--ctstate NEW` does not
//! match.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::net::{bind, connect, getsockname, socket_with};

use super::{ProbeFailure, connection};
use crate::host::conntrack;
use crate::host::netlink::{Socket, Subsystem};

/// The ports that are tried. Each may belong to an earlier connection that is in
/// the table for some time yet.
const PORTS: usize = 8;

/// Makes the entries.
pub(super) struct Bypass {
    netlink: Socket,
}

impl Bypass {
    /// # Errors
    /// When the kernel takes no entries: without the capability `CAP_NET_ADMIN`, or
    /// without the module `nf_conntrack_netlink`.
    pub(super) fn open() -> io::Result<Self> {
        let mut netlink = Socket::open(Subsystem::Netfilter)?;
        // An entry that nobody uses tells if the kernel takes them.
        let nobody = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        conntrack::enter(&mut netlink, nobody, nobody, 1)?;
        Ok(Self { netlink })
    }

    /// A bound socket whose connection has its entry.
    pub(super) fn socket(
        &mut self,
        to: SocketAddr,
        timeout: Duration,
    ) -> Result<OwnedFd, ProbeFailure> {
        let seconds = u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX);
        for _ in 0..PORTS {
            let (socket, from) = bound(to).map_err(|error| ProbeFailure::of(error, timeout))?;
            let entered = conntrack::enter(&mut self.netlink, from, to, seconds.saturating_add(2));
            match entered.map_err(|error| (Errno::from_io_error(&error), error)) {
                Ok(()) => return Ok(socket),
                // An earlier connection of this port, and of unknown addresses.
                Err((Some(Errno::EXIST), _)) => {}
                Err((_, error)) => return Err(ProbeFailure::local(error)),
            }
        }
        Err(ProbeFailure::local(Errno::ADDRINUSE))
    }
}

/// A socket with an address and a port of its own.
fn bound(to: SocketAddr) -> Result<(OwnedFd, SocketAddr), Errno> {
    let socket = connection::socket(to)?;
    bind(&socket, &source(to)?)?;
    let from = local_address(&socket)?;
    Ok((socket, from))
}

/// The address that the kernel would take to connect to another, with no port.
fn source(to: SocketAddr) -> Result<SocketAddr, Errno> {
    let family = match to {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let finder = socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    connect(&finder, &to)?;
    let mut source = local_address(&finder)?;
    source.set_port(0);
    Ok(source)
}

fn local_address(socket: impl AsFd) -> Result<SocketAddr, Errno> {
    let address = SocketAddr::try_from(getsockname(socket)?);
    address.map_err(|_| Errno::AFNOSUPPORT)
}
