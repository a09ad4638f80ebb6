//! Facts about this host from the kernel's files.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use super::routes::{self, InterfaceAddress, Routes};
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
    /// The ways to the addresses of the question.
    pub routes: Routes,
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
    /// Find the ways to these addresses.
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
    let addresses = match questions.routes.is_empty() {
        true => routes::addresses(families_of(&questions.addresses)),
        false => routes::addresses(Family::BOTH.to_vec()),
    };
    Facts {
        own: own_addresses(&questions.addresses, &addresses),
        ssh: questions.ssh.then(ssh).flatten(),
        route_localnet: match questions.route_localnet {
            true => route_localnet(),
            false => Vec::new(),
        },
        forwarding_somewhere: families.filter(forwards).collect(),
        untracked: tracking.filter(|one| is_untracked(*one)).collect(),
        routes: Routes::to(&questions.routes, &addresses),
    }
}

fn families_of(addresses: &[IpAddr]) -> Vec<Family> {
    let is_used = |family: &Family| addresses.iter().any(|one| Family::of(*one) == *family);
    Family::BOTH.into_iter().filter(is_used).collect()
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
fn own_addresses(asked: &[IpAddr], addresses: &[InterfaceAddress]) -> Vec<IpAddr> {
    let own: BTreeSet<IpAddr> = addresses.iter().map(|one| one.address).collect();
    let asked: BTreeSet<IpAddr> = asked.iter().copied().collect();
    asked.intersection(&own).copied().collect()
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
        let asked = ["127.0.0.1", "192.0.2.1", "127.0.0.1"].map(|text| text.parse().unwrap());
        let addresses = routes::addresses(families_of(&asked));
        assert_eq!(own_addresses(&asked, &addresses), asked[..1]);
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
