//! Entries of the kernel's connection table.

use std::net::IpAddr;

/// A connection with ports in the kernel's connection table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConntrackEntry {
    /// IANA's number of the protocol.
    pub protocol: u8,
    /// The address of the client.
    pub source: IpAddr,
    /// The port of the client.
    pub source_port: u16,
    /// The address that the client sent to, before DNAT.
    pub destination: IpAddr,
    /// The port that the client sent to, before DNAT.
    pub port: u16,
    /// The address and port that answer: after DNAT those of the backend.
    pub reply_source: (IpAddr, u16),
    /// True for a TCP connection that has ended; the kernel keeps its entry for a while.
    pub is_closed: bool,
}
