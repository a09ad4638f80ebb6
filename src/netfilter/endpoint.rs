//! Addresses with an optional port.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use super::Family;

/// An address with a port, or without one where packets keep theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// The address.
    pub address: IpAddr,
    /// The port; `None` keeps the port of the packet.
    pub port: Option<u16>,
}

impl Endpoint {
    /// The family of the address.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.address)
    }

    /// Reads `10.9.0.1`, `10.9.0.1:80`, `fd00::1` or `[fd00::1]:80`, without a
    /// scope.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let has_scope = |socket: &SocketAddr| match socket {
            SocketAddr::V4(_) => false,
            SocketAddr::V6(socket) => socket.scope_id() != 0,
        };
        let (address, port) = match text.parse::<SocketAddr>() {
            Ok(socket) if has_scope(&socket) => return None,
            Ok(socket) => (socket.ip(), Some(socket.port())),
            Err(_) => (text.parse().ok()?, None),
        };
        Some(Self { address, port })
    }
}

/// `10.9.0.1`, `10.9.0.1:80`, `fd00::1` or `[fd00::1]:80`
impl fmt::Display for Endpoint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.address, self.port) {
            (address, None) => write!(out, "{address}"),
            (IpAddr::V4(address), Some(port)) => write!(out, "{address}:{port}"),
            (IpAddr::V6(address), Some(port)) => write!(out, "[{address}]:{port}"),
        }
    }
}
