//! Facts about this host from the kernel's files.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::netlink::{self, Message, Socket, Subsystem, attribute};
use crate::netfilter::{Family, Protocol};

/// Properties of a host that a request may depend on.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The addresses of the question that are on an interface of this host.
    pub own: Vec<IpAddr>,
    /// The SSH connection that this program runs over.
    pub ssh: Option<Ssh>,
    /// The interfaces that accept packets to 127.0.0.0/8 from outside; `all`
    /// stands for all of them.
    pub route_localnet: Vec<String>,
    /// The families that at least one interface forwards.
    pub forwarding_somewhere: BTreeSet<Family>,
    /// The protocols of the question whose connections the kernel does not track,
    /// although it tracks others.
    pub untracked: BTreeSet<Protocol>,
    /// The addresses of the question to which this host has no route.
    pub unrouted: Vec<IpAddr>,
}

/// The facts to find out; a usual request needs few.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Questions {
    /// Addresses that may be the host's own.
    pub addresses: Vec<IpAddr>,
    /// Find the SSH connection that this program runs over.
    pub ssh: bool,
    /// Find the interfaces with `route_localnet`.
    pub route_localnet: bool,
    /// Find the families that at least one interface forwards.
    pub forwarding: bool,
    /// Find out if connections of these protocols are tracked.
    pub tracking: BTreeSet<Protocol>,
    /// Addresses to which there may be no route.
    pub routes: Vec<IpAddr>,
}

impl Questions {
    /// Asks only if connections of the protocols are tracked.
    #[must_use]
    pub fn of_tracking(protocols: impl IntoIterator<Item = Protocol>) -> Self {
        Self {
            tracking: protocols.into_iter().collect(),
            ..Self::default()
        }
    }
}

/// An SSH connection to this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ssh {
    /// The address of the client.
    pub client: IpAddr,
    /// The address of this host.
    pub server: IpAddr,
    /// The port of this host.
    pub port: u16,
}

/// The sysctl that switches a family's forwarding.
#[must_use]
pub fn forwarding_sysctl(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "net.ipv4.ip_forward",
        Family::Ipv6 => "net.ipv6.conf.all.forwarding",
    }
}

/// The answers.
pub fn facts(questions: &Questions) -> Facts {
    let forwards = |family: &Family| by_interface(*family).iter().any(|(_, on)| *on);
    let families = Family::BOTH.into_iter().filter(|_| questions.forwarding);
    let tracking = questions.tracking.iter().copied();
    Facts {
        own: own_addresses(&questions.addresses),
        ssh: questions.ssh.then(ssh).flatten(),
        route_localnet: match questions.route_localnet {
            true => route_localnet(),
            false => Vec::new(),
        },
        forwarding_somewhere: families.filter(forwards).collect(),
        untracked: tracking.filter(|one| is_untracked(*one)).collect(),
        unrouted: unrouted(&questions.routes),
    }
}

/// A kernel without a tracker for the protocol has no setting of it either. TCP
/// and UDP cannot be left out. Before connections are tracked at all, which may
/// begin with the first rule in the nat table, nothing is known.
fn is_untracked(protocol: Protocol) -> bool {
    let of_protocol = match protocol {
        Protocol::Tcp | Protocol::Udp => return false,
        Protocol::Sctp => "nf_conntrack_sctp_timeout_established",
        Protocol::Dccp => "nf_conntrack_dccp_loose",
    };
    let settings = Path::new("/proc/sys/net/netfilter");
    settings.join("nf_conntrack_max").exists() && !settings.join(of_protocol).exists()
}

/// Returns true if a family is forwarded; `None` if that cannot be read.
pub fn forwarding(family: Family) -> Option<bool> {
    is_on(&sysctl(family))
}

/// Switches forwarding, of all interfaces. Returns how it was set for each.
///
/// # Errors
/// When the kernel's file cannot be written.
pub fn set_forwarding(family: Family, on: bool) -> io::Result<Vec<(PathBuf, bool)>> {
    let was = by_interface(family);
    fs::write(sysctl(family), digit(on))?;
    Ok(was)
}

/// Sets interfaces as they were.
///
/// # Errors
/// When one of the kernel's files cannot be written.
pub fn set_interfaces(settings: &[(PathBuf, bool)]) -> io::Result<()> {
    settings
        .iter()
        .try_for_each(|(path, on)| fs::write(path, digit(*on)))
}

fn digit(on: bool) -> &'static str {
    if on { "1\n" } else { "0\n" }
}

fn sysctl(family: Family) -> PathBuf {
    Path::new("/proc/sys").join(forwarding_sysctl(family).replace('.', "/"))
}

fn is_on(path: &Path) -> Option<bool> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim() != "0")
}

/// The setting of each interface, but for those that stand for all.
fn by_interface(family: Family) -> Vec<(PathBuf, bool)> {
    let directory = Path::new("/proc/sys/net")
        .join(family.as_str())
        .join("conf");
    let names = interfaces(&directory).into_iter();
    let path = names.map(|name| directory.join(name).join("forwarding"));
    path.filter_map(|path| Some((path.clone(), is_on(&path)?)))
        .collect()
}

fn interfaces(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name != "default" && name != "all")
        .collect()
}

/// The addresses of the question that are on an interface of this host.
fn own_addresses(asked: &[IpAddr]) -> Vec<IpAddr> {
    let families = Family::BOTH.into_iter();
    let asked_of = |family: &Family| asked.iter().any(|address| Family::of(*address) == *family);
    let own: HashSet<IpAddr> = families
        .filter(asked_of)
        .flat_map(|family| addresses(family).unwrap_or_default())
        .collect();
    asked
        .iter()
        .filter(|address| own.contains(address))
        .copied()
        .collect()
}

/// The addresses of all interfaces, by `linux/if_addr.h`: `IFA_LOCAL` is our end
/// where the other end has an address too.
fn addresses(family: Family) -> io::Result<Vec<IpAddr>> {
    const RTM_GETADDR: u16 = 22;
    const IFA_ADDRESS: u16 = 1;
    const IFA_LOCAL: u16 = 2;
    let message = Message {
        kind: RTM_GETADDR,
        family,
        attributes: &[],
    };
    let mut socket = Socket::open(Subsystem::Addresses)?;
    socket.dump(message, &Vec::new(), |found, attributes| {
        let local = attribute(attributes, IFA_LOCAL).or_else(|| attribute(attributes, IFA_ADDRESS));
        found.extend(local.and_then(netlink::address));
        ControlFlow::Continue(())
    })
}

/// The addresses of the question to which there is no route. Where rules choose
/// between tables of routes, the way of a packet depends on more than its
/// destination, so nothing is known; neither is anything before the network is up.
fn unrouted(asked: &[IpAddr]) -> Vec<IpAddr> {
    let is_up = |family| {
        let addresses = addresses(family).unwrap_or_default();
        addresses.iter().any(|address| !address.is_loopback())
    };
    if asked.is_empty() || !Family::BOTH.into_iter().any(is_up) {
        return Vec::new();
    }
    let Ok(mut socket) = Socket::open(Subsystem::Routes) else {
        return Vec::new();
    };
    let mut known = Family::BOTH.to_vec();
    known.retain(|family| has_one_table(&mut socket, *family));
    let of_known = |address: &&IpAddr| known.contains(&Family::of(**address));
    let mut unrouted: Vec<IpAddr> = asked.iter().filter(of_known).copied().collect();
    unrouted.retain(|address| !has_route(&mut socket, *address));
    unrouted
}

/// Returns true if only the kernel's own rules choose a table of routes: `local`,
/// `main`, and for IPv4 `default`.
fn has_one_table(socket: &mut Socket, family: Family) -> bool {
    const RTM_GETRULE: u16 = 34;
    let own = match family {
        Family::Ipv4 => 3,
        Family::Ipv6 => 2,
    };
    let message = Message {
        kind: RTM_GETRULE,
        family,
        attributes: &[],
    };
    let count = socket.dump(message, &0, |count, _| {
        *count += 1;
        ControlFlow::Continue(())
    });
    count.is_ok_and(|count| count <= own)
}

/// Returns false if the kernel says that a destination is unreachable. For IPv6 it
/// says so in an answer without an error (`struct rta_cacheinfo`).
fn has_route(socket: &mut Socket, address: IpAddr) -> bool {
    const RTM_GETROUTE: u16 = 26;
    const RTA_DST: u16 = 1;
    const RTA_CACHEINFO: u16 = 12;
    let bytes = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let message = Message {
        kind: RTM_GETROUTE,
        family: Family::of(address),
        attributes: &netlink::encoded(RTA_DST, &bytes),
    };
    let is_unreachable = |code: i32| {
        let known = [Errno::NETUNREACH, Errno::HOSTUNREACH].map(Errno::raw_os_error);
        known.contains(&code)
    };
    match socket.get(message) {
        Err(error) => !error.raw_os_error().is_some_and(is_unreachable),
        Ok(attributes) => {
            let error = attribute(&attributes, RTA_CACHEINFO).and_then(|info| info.get(12..16));
            let error = error
                .and_then(|bytes| bytes.try_into().ok())
                .map(i32::from_ne_bytes);
            !error.is_some_and(|code| is_unreachable(code.saturating_abs()))
        }
    }
}

/// The SSH connection, from `SSH_CONNECTION=CLIENT PORT SERVER PORT`. Programs
/// such as sudo remove the variable, so the environments of the parent
/// processes are searched too.
fn ssh() -> Option<Ssh> {
    const GENERATIONS: usize = 32;
    if let Ok(value) = std::env::var("SSH_CONNECTION") {
        return connection(&value);
    }
    let mut process = std::os::unix::process::parent_id();
    for _ in 0..GENERATIONS {
        if process <= 1 {
            return None;
        }
        let environment = fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
        let mut variables = environment.split(|byte| *byte == 0);
        if let Some(value) = variables.find_map(|one| one.strip_prefix(b"SSH_CONNECTION=")) {
            return connection(&String::from_utf8_lossy(value));
        }
        process = parent(process)?;
    }
    None
}

/// The fourth field of `/proc/PID/stat`; the second is in brackets, and may hold
/// anything.
fn parent(process: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split(' ').nth(1)?.parse().ok()
}

fn connection(value: &str) -> Option<Ssh> {
    let mut words = value.split(' ');
    // A link-local address names its link: `fe80::1%eth0`.
    let address = |word: &str| word.split('%').next()?.parse().ok();
    Some(Ssh {
        client: address(words.next()?)?,
        server: address(words.nth(1)?)?,
        port: words.next()?.parse().ok()?,
    })
}

/// The interfaces that accept packets to 127.0.0.0/8. The setting of `all`
/// counts for each; `lo` does not count, because nothing from outside arrives
/// there.
fn route_localnet() -> Vec<String> {
    let directory = Path::new("/proc/sys/net/ipv4/conf");
    let mut names = interfaces(directory);
    names.retain(|name| name != "lo");
    names.push("all".to_owned());
    names.retain(|name| is_on(&directory.join(name).join("route_localnet")) == Some(true));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_addresses_are_those_of_the_interfaces() {
        let asked = ["127.0.0.1", "192.0.2.1"].map(|text| text.parse().unwrap());
        assert_eq!(own_addresses(&asked), asked[..1]);
    }

    #[test]
    fn the_ssh_connection_is_read_from_its_four_words() {
        let ssh = connection("198.51.100.7 50022 192.0.2.254 2222").unwrap();
        assert_eq!(
            (ssh.client.to_string(), ssh.port),
            ("198.51.100.7".to_owned(), 2222)
        );
        let ssh = connection("fe80::2%front 4000 fe80::1%front 22").unwrap();
        assert_eq!(ssh.server.to_string(), "fe80::1");
        assert_eq!(connection("198.51.100.7 50022 192.0.2.254"), None);
    }
}
